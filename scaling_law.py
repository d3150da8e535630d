"""Where will each domain's loss end? A scaling law, fitted to the losses seen so far.

    loss(P, T)    = A · P^-alpha · T^-beta + E              eq. 4 (paper, section 3.2), each domain alone
    loss(P, T, R) = A · P^-alpha · T^-beta + B · R + E      with the learning rate, all domains together

    symbol  variable  meaning
    P       params    parameters left in the model (shrinks while pruning, constant afterwards)
    T       tokens    tokens of this domain seen
    R       rates     learning rate, as a share of its peak
    A       A         what is left to gain by tokens, in nats, at the last point of the fit
    B       B         what the noise of a full learning rate costs, in nats; regained as the rate falls
    E       E         the loss that no training removes, in nats

Losses fall faster at the end of a cosine schedule than any power of tokens says: eq. 4 alone misses that. A run holds
too few, too noisy points for every domain to find its own exponents and B, so `fit_together` shares them: A and E are
the domain's own. docs/laws.md has what either misses on real runs, and what else was tried.

T is divided by its largest value and P by its last one before fitting: all numbers are of order one then, and the fit
is well conditioned, which it is not on raw token counts. The fit is one robust least-squares problem in all parameters
at once, by scipy's solver: `residuals` states it, `jacobian` is its derivative.

    law = fit(tokens, losses)  # of one domain; `fit_together` is what a run uses
    law.predict(tokens_at_the_end)
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy  # which loads optimize and stats when they are used: a second

MIN_POINTS = 5  # one more than eq. 4 has parameters: below, a fit is impossible (dro.py asks for more)
LARGEST = 1e12  # larger losses, or tokens or parameters further apart, are no measurements, and their powers overflow
ALPHA, BETA = (0.0, 5.0), (0.02, 5.0)  # bounds of the exponents
# Huber's loss: points that miss by more than its limit count linearly. The fit is made with one limit after the other:
# the wide ones find the way, the last one, in nats about the noise of a validation loss, lets outliers pull less.
HUBER = (1.0, 0.1, 0.01)
PRIOR_B = 0.14  # pulls B to 0: a ridge up to B = HUBER[-1] / PRIOR_B = .07, beyond it a constant, weak pull. It keeps
# B small until the rate has moved: B is 0 to .5, and the losses are noisy by .014 nats
PRIOR_ALPHA = 1e-3  # the same for alpha, too weak to matter once P has changed
MAD_TO_SIGMA = 1.4826  # standard deviation of a normal distribution, divided by its median absolute deviation
REACH = 3.0  # how far a law is trusted beyond its points, see `tokens_supported`


class FitError(ValueError):
    """The law cannot be fitted to these points; the message says why."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law: loss = A · (P / params_scale)^-alpha · (T / tokens_scale)^-beta + B · R + E"""

    A: float
    alpha: float
    beta: float
    E: float
    tokens_scale: float
    params_scale: float = 1.0
    B: float = 0.0

    def predict(self, tokens, params=None, rate=0.0):
        """Loss in nats at `tokens` seen (number or array), with `params` left (default: those of the last point), at
        this share of the peak learning rate. Raises FitError where that is not a finite number."""
        with np.errstate(all="ignore"):
            t = np.asarray(tokens, np.float64) / self.tokens_scale
            p = 1.0 if params is None else np.asarray(params, np.float64) / self.params_scale
            loss = self.A * p**-self.alpha * t**-self.beta + self.B * np.asarray(rate) + self.E  # eq. 4
        if not np.isfinite(loss).all():
            raise FitError("the prediction is not a finite number")
        return float(loss) if np.ndim(loss) == 0 else loss


def fit(tokens, losses, params=None) -> ScalingLaw:
    """Fit eq. 4 to points (tokens[i], losses[i], params[i]) of one domain, robustly, in a few milliseconds.

    Without `params`, or where they are all the same, alpha cannot be known: it is 0 and A absorbs P^-alpha.
    Raises FitError for too few points, values that are not finite or positive, and losses that do not fall.
    """
    tokens, losses = (np.asarray(x, np.float64)[..., None] for x in (tokens, losses))
    if (tokens <= 0).any():
        raise FitError("every point must be finite and above 0")
    (law,) = fit_together(tokens, losses, params)
    if isinstance(law, FitError):
        raise law
    return law


