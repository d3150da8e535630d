"""Which domain should the next batches be drawn from? Validation losses in, domain weights out.

    theta <- argmin_theta  sum_i q_i l_i(theta)                      paper, eq. 3: train on the mixture q, then
    q     <- argmax_q      sum_i q_i (l_i - r_i),  chi2(q, p) <= rho      eq. 3 and 5: move q to the lagging domains

    symbol  variable   meaning
    l       losses     validation loss of each domain, nats per token
    r       reference  loss a domain should at least reach (l_R in the paper, section 3.2)
    p       ratio      reference ratio: centre of the robust set (p_R in the paper, section 3.3)
    q       weights    the mixture: what the batches are drawn by
    rho     rho        radius of the robust set
    delta   delta      how fast the ratio follows the weights

The functions are the mathematics; `Mixture` applies them at each evaluation and holds what little state there is.

    python train.py config/toy_continue.py --schedule=dro --dynamic_reference=True --dynamic_ratio=True
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from scaling_law import FitError, ScalingLaw, fit_together

COLLECT_FROM, PREDICT_FROM, RATIO_FROM = 0.02, 0.10, 0.20  # shares of the run at which each addition sets in
MORE_POINTS_THAN = 10  # points: the scaling law is asked only when there are more (section 3.2)
RHO_MIN = 1e-20  # a robust set smaller than this is the reference ratio itself


def chi2(q, p) -> float:
    """Divergence of q from p: ½ Σ p (q/p - 1)², 0 where they are equal (eq. 5)."""
    return float(0.5 * np.sum(p * (q / p - 1) ** 2))


def dro_weights(losses, reference, ratio, rho: float = 0.1, floor: float = 0.2, temperature: float = 0.0) -> np.ndarray:
    """The worst mixture within chi2(q, ratio) <= rho: argmax Σ q_i (l_i - r_i), eq. 3 and 5.

    Equal excesses l - r give the ratio itself. If no mixture is as far from the ratio as rho, the result is the extreme
    point: everything, but for the floor, on the largest excess. The floor keeps every domain in the training: one that
    would get less is lifted to `floor` times its share of the ratio, and then the weights are made to sum to 1. Only at
    0 is it the exact argmax.

    That argmax knows no scale: it goes as far for a difference of .001 nats as for one of 1. With a temperature, in
    nats, it is the argmax of Σ q_i (l_i - r_i) - temperature · chi2(q, p) within the same set: a domain's q_i / p_i
    rises by at most 1 for every `temperature` nats of its excess. At 0 it is the paper's argmax.

    Arrays of one value per domain; the ratio need not add up to 1. ValueError for values that are not finite, a ratio
    that is not positive, rho or temperature below 0, or a floor that is not in [0, 1).
    """
    losses, reference, p = (np.asarray(x, np.float64) for x in (losses, reference, ratio))
    check(losses=losses, reference=reference, ratio=p, rho=rho, floor=floor, temperature=temperature)
    p, excess = p / p.sum(), losses - reference
    gap = np.ptp(excess)
    if gap <= 1e-6 * max(1.0, np.abs(losses).max()) or rho < RHO_MIN:  # float32's rounding must not become weights
        return p
    # neither an offset nor a scale changes the argmax; near 0, where the worst are now, floats are densest
    excess, temperature = (excess - excess.max()) / gap, min(temperature / gap, 1e12)
    eta = eta_of_the_set(excess, p, rho, floor)
    if temperature > 0:  # both limits hold below the smaller of the two
        eta = min(eta, eta_of_the_temperature(excess, p, temperature))
    return weights_at(eta, excess, p, floor)


def weights_at(eta: float, excess, p, floor: float) -> np.ndarray:
    """The argmax for eta, the excess above which a domain gains weight (the Lagrange multiplier of Σ q = 1).

    q_i ∝ p_i · max(relu(excess_i - eta) / Z, floor) with Z = Σ p_i relu(excess_i - eta).
    """
    above = np.maximum(excess - eta, 0.0)
    q = p * np.maximum(above / (p @ above), floor)
    return q / q.sum()


def eta_of_the_set(excess, p, rho: float, floor: float) -> float:
    """The eta at which chi2(q, p) = rho. If no mixture is as far from p: the eta that only the worst are above.

    chi2 rises with eta: far below all excesses q is p, just below the largest one it is the extreme point.
    """

    def beyond(eta):
        return chi2(weights_at(eta, excess, p, floor), p) - rho

    high = np.max(excess[excess < 0])  # the largest excess is 0
    if beyond(high) <= 0:
        return high
    low = -2.0  # the smallest excess is -1
    while beyond(low) > 0:
        low *= 2
    return brentq(beyond, low, high, xtol=1e-300, maxiter=1000)


def eta_of_the_temperature(excess, p, temperature: float) -> float:
    """The eta at which Z = temperature, so that q_i / p_i = relu(excess_i - eta) / temperature.

    Z is the largest of Σ_S p_i (excess_i - eta) over sets S of domains; the largest is always one of the k worst.
    """
    worst_first = np.argsort(-excess)
    p, excess = p[worst_first], excess[worst_first]
    return np.max((np.cumsum(p * excess) - temperature) / np.cumsum(p))


def sheared_weights(weights, losses, reference, step_size: float = 1.0, smoothing: float = 1e-4, clip: bool = False):
    """Sheared LLaMA's dynamic batch loading: w_i ∝ w_i · exp(step_size · (l_i - r_i)), mixed with a little uniform.

    clip=True: an excess below 0 counts as 0, as Sheared LLaMA's paper says. Its code, and the default here, do not.
    """
    weights, losses, reference = (np.asarray(x, np.float64) for x in (weights, losses, reference))
    check(losses=losses, reference=reference, ratio=weights)
    excess = losses - reference
    if clip:
        excess = np.maximum(excess, 0.0)
    w = weights * np.exp(step_size * (excess - excess.max()))
    return (1 - smoothing) * w / w.sum() + smoothing / len(w)


def update_ratio(ratio, q, initial, delta: float = 0.1, bound: float = 2.0) -> np.ndarray:
    """Move the reference ratio towards the weights, p <- delta · q + (1 - delta) · p (section 3.3), within bounds.

    Each share is clipped to [1/bound, bound] times its initial value, then, renormalised, to the initial smallest and
    largest; the last renormalisation may move it a little beyond. So equal initial shares stay where they are.
    """
    ratio, q, initial = (np.asarray(x, np.float64) for x in (ratio, q, initial))
    p = delta * q + (1 - delta) * ratio
    p = np.clip(p, initial / bound, initial * bound)
    p = np.clip(p / p.sum(), initial.min(), initial.max())
    return p / p.sum()


def check(losses, reference, ratio, rho=0.0, floor=0.0, temperature=0.0):
    """ValueError unless all are finite, of one length, with shares above 0 and the rest in its range."""
    if not losses.shape == reference.shape == ratio.shape or losses.ndim != 1:
        raise ValueError("losses, reference and ratio must have one value per domain")
    for name, x in (("loss", losses), ("reference loss", reference), ("ratio", ratio)):
        if not np.isfinite(x).all():
            raise ValueError(f"{name} of domain {np.flatnonzero(~np.isfinite(x))[0]} is not finite: {x}")
    if (ratio <= 0).any():
        raise ValueError(f"every domain needs a share above 0: {ratio}")
    if not (0 <= rho < np.inf and 0 <= temperature < np.inf and 0 <= floor < 1):
        raise ValueError(
            f"rho = {rho} and temperature = {temperature} must not be negative, floor = {floor} must be in [0, 1)"
        )


class Point(NamedTuple):
    """Where a run is on the axes of the scaling law."""

    tokens: np.ndarray  # (n,) training tokens of each domain seen: T
    params: float  # parameters left in the model: P
    rate: float = 1.0  # learning rate, as a share of its peak


@dataclass
class Mixture:
    """The domain weights of a run, updated at each evaluation. ValueError for a schedule that does not exist."""

    domains: list[str]
    initial: np.ndarray  # (n,) first weights and reference ratio; they need not sum to 1
    schedule: str  # a key of SCHEDULES
    reference: list[float] | None = None  # given reference losses
    dynamic_reference: bool = False  # section 3.2
    dynamic_ratio: bool = False  # section 3.3
    law: str = "rate"  # "paper": eq. 4, and the lowest prediction counts; "rate": fit_together, and the newest counts
    rho: float = 0.1
    floor: float = 0.2
    temperature: float = 0.0
    delta: float = 0.1
    bound: float = 2.0
    step_size: float = 1.0
    clip: bool = False

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule = '{self.schedule}' is not one of {', '.join(SCHEDULES)}")
        self.initial = np.asarray(self.initial, np.float64) / np.sum(self.initial)
        self.laws: list[ScalingLaw | FitError | None] = [None] * len(self.domains)  # of the last evaluation
        n, given = len(self.domains), self.reference
        self.state = {  # all that changes
            "weights": self.initial.tolist(),
            "ratio": self.initial.tolist(),
            "reference": [None] * n if given is None else [float(r) for r in given],
            "reference_is": [None] * n if given is None else ["given"] * n,  # later "predicted" or "seen"
            "history": {"tokens": [], "losses": [], "params": [], "rates": []},  # one entry per evaluation
        }

    @property
    def weights(self) -> np.ndarray:
        """What the next batch is drawn by, one share per domain."""
        return np.array(self.state["weights"])

    def update(self, progress: float, losses, now: Point, end: Point) -> None:
        """Take one evaluation in: losses -> law -> reference -> weights, which act from the next batch on.

        progress: share of the run that is done, 0 to 1. losses: validation losses (n,), nats. now, end: where the run
        is and where it will end. Afterwards `laws` has for each domain a ScalingLaw, or why there is none, or None
        where none was asked for. ValueError names the domain whose loss is not finite.
        """
        losses = np.asarray(losses, np.float64)
        for name, loss in zip(self.domains, losses):
            if not np.isfinite(loss):
                raise ValueError(f"validation loss of domain '{name}' is {loss}")
        history = self.state["history"]
        if progress >= COLLECT_FROM:
            history["tokens"].append([int(t) for t in now.tokens])
            history["losses"].append(losses.tolist())
            history["params"].append(float(now.params))
            history["rates"].append(float(now.rate))
        enough = len(history["losses"]) > MORE_POINTS_THAN
        if self.dynamic_reference and progress >= PREDICT_FROM and enough:
            self.laws = self._fit_laws(end)
            self._refer(end)
        if self.schedule not in WITH_REFERENCES or None not in self.state["reference"]:
            self.state["weights"] = SCHEDULES[self.schedule](self, progress, losses).tolist()

    def _fit_laws(self, end: Point) -> list[ScalingLaw | FitError]:
        """The scaling law of each domain, from all points so far, to be asked for the end of the run."""
        history = self.state["history"]
        tokens, losses, params, rates = (np.array(history[key]) for key in ("tokens", "losses", "params", "rates"))
        if self.law == "rate":
            return fit_together(tokens, losses, params, rates, end.tokens)
        laws = []
        for t, loss, at_end in zip(tokens.T, losses.T, end.tokens):  # eq. 4, for each domain alone
            laws += fit_together(t[:, None], loss[:, None], params, tokens_end=[at_end])
        return laws

    def predictions(self, point: Point) -> list[float | None]:
        """The loss of each domain at a point, by the laws of the last evaluation; None where there is no law."""
        return [
            law.predict(t, point.params, point.rate) if isinstance(law, ScalingLaw) else None
            for law, t in zip(self.laws, point.tokens)
        ]

    def _refer(self, end: Point) -> None:
        """Section 3.2: the first prediction of a domain replaces the reference that was given. From then on it is the
        lowest of the prediction and the losses seen, and under the paper's law also of all earlier predictions."""
        reference, origin = self.state["reference"], self.state["reference_is"]
        seen = np.min(self.state["history"]["losses"], axis=0).tolist()
        for i, prediction in enumerate(self.predictions(end)):
            if prediction is None and origin[i] == "given":
                continue
            candidates = [(seen[i], "seen")]
            if prediction is not None:
                candidates.append((prediction, "predicted"))
            if origin[i] in ("predicted", "seen") and (self.law == "paper" or prediction is None):
                candidates.append((reference[i], origin[i]))
            reference[i], origin[i] = min(candidates)


# A schedule gives the new weights from the mixture, the share of the run that is done, and the losses. Add yours here.


def constant(mixture: Mixture, progress: float, losses) -> np.ndarray:
    """The initial ratio."""
    return mixture.initial


def sheared(mixture: Mixture, progress: float, losses) -> np.ndarray:
    """Sheared LLaMA's schedule."""
    reference, step_size = mixture.state["reference"], mixture.step_size
    return sheared_weights(mixture.weights, losses, reference, step_size, clip=mixture.clip)


def dro(mixture: Mixture, progress: float, losses) -> np.ndarray:
    """The paper's schedule: the robust weights, and the ratio that follows them."""
    state = mixture.state
    q = dro_weights(losses, state["reference"], state["ratio"], mixture.rho, mixture.floor, mixture.temperature)
    if mixture.dynamic_ratio and progress >= RATIO_FROM:  # section 3.3
        state["ratio"] = update_ratio(state["ratio"], q, mixture.initial, mixture.delta, mixture.bound).tolist()
    return q


SCHEDULES = {"constant": constant, "sheared": sheared, "dro": dro}
WITH_REFERENCES = {"sheared", "dro"}  # these wait until every domain has a reference loss
