"""Where will this domain's loss end? A scaling law, fitted to the losses seen so far.

    loss(P, T) = A · P^-alpha · T^-beta + E                    paper, section 3.2, eq. 4

    symbol  variable  meaning
    P       params    parameters left in the model (shrinks while pruning, constant afterwards)
    T       tokens    tokens of this domain seen
    A       A         what is left to gain, in nats, at the last point of the fit
    E       E         the loss that no training removes, in nats

T and P are divided by their last values before fitting: then A + E is the last loss, all four numbers are of order one
and the fit is well conditioned, which it is not on raw token counts. For given exponents the law is linear in A and E,
so only the exponents need a search (variable projection): a grid, whose best point is then polished.

    law = fit(tokens, losses)
    law.predict(tokens_at_the_end)
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

MIN_POINTS = 5  # one more than the law has numbers
BETA = np.geomspace(0.02, 5, 32)  # exponents of T that are tried
ALPHA = np.concatenate([[0.0], np.geomspace(0.02, 5, 11)])  # exponents of P that are tried
HUBER = 1.345  # residuals beyond this many standard deviations count linearly: 95 % efficient without outliers


class FitError(ValueError):
    """The law cannot be fitted to these points; the message says why."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law, in units of the last point: loss = A · (P / params_scale)^-alpha · (T / tokens_scale)^-beta + E."""

    A: float
    alpha: float
    beta: float
    E: float
    tokens_scale: float
    params_scale: float | None = None

    def predict(self, tokens, params=None):
        """Loss in nats at `tokens` seen (number or array) and `params` left (default: those of the last point)."""
        t = np.asarray(tokens, dtype=np.float64) / self.tokens_scale
        p = 1.0 if params is None or self.params_scale is None else np.asarray(params, float) / self.params_scale
        loss = self.A * p**-self.alpha * t**-self.beta + self.E  # eq. 4
        return float(loss) if np.ndim(loss) == 0 else loss


def fit(tokens, losses, params=None) -> ScalingLaw:
    """Fit eq. 4 to points (tokens[i], losses[i], params[i]), robustly, in a few milliseconds.

    Without `params`, or where they are all the same, alpha cannot be known: it is 0 and A absorbs P^-alpha.
    Raises FitError for too few points, values that are not finite or positive, and losses that do not fall.
    """
    tokens, losses = np.asarray(tokens, np.float64), np.asarray(losses, np.float64)
    params = np.ones_like(tokens) if params is None else np.asarray(params, np.float64)
    if not tokens.shape == losses.shape == params.shape or tokens.ndim != 1:
        raise FitError("tokens, losses and params must be rows of the same length")
    if len(tokens) < MIN_POINTS:
        raise FitError(f"{len(tokens)} points, at least {MIN_POINTS} are needed")
    if not all(np.isfinite(x).all() and (x > 0).all() for x in (tokens, losses, params)):
        raise FitError("every point must be finite and above 0")
    if len(np.unique(tokens)) < 3:
        raise FitError("fewer than 3 different token counts")

    log_t, log_p = np.log(tokens / tokens[-1]), np.log(params / params[-1])
    vary = bool(np.ptp(log_p) > 1e-6)
    beta, alpha = (grid.ravel() for grid in np.meshgrid(BETA, ALPHA if vary else ALPHA[:1]))

    # the grid, re-weighted after each pass so that an outlier loses its pull (Huber's weights)
    weight = np.ones_like(losses)
    for _ in range(4):
        A, E, cost = solve(alpha, beta, log_t, log_p, losses, weight)
        best = cost.argmin()
        residual = np.abs(losses - E[best] - A[best] * np.exp(-alpha[best] * log_p - beta[best] * log_t))
        sigma = max(1.4826 * np.median(residual), 1e-9)
        weight = np.minimum(1.0, HUBER * sigma / np.maximum(residual, 1e-12))

    # polish the exponents between the grid's points, within its bounds
    def cost_at(x):
        alpha, beta = np.exp(x[1]) if vary else 0.0, np.exp(x[0])
        return solve(np.array([alpha]), np.array([beta]), log_t, log_p, losses, weight)[2][0]

    bounds = [(np.log(BETA[0]), np.log(BETA[-1]))] + [(np.log(1e-3), np.log(ALPHA[-1]))] * vary
    x = np.array([np.log(beta[best])] + [np.log(max(alpha[best], 1e-3))] * vary)
    simplex = np.vstack([x, x + 0.1 * np.eye(len(x))])
    options = {"initial_simplex": simplex, "xatol": 1e-9, "fatol": 1e-18, "maxfev": 120}
    x = minimize(cost_at, x, method="Nelder-Mead", bounds=bounds, options=options).x
    alpha, beta = float(np.exp(x[1])) if vary else 0.0, float(np.exp(x[0]))
    A, E, cost = (float(v[0]) for v in solve(np.array([alpha]), np.array([beta]), log_t, log_p, losses, weight))

    flat = (weight * (losses - np.average(losses, weights=weight)) ** 2).sum()
    if A <= 0 or cost >= 0.9 * flat:
        raise FitError("the losses do not fall")
    return ScalingLaw(A, alpha, beta, E, float(tokens[-1]), float(params[-1]) if vary else None)


def solve(alpha, beta, log_t, log_p, losses, weight):
    """Weighted least squares for A >= 0 and E >= 0 in loss = A · x + E, for each pair of exponents.

    alpha, beta: (m,); log_t, log_p, losses, weight: (n,). Returns A, E and the weighted sum of squares, each (m,).
    """
    x = np.exp(-alpha[:, None] * log_p - beta[:, None] * log_t)  # (m, n)
    w = weight / weight.sum()
    x_mean, y_mean = x @ w, losses @ w
    dx, dy = x - x_mean[:, None], losses - y_mean
    A = np.maximum((dx * dy) @ w / np.maximum((dx * dx) @ w, 1e-300), 0.0)
    E = y_mean - A * x_mean
    through_origin = (x * losses) @ w / ((x * x) @ w)
    A, E = np.where(E < 0, through_origin, A), np.maximum(E, 0.0)
    residual = losses - E[:, None] - A[:, None] * x
    return A, E, (residual * residual) @ weight
