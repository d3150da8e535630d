"""Where will each domain's loss end? A scaling law, fitted to the losses seen so far.

    loss(P, T)      = A · P^-alpha · T^-beta + E              eq. 4 (paper, section 3.2): `fit`, each domain alone
    loss(P, T, eta) = A · P^-alpha · T^-beta + B · eta + E    with the learning rate: `fit_together`, all domains

    symbol  variable  meaning
    P       params    parameters left in the model (shrinks while pruning, constant afterwards)
    T       tokens    tokens of this domain seen
    eta     rates     learning rate, as a share of its peak
    A       A         what is left to gain by tokens, in nats, at the last point of the fit
    B       B         what the noise of a full learning rate costs, in nats; regained as the rate falls
    E       E         the loss that no training removes, in nats

Losses fall faster at the end of a cosine schedule than any power of tokens says: eq. 4 alone misses that. A run holds
too few, too noisy points for every domain to find its own exponents and B, so `fit_together` shares them: A and E are
the domain's own. docs/laws.md has what either misses on real runs, and what else was tried.

T and P are divided by their last values before fitting: all numbers are of order one then and the fit is well
conditioned, which it is not on raw token counts. For given exponents the law is linear in the rest, so only the
exponents need a search (variable projection): a grid, whose best point is then polished.

    law = fit(tokens, losses)
    law.predict(tokens_at_the_end)
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

MIN_POINTS = 5  # one more than eq. 4 has parameters: below, a fit is impossible (dro.py asks for more)
BETA = np.geomspace(0.02, 5, 32)  # exponents of T that are tried
ALPHA = np.concatenate([[0.0], np.geomspace(0.02, 5, 11)])  # exponents of P that are tried
HUBER = 1.345  # residuals beyond this many standard deviations count linearly: 95 % efficient without outliers
RIDGE = 0.02  # a prior on B: losses are noisy by .014 nats, B is about .1, (.014 / .1)²; until the rate has moved B ~ 0
MAD_TO_SIGMA = 1.4826  # of a normal distribution: its standard deviation over its median absolute deviation


class FitError(ValueError):
    """The law cannot be fitted to these points; the message says why."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law: loss = A · (P / params_scale)^-alpha · (T / tokens_scale)^-beta + B · eta + E"""

    A: float
    alpha: float
    beta: float
    E: float
    tokens_scale: float
    params_scale: float | None = None
    B: float = 0.0

    def predict(self, tokens, params=None, rate=0.0):
        """Loss in nats at `tokens` seen (number or array), with `params` left (default: those of the last point), at
        this share of the peak learning rate."""
        t = np.asarray(tokens, dtype=np.float64) / self.tokens_scale
        p = 1.0 if params is None or self.params_scale is None else np.asarray(params, float) / self.params_scale
        loss = self.A * p**-self.alpha * t**-self.beta + self.B * np.asarray(rate) + self.E  # eq. 4
        return float(loss) if np.ndim(loss) == 0 else loss


def fit(tokens, losses, params=None) -> ScalingLaw:
    """Fit eq. 4 to points (tokens[i], losses[i], params[i]) of one domain, robustly, in a few milliseconds.

    Without `params`, or where they are all the same, alpha cannot be known: it is 0 and A absorbs P^-alpha.
    Raises FitError for too few points, values that are not finite or positive, and losses that do not fall.
    """
    tokens, losses = np.asarray(tokens, np.float64), np.asarray(losses, np.float64)
    if tokens.shape != losses.shape or tokens.ndim != 1:
        raise FitError("tokens, losses and params must be rows of the same length")
    if (tokens <= 0).any():
        raise FitError("every point must be finite and above 0")
    (law,) = fit_together(tokens[:, None], losses[:, None], params)
    if isinstance(law, FitError):
        raise law
    return law


