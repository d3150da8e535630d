"""Which numbers the functions of dro.py take. Losses beyond them are no measurements, and their squares overflow."""

import numpy as np

HUGE = 1e50  # losses beyond it, and shares below 1 / HUGE, are no measurements; the square of HUGE does not overflow
LIMITS = {  # the smallest and the largest value that an argument, or a number in it, may have
    **dict.fromkeys(("losses", "reference"), (-HUGE, HUGE)),
    **dict.fromkeys(("ratio", "initial", "weights"), (1 / HUGE, HUGE)),
    **dict.fromkeys(("q", "step_size"), (0, HUGE)),
    **dict.fromkeys(("smoothing", "delta"), (0, 1)),
    **dict.fromkeys(("rho", "temperature"), (0, np.inf)),
    "floor": (0, 0.999),
    "bound": (1, HUGE),
}


def check(**arguments):
    """ValueError unless each array has one value per domain, and all values are within their LIMITS."""
    shapes = {np.shape(x) for x in arguments.values()} - {()}
    if len(shapes) > 1 or any(len(shape) > 1 for shape in shapes):
        raise ValueError(f"{', '.join(arguments)} must have one value per domain")
    for name, x in arguments.items():
        low, high = LIMITS[name]
        fits = (low <= x) & (x <= high)
        if not np.all(fits):
            i = np.argmin(fits)
            at = f"[{i}]" if np.ndim(x) else ""
            raise ValueError(f"{name}{at} = {np.ravel(x)[i]:g} must be between {low:g} and {high:g}")
