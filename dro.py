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

    python train.py config/toy_continue.py                                          # the defaults of train.py
    python train.py config/toy_continue.py config/paper.py --out out/toy_paper      # the paper's settings
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from plumbing.limits import HUGE, check  # which numbers the functions are made for
from scaling_law import FitError, ScalingLaw, fit_together

if TYPE_CHECKING:
    from plumbing.settings import Settings

COLLECT_FROM, PREDICT_FROM, RATIO_FROM = 0.02, 0.10, 0.20  # shares of the run at which each addition sets in
MORE_POINTS_THAN = 10  # points: the scaling law is asked only when there are more (section 3.2)
RHO_MIN = 1e-20  # a robust set smaller than this is the reference ratio itself


def chi2(q, p):
    """Divergence of q (..., n) from p (n,): ½ Σ p (q/p - 1)², 0 where they are equal (eq. 5)."""
    return 0.5 * np.sum(p * (q / p - 1) ** 2, axis=-1)


def dro_weights(losses, reference, ratio, rho: float = 0.1, floor: float = 0.2, temperature: float = 0.0) -> np.ndarray:
    """The worst mixture within chi2(q, ratio) <= rho: argmax Σ q_i (l_i - r_i), eq. 3 and 5.

    Equal excesses l - r give the ratio itself. If no mixture is as far from the ratio as rho, the result is the extreme
    point: everything, but for the floor, on the largest excess. The floor keeps every domain in the training: one that
    would get less is lifted to `floor` times its share of the ratio, and then the weights are made to sum to 1.

    The argmax knows no scale: it goes as far for a difference of .001 nats as for one of 1. With a temperature, in
    nats, it is the argmax of Σ q_i (l_i - r_i) - temperature · chi2(q, p) within the same set: a domain's q_i / p_i
    rises by at most 1 for every `temperature` nats of its excess. With floor and temperature 0 it is always the paper's
    argmax; else it is where neither of them acts.

    Arrays of one value per domain; the ratio need not add up to 1. ValueError outside of limits.LIMITS.
    """
    losses, reference, p = (np.asarray(x, np.float64) for x in (losses, reference, ratio))
    check(losses=losses, reference=reference, ratio=p, rho=rho, floor=floor, temperature=temperature)
    p, excess = p / p.sum(), losses - reference
    gap = np.ptp(excess)
    size = max(1.0, np.abs(losses).max(), np.abs(reference).max())
    if gap <= 1e-6 * size or rho < RHO_MIN:  # float32's rounding must not become weights
        return p
    # neither an offset nor a scale changes the argmax: from here on the worst excess is 0, the least one -1
    path = worst_mixtures((excess - excess.max()) / gap, p, floor, min(temperature, HUGE * gap) / gap)
    inside = chi2(path, p) < rho
    if inside.all():
        return path[-1]
    beyond = np.argmin(inside)  # the first corner out of the set; on the line to it chi2 = rho is a quadratic equation
    a, b = path[beyond - 1], path[beyond]
    left, slope, bend = rho - chi2(a, p), max(0.0, np.sum((a / p - 1) * (b - a))), 0.5 * np.sum((b - a) ** 2 / p)
    t = min(1.0, 2 * left / (slope + np.sqrt(slope**2 + 4 * bend * left)))
    return (1 - t) * a + t * b