def fit_together(tokens, losses, params=None, rates=None, tokens_end=None) -> list[ScalingLaw | FitError]:
    """Fit n points of d domains: tokens and losses (n, d), params and rates (n,). Exponents and B are shared.

    Without `rates` B is 0. A point with 0 tokens does not count: the domain is not on the curve yet. tokens_end (d,) is
    where the laws will be asked: further than the points support is a FitError. Returns a law for each domain, or a
    FitError that says why there is none.
    """
    tokens, losses = np.asarray(tokens, np.float64), np.asarray(losses, np.float64)
    params = np.ones(len(tokens)) if params is None else np.asarray(params, np.float64)
    rates = np.zeros(len(tokens)) if rates is None else np.asarray(rates, np.float64)
    tokens_end = np.zeros(tokens.shape[-1]) if tokens_end is None else tokens_end
    if tokens.shape != losses.shape or tokens.ndim != 2 or not params.shape == rates.shape == tokens.shape[:1]:
        raise FitError("tokens, losses, params and rates must have the same length")
    if not (np.abs(rates) <= LARGEST).all():
        raise FitError("every learning rate must be finite")
    if len(rates) and np.ptp(rates) == 0:  # B cannot be told from E
        rates = np.zeros(len(rates))
    laws = [why_not(t, loss, end, params) for t, loss, end in zip(tokens.T, losses.T, tokens_end, strict=True)]
    fitted = [i for i, error in enumerate(laws) if error is None]
    if not fitted:
        return laws

    tokens, losses = tokens[:, fitted], losses[:, fitted]
    scale = tokens.max(0)
    row, domain = np.nonzero(tokens)
    log_t, log_p = np.log((tokens / scale)[row, domain]), np.log(params / params[-1])[row]
    points = Points(log_t, log_p, rates[row], losses[row, domain], domain)
    theta = solve(points)
    alpha, beta, B, A, E = unpack(theta)
    misses = residuals(theta, points)[: len(row)]
    alpha, B = alpha if np.ptp(log_p) > 1e-6 else 0.0, B if rates.any() else 0.0
    for k, i in enumerate(fitted):
        miss, loss = misses[domain == k], points.loss[domain == k]
        curve = loss + miss  # what the law says at these points
        noise = MAD_TO_SIGMA * np.median(np.abs(miss))
        if not np.isfinite([*theta, *miss]).all():
            laws[i] = FitError("the fitted law is not finite")
        # the law's fall is lost in the noise, or it is that of the other domains, and this one's losses rise
        elif np.std(curve) < max(noise / 3, 1e-4) or not scipy.stats.kendalltau(curve, loss).statistic > 0:
            laws[i] = FitError("the losses do not fall")
        else:
            laws[i] = ScalingLaw(*map(float, (A[k], alpha, beta, E[k], scale[k], params[-1], B)))
    return laws


def why_not(tokens, losses, tokens_end, params) -> FitError | None:
    """What makes a domain's points (n,) impossible to fit, or None."""
    seen = tokens != 0
    tokens, losses = tokens[seen], losses[seen]
    if len(tokens) < MIN_POINTS:
        return FitError(f"{len(tokens)} points, at least {MIN_POINTS} are needed")
    if not all(np.isfinite(x).all() and (x > 0).all() for x in (tokens, losses, params)):
        return FitError("every point must be finite and above 0")
    if losses.max() > LARGEST or any(np.ptp(np.log(x)) > np.log(LARGEST) for x in (tokens, params)):
        return FitError(f"losses above {LARGEST:.0e}, or tokens or parameters that differ by more than that factor")
    if len(np.unique(tokens)) < 3:
        return FitError("fewer than 3 different token counts")
    if not tokens_end <= tokens_supported(tokens):
        return FitError("too few tokens of this domain were seen to predict so far ahead")
    return None


@np.errstate(over="ignore")  # infinite is right then
def tokens_supported(tokens) -> float:
    """Up to how many tokens a law of these points is trusted: REACH times as far, in log T, as the upper three quarters
    of the points extend. T^-beta is convex in log T, so the loss falls on that way by at most REACH times what the law
    fell over these points. An even run with points from 2 % on is trusted up to its end from 9 % on."""
    return tokens.max() * (tokens.max() / np.quantile(tokens, 0.25)) ** REACH


# -- the least-squares problem: theta = (alpha, beta, B, A of each domain, E of each domain) ------------------------


class Points(NamedTuple):
    """The points of all domains in one row, (m,) each."""

    log_t: np.ndarray
    log_p: np.ndarray
    rate: np.ndarray
    loss: np.ndarray
    domain: np.ndarray  # its number, 0 to d - 1


def unpack(theta):
    """alpha, beta, B, A (d,), E (d,)"""
    return *theta[:3], *np.split(theta[3:], 2)


def residuals(theta, points: Points) -> np.ndarray:
    """The law less the loss at each point, and the priors, (m + 2,)."""
    alpha, beta, B, A, E = unpack(theta)
    power = np.exp(-alpha * points.log_p - beta * points.log_t)
    law = A[points.domain] * power + B * points.rate + E[points.domain]  # eq. 4
    return np.concatenate([law - points.loss, [PRIOR_ALPHA * alpha, PRIOR_B * B]])


def jacobian(theta, points: Points) -> np.ndarray:
    """Derivative of each residual by each of theta, (m + 2, 3 + 2 d)."""
    alpha, beta, _, A, _ = unpack(theta)
    power = np.exp(-alpha * points.log_p - beta * points.log_t)
    m, d = len(power), len(A)
    by = np.zeros((m + 2, 3 + 2 * d))
    by[:m, 0] = -points.log_p * A[points.domain] * power
    by[:m, 1] = -points.log_t * A[points.domain] * power
    by[:m, 2] = points.rate
    by[m, 0], by[m + 1, 2] = PRIOR_ALPHA, PRIOR_B
    by[np.arange(m), 3 + points.domain] = power
    by[np.arange(m), 3 + d + points.domain] = 1.0
    return by


def solve(points: Points) -> np.ndarray:
    """theta with the least Huber loss, within bounds; A, B and E are not negative."""
    mean = np.bincount(points.domain, points.loss) / np.bincount(points.domain)
    theta = np.concatenate([[0.3, 0.3, 0.1], mean / 4, mean * 3 / 4])
    bounds = np.array([ALPHA, BETA] + [(0.0, np.inf)] * (len(theta) - 2)).T
    for limit in HUBER:
        robust = {"loss": "huber", "f_scale": limit, "max_nfev": 200}
        theta = scipy.optimize.least_squares(residuals, theta, jacobian, bounds, **robust, args=(points,)).x
    return theta
