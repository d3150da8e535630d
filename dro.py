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

The three functions below are the mathematics; `Mixture` applies them at each evaluation and holds what little state
there is.

    python train.py config/toy_continue.py --schedule=dro --dynamic_reference=True --dynamic_ratio=True
"""

import numpy as np
from scipy.optimize import brentq

from scaling_law import FitError, ScalingLaw, fit, fit_together

COLLECT_FROM, PREDICT_FROM, RATIO_FROM = 0.02, 0.10, 0.20  # shares of the run at which each addition sets in
MORE_POINTS_THAN = 10  # evaluations: with so many or fewer the scaling law is not asked yet (section 3.2)


def chi2(q, p) -> float:
    """Divergence of q from p: ½ Σ p (q/p - 1)², 0 where they are equal (eq. 5)."""
    return float(0.5 * np.sum(p * (q / p - 1) ** 2))


def dro_weights(losses, reference, ratio, rho: float = 0.1, floor: float = 0.2, temperature: float = 0.0) -> np.ndarray:
    """The worst mixture within chi2(q, ratio) <= rho: argmax Σ q_i (l_i - r_i), eq. 3 and 5.

    q_i ∝ p_i · max(relu(excess_i - eta) / Z, floor) with Z = Σ p_i relu(excess_i - eta), eta such that the constraint
    is tight. The floor keeps every domain in the training: at 0 this is the exact argmax. Equal excesses give the
    ratio itself; a rho beyond reach gives the extreme point, everything (but the floor) on the largest excess.

    That argmax knows no scale: it goes as far for a difference of .001 nats as for one of 1. With a temperature, in
    nats, it is the argmax of Σ q_i (l_i - r_i) - temperature · chi2(q, p) within the same set: Z is at least the
    temperature, so that q_i / p_i rises by no more than 1 with each `temperature` nats of excess. 0 is the paper's.

    Arrays of one value per domain; the ratio need not add up to 1. ValueError for values that are not finite, a ratio
    that is not positive, rho or temperature below 0, or a floor that is not in [0, 1).
    """
    losses, reference, p = (np.asarray(x, np.float64) for x in (losses, reference, ratio))
    check(losses=losses, reference=reference, ratio=p, rho=rho, floor=floor, temperature=temperature)
    p, excess = p / p.sum(), losses - reference
    worst, gap = excess == excess.max(), np.ptp(excess)
    # what is only float32's rounding must not become weights; nor is there anything to find in so small a set
    if gap <= 1e-6 * max(1.0, np.abs(losses).max()) or rho < 1e-20 or gap < 1e-12 * temperature:
        return p
    excess = (excess - excess.max()) / gap  # neither an offset nor a scale changes the argmax: now in [-1, 0]
    close = {"xtol": 1e-300, "maxiter": 1000}  # the worst is at 0, where floats tell near ties apart

    def above(eta):
        return np.maximum(excess - eta, 0.0)

    def weights_at(eta):
        q = p * np.maximum(above(eta) / (p @ above(eta)), floor)
        return q / q.sum()

    mean = p @ excess
    eta = np.max(excess[~worst])  # only the worst are above it: the extreme point
    if chi2(weights_at(eta), p) > rho:
        # below `low` neither relu nor floor bind (the least excess, -1, gets (-1 - eta) / (mean - eta) >= floor times
        # its share), and there chi2 = ½ variance / (mean - eta)² <= rho
        spread = np.sqrt(p @ (excess - mean) ** 2)
        low = mean - 1.001 * max(spread / np.sqrt(2 * rho), (mean + 1) / (1 - floor))
        eta = brentq(lambda eta: chi2(weights_at(eta), p) - rho, low, eta, **close)  # the constraint is tight
    least = temperature / gap
    if p @ above(eta) < least:  # Z >= mean - eta
        eta = brentq(lambda eta: p @ above(eta) - least, mean - 1.001 * least, eta, **close)
    return weights_at(eta)


def sheared_weights(weights, losses, reference, step_size: float = 1.0, smoothing: float = 1e-4, clip: bool = False):
    """Sheared LLaMA's dynamic batch loading: w_i ∝ w_i · exp(step_size · (l_i - r_i)), mixed with a little uniform.

    clip=True takes excesses at 0 at least, as its paper says; its code, the default here, does not.
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