def worst_mixtures(excess, p, floor: float, temperature: float) -> np.ndarray:
    """The argmax for all rho, from p to the one furthest from it: corners (k, n) between which q runs straight.

    q_i ∝ p_i · max(relu(excess_i - eta) / Z, floor) with Z = Σ p_i relu(excess_i - eta), where eta is the Lagrange
    multiplier of Σ q = 1. With eta far below all excesses q is p. As eta rises so does chi2, and q turns where eta
    reaches an excess or a domain reaches its floor. The path ends where only the worst, whose excess is 0, are above
    eta, or where Z = temperature: there q_i / p_i rises by 1 for every `temperature` of excess.
    """
    worst_first = np.argsort(-excess)
    share, total = np.cumsum(p[worst_first]), np.cumsum((p * excess)[worst_first])  # of the k worst, for each k
    # Z >= total - share · eta for every k, with equality for one. So the least eta over k is the one where a domain has
    # its floor, excess - eta = floor · Z, and the largest is the one where Z is the temperature.
    at_floor = np.min((excess[:, None] - floor * total) / (1 - floor * share), axis=1)
    at_temperature = np.max((total - temperature) / share)
    last = min(np.max(excess[excess < 0]), at_temperature)
    eta = np.minimum(np.sort(np.concatenate([excess, at_floor])), last)[:, None]
    above = np.maximum(excess - eta, 0.0) / -eta  # at most 1
    q = p * np.maximum(above, floor * (above @ p)[:, None])
    return np.vstack([p, q / q.sum(axis=1, keepdims=True)])


def sheared_weights(weights, losses, reference, step_size: float = 1.0, smoothing: float = 1e-4, clip: bool = False):
    """Sheared LLaMA's dynamic batch loading: w_i ∝ w_i · exp(step_size · (l_i - r_i)), mixed with a little uniform.

    clip=True: an excess below 0 counts as 0, as Sheared LLaMA's paper says. Its code, and the default here, do not.
    ValueError outside of limits.LIMITS.
    """
    weights, losses, reference = (np.asarray(x, np.float64) for x in (weights, losses, reference))
    check(losses=losses, reference=reference, weights=weights, step_size=step_size, smoothing=smoothing)
    excess = losses - reference
    if clip:
        excess = np.maximum(excess, 0.0)
    w = weights * np.exp(step_size * (excess - excess.max()))
    return (1 - smoothing) * w / w.sum() + smoothing / len(w)


def update_ratio(ratio, q, initial, delta: float = 0.1, bound: float = 2.0) -> np.ndarray:
    """Move the reference ratio towards the weights, p <- delta · q + (1 - delta) · p (section 3.3), within bounds.

    Each share is clipped to [1/bound, bound] times its initial value. Then all are made to sum to 1, clipped to the
    initial smallest and largest share, and made to sum to 1 again. Each sum may take a share beyond the clip before it.
    Equal initial shares stay where they are.
    ValueError outside of limits.LIMITS.
    """
    ratio, q, initial = (np.asarray(x, np.float64) for x in (ratio, q, initial))
    check(ratio=ratio, q=q, initial=initial, delta=delta, bound=bound)
    p = delta * q + (1 - delta) * ratio
    p = np.clip(p, initial / bound, initial * bound)
    p = np.clip(p / p.sum(), initial.min(), initial.max())
    return p / p.sum()


class Point(NamedTuple):
    """Where a run is on the axes of the scaling law."""

    tokens: np.ndarray  # (n,) training tokens of each domain seen: T
    params: float  # parameters left in the model: P
    rate: float  # learning rate, as a share of its peak