def fit_together(tokens, losses, params=None, rates=None) -> list[ScalingLaw | FitError]:
    """Fit n points of d domains: tokens and losses (n, d), params and rates (n,). Exponents and B are shared.

    Without `rates` B is 0. A point with 0 tokens does not count: the domain is not on the curve yet. Returns a law for
    each domain, or a FitError that says why there is none.
    """
    tokens, losses = np.asarray(tokens, np.float64), np.asarray(losses, np.float64)
    params = np.ones(len(tokens)) if params is None else np.asarray(params, np.float64)
    rates = np.zeros(len(tokens)) if rates is None else np.asarray(rates, np.float64)
    if tokens.shape != losses.shape or tokens.ndim != 2 or not params.shape == rates.shape == tokens.shape[:1]:
        raise FitError("tokens, losses and params must be rows of the same length")
    laws = [why_not(*columns, params) for columns in zip(tokens.T, losses.T)]
    fitted = [i for i, error in enumerate(laws) if error is None]
    if not fitted:
        return laws
    tokens, losses = tokens[:, fitted], losses[:, fitted]
    seen = (tokens > 0).astype(np.float64)
    log_t, log_p = np.log(np.where(tokens > 0, tokens / tokens[-1], 1.0)), np.log(params / params[-1])
    vary = bool(np.ptp(log_p) > 1e-6)

    # the grid, re-weighted after each pass so that an outlier loses its pull (Huber's weights)
    beta, alpha = (grid.ravel() for grid in np.meshgrid(BETA, ALPHA if vary else ALPHA[:1]))
    x, weight = powers(alpha, beta, log_t, log_p), seen
    for _ in range(4):
        A, B, E, cost = solve(x, rates, losses, weight)
        best = (cost.sum(-1) + RIDGE * B**2).argmin()
        residual = np.abs(losses - E[best] - A[best] * x[best] - B[best] * rates[:, None])
        sigma = [max(MAD_TO_SIGMA * np.median(r[s > 0]), 1e-9) for r, s in zip(residual.T, seen.T)]
        weight = seen * np.minimum(1.0, HUBER * np.array(sigma) / np.maximum(residual, 1e-12))

    # polish the exponents between the grid's points, within its bounds
    def solve_at(log_exponents):
        exponents = np.exp(log_exponents)
        alpha, beta = exponents[1:] if vary else np.zeros(1), exponents[:1]
        return alpha[0], beta[0], *(v[0] for v in solve(powers(alpha, beta, log_t, log_p), rates, losses, weight))

    bounds = [(np.log(BETA[0]), np.log(BETA[-1]))] + [(np.log(1e-3), np.log(ALPHA[-1]))] * vary
    start = np.array([np.log(beta[best])] + [np.log(max(alpha[best], 1e-3))] * vary)
    simplex = np.vstack([start, start + 0.1 * np.eye(len(start))])
    options = {"initial_simplex": simplex, "xatol": 1e-9, "fatol": 1e-18, "maxfev": 120}

    def objective(log_exponents):
        *_, B, _, cost = solve_at(log_exponents)
        return cost.sum() + RIDGE * B**2

    found = minimize(objective, start, method="Nelder-Mead", bounds=bounds, options=options).x
    alpha, beta, A, B, E, cost = solve_at(found)

    flat = (weight * (losses - np.sum(weight * losses, 0) / weight.sum(0)) ** 2).sum(0)
    for k, i in enumerate(fitted):
        if cost[k] >= 0.9 * flat[k] or (A[k] <= 0 and B <= 0):  # it must explain a tenth of the variance at least
            laws[i] = FitError("the losses do not fall")
        else:
            scale = float(tokens[-1, k]), float(params[-1]) if vary else None
            laws[i] = ScalingLaw(float(A[k]), float(alpha), float(beta), float(E[k]), *scale, float(B))
    return laws


def why_not(tokens, losses, params) -> FitError | None:
    """What makes a domain's points (n,) impossible to fit, or None."""
    on = tokens != 0
    if on.sum() < MIN_POINTS:
        return FitError(f"{on.sum()} points, at least {MIN_POINTS} are needed")
    if not all(np.isfinite(x).all() and (x > 0).all() for x in (tokens[on], losses[on], params)):
        return FitError("every point must be finite and above 0")
    if len(np.unique(tokens[on])) < 3:
        return FitError("fewer than 3 different token counts")
    return None


def powers(alpha, beta, log_t, log_p):
    """P^-alpha · T^-beta, (m, n, d), for m pairs of exponents; log_t: (n, d), log_p: (n,)."""
    return np.exp(-beta[:, None, None] * log_t - (alpha[:, None] * log_p)[:, :, None])


def solve(x, rates, losses, weight):
    """Weighted least squares for A >= 0, B >= 0 and E >= 0 in losses = A · x + B · rates + E, for each of m x.

    x: (m, n, d); rates: (n,); losses, weight: (n, d). Returns A (m, d), B (m,), E (m, d) and the weighted sums of
    squares (m, d).
    """
    w = weight / weight.sum(0)

    def mean(v):  # over the points
        return np.einsum("mnd,nd->md", v, w)

    dx = x - mean(x)[:, None]
    variance = np.maximum(mean(dx * dx), 1e-300)
    B = np.zeros(len(x))
    if np.ptp(rates) > 0:
        # all domains together: what x does not explain of the losses, on what it does not explain of the rate
        centred = rates[:, None] - rates @ w
        rest = centred - dx * (mean(dx * centred) / variance)[:, None]
        B = np.einsum("mnd,nd->m", rest, weight * losses) / (np.einsum("mnd,nd->m", rest * rest, weight) + RIDGE)
        B = np.maximum(B, 0.0)
    y = losses - B[:, None, None] * rates[:, None]
    A = np.maximum(mean(dx * y) / variance, 0.0)
    E = mean(y) - A * mean(x)
    A, E = np.where(E < 0, mean(x * y) / mean(x * x), A), np.maximum(E, 0.0)
    residual = y - E[:, None] - A[:, None] * x
    return A, B, E, np.einsum("mnd,nd->md", residual * residual, weight)