class Mixture:
    """The domain weights of a run, updated at each evaluation. All state is the small dict `state`.

    schedule: "constant", "sheared" or "dro"; dynamic_reference and dynamic_ratio switch the paper's two additions.
    initial: first weights and reference ratio, one share per domain; reference: first reference losses or None.
    law: "paper", eq. 4, where the lowest prediction ever made counts; or "rate", with the learning rate
    (scaling_law.py), where the newest does, so that a wrong early one is forgotten.
    """

    def __init__(
        self,
        domains: list[str],
        initial,
        schedule: str,
        reference=None,
        *,
        dynamic_reference: bool = False,
        dynamic_ratio: bool = False,
        law: str = "rate",
        rho: float = 0.1,
        floor: float = 0.2,
        temperature: float = 0.0,
        delta: float = 0.1,
        bound: float = 2.0,
        step_size: float = 1.0,
        clip: bool = False,
    ):
        self.domains, self.schedule = domains, schedule
        self.dynamic_reference, self.dynamic_ratio = dynamic_reference, dynamic_ratio
        self.law, self.delta, self.bound = law, delta, bound
        self.rho, self.floor, self.temperature = rho, floor, temperature
        self.step_size, self.clip = step_size, clip
        self.initial = np.asarray(initial, np.float64) / np.sum(initial)
        self.state = {
            "weights": self.initial.tolist(),
            "ratio": self.initial.tolist(),
            "given": None if reference is None else [float(r) for r in reference],
            "reference": None if reference is None else [float(r) for r in reference],
            "best": None,  # lowest validation loss of each domain so far
            "history": {"tokens": [], "losses": [], "params": [], "rates": []},  # one row per evaluation
        }

    @property
    def weights(self) -> np.ndarray:
        """What the next batch is drawn by, one share per domain."""
        return np.array(self.state["weights"])

    def update(
        self, progress: float, losses, tokens, params: float, tokens_end, params_end: float, rate=1.0, rate_end=1.0
    ) -> dict:
        """Take one evaluation in: the new weights act from the next batch on.

        progress: share of the run that is done, 0 to 1. losses: validation losses (n,), nats. tokens: tokens of each
        domain seen (n,); tokens_end: expected at the end of the run. params, params_end: parameters left now, at the
        end; rate, rate_end: learning rate now, at the end, as shares of its peak. Returns {"laws", "no_prediction"}: a
        ScalingLaw or None per domain, why there is none. ValueError names the domain whose loss is not finite.
        """
        s, losses = self.state, np.asarray(losses, np.float64)
        for name, loss in zip(self.domains, losses):
            if not np.isfinite(loss):
                raise ValueError(f"validation loss of domain '{name}' is {loss}")
        s["best"] = losses.tolist() if s["best"] is None else np.minimum(s["best"], losses).tolist()
        if progress >= COLLECT_FROM:
            point = {"tokens": list(map(int, tokens)), "losses": losses.tolist()}
            for key, value in (point | {"params": float(params), "rates": float(rate)}).items():
                s["history"][key].append(value)
        laws = [None] * len(losses)
        if self.dynamic_reference and progress >= PREDICT_FROM and len(s["history"]["losses"]) > MORE_POINTS_THAN:
            laws = self.fit_laws()
            predicted = [
                law.predict(t, params_end, rate_end) if isinstance(law, ScalingLaw) else np.inf
                for law, t in zip(laws, tokens_end)
            ]
            # section 3.2: the reference is the lowest loss the domain was given, seen at or predicted to reach
            before = s["reference"] if self.law == "paper" else s["given"]
            before = np.full(len(losses), np.inf) if before is None else before
            s["reference"] = np.minimum.reduce([before, predicted, s["best"]]).tolist()

        if self.schedule != "constant" and s["reference"] is not None:
            if self.schedule == "sheared":
                q = sheared_weights(s["weights"], losses, s["reference"], self.step_size, clip=self.clip)
            else:
                q = dro_weights(losses, s["reference"], s["ratio"], self.rho, self.floor, self.temperature)
                if self.dynamic_ratio and progress >= RATIO_FROM:
                    s["ratio"] = update_ratio(s["ratio"], q, self.initial, self.delta, self.bound).tolist()  # 3.3
            s["weights"] = q.tolist()
        return {
            "laws": [law if isinstance(law, ScalingLaw) else None for law in laws],
            "no_prediction": [str(law) if isinstance(law, FitError) else None for law in laws],
        }

    def fit_laws(self) -> list[ScalingLaw | FitError]:
        """The scaling law of each domain, from all evaluations so far."""
        tokens, losses, params, rates = (np.array(self.state["history"][key]) for key in self.state["history"])
        if self.law == "rate":
            return fit_together(tokens, losses, params, rates)
        laws = []
        for t, y in zip(tokens.T, losses.T):
            on = t > 0  # before its first token a domain is not on the curve
            try:
                laws.append(fit(t[on], y[on], params[on]))
            except FitError as error:
                laws.append(error)
        return laws