class Mixture:
    """The domain weights of a run, updated at each evaluation.

    s: the settings of the group "domains" in plumbing/settings.py. initial: first weights and reference ratio (n,),
    which need not sum to 1. reference: given reference losses. ValueError for both outside of limits.LIMITS.
    """

    def __init__(self, s: "Settings", domains: list[str], initial, reference: list[float] | None = None):
        self.s, self.domains, n = s, domains, len(domains)
        self.initial = np.asarray(initial, np.float64) / np.sum(initial)
        check(initial=self.initial)
        if reference is not None:
            check(reference=np.asarray(reference, np.float64))
        self.laws: list[ScalingLaw | FitError | None] = [None] * n  # of the last evaluation
        self.state = {  # all that changes
            "weights": self.initial.tolist(),
            "ratio": self.initial.tolist(),
            "reference": [None] * n if reference is None else [float(r) for r in reference],
            "reference_is": [None] * n if reference is None else ["given"] * n,  # later "predicted" or "seen"
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
        where none was asked for. Before the first step nothing lags yet, and nothing moves. ValueError names the domain
        whose loss is not finite.
        """
        losses = np.asarray(losses, np.float64)
        for name, loss in zip(self.domains, losses):
            if not np.isfinite(loss):
                raise ValueError(f"validation loss of domain '{name}' is {loss}")
        if progress == 0:
            return
        history = self.state["history"]
        if progress >= COLLECT_FROM:
            history["tokens"].append([int(t) for t in now.tokens])
            history["losses"].append(losses.tolist())
            history["params"].append(float(now.params))
            history["rates"].append(float(now.rate))
        enough = len(history["losses"]) > MORE_POINTS_THAN
        if self.s.dynamic_reference and progress >= PREDICT_FROM and enough:
            self.laws = self._fit_laws(end)
            self._refer(end)
        if self.s.schedule not in WITH_REFERENCES or None not in self.state["reference"]:
            self.state["weights"] = SCHEDULES[self.s.schedule](self, progress, losses).tolist()

    def _fit_laws(self, end: Point) -> list[ScalingLaw | FitError]:
        """The scaling law of each domain, from all points so far, to be asked for the end of the run."""
        history = self.state["history"]
        tokens, losses, params, rates = (np.array(history[key]) for key in ("tokens", "losses", "params", "rates"))
        if self.s.law == "paper":  # eq. 4, for each domain alone
            alone = [[i] for i in range(len(self.domains))]
            return [fit_together(tokens[:, i], losses[:, i], params, tokens_end=end.tokens[i])[0] for i in alone]
        return fit_together(tokens, losses, params, rates, end.tokens)

    def predictions(self, point: Point) -> list[float | None]:
        """The loss of each domain at a point, by the laws of the last evaluation; None where there is no law."""
        return [
            law.predict(t, point.params, point.rate) if isinstance(law, ScalingLaw) else None
            for law, t in zip(self.laws, point.tokens)
        ]

    def _refer(self, end: Point) -> None:
        """Section 3.2: the first prediction of a domain replaces the reference that was given. From then on it is the
        lowest of the prediction and the losses seen. An earlier prediction counts under the paper's law, and where
        there is no newer one."""
        reference, origin = self.state["reference"], self.state["reference_is"]
        seen = np.min(self.state["history"]["losses"], axis=0).tolist()
        for i, prediction in enumerate(self.predictions(end)):
            if prediction is None and origin[i] == "given":
                continue
            candidates = [(seen[i], "seen")]
            if prediction is not None:
                candidates.append((prediction, "predicted"))
            if origin[i] == "predicted" and (self.s.law == "paper" or prediction is None):
                candidates.append((reference[i], origin[i]))
            reference[i], origin[i] = min(candidates)


# A schedule gives the new weights from the mixture, the share of the run that is done, and the losses. Add yours here.


def constant(mixture: Mixture, progress: float, losses) -> np.ndarray:
    """The initial ratio."""
    return mixture.initial


def sheared(mixture: Mixture, progress: float, losses) -> np.ndarray:
    """Sheared LLaMA's schedule."""
    weights = np.maximum(mixture.weights, 1 / HUGE)  # a run that went on from another schedule may have shares of 0
    s = mixture.s
    return sheared_weights(weights, losses, mixture.state["reference"], s.step_size, clip=s.clip_excess)


def dro(mixture: Mixture, progress: float, losses) -> np.ndarray:
    """The paper's schedule: the robust weights, and the ratio that follows them."""
    s, state = mixture.s, mixture.state
    q = dro_weights(losses, state["reference"], state["ratio"], s.rho, s.floor, s.temperature)
    if s.dynamic_ratio and progress >= RATIO_FROM:  # section 3.3
        state["ratio"] = update_ratio(state["ratio"], q, mixture.initial, s.delta, s.bound).tolist()
    return q


SCHEDULES = {"constant": constant, "sheared": sheared, "dro": dro}
WITH_REFERENCES = {"sheared", "dro"}  # these wait until every domain has a reference loss
