"""The scaling law: known laws recovered, against scipy's curve_fit, and honest where it cannot know."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import curve_fit, least_squares

from scaling_law import (
    MIN_POINTS,
    PRIOR_B,
    REACH,
    FitError,
    Points,
    ScalingLaw,
    fit,
    fit_together,
    jacobian,
    residuals,
    tokens_supported,
)


def random_laws(n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        A, beta, E = rng.uniform(0.05, 1.5), rng.uniform(0.1, 1.2), rng.uniform(0.5, 2.5)
        yield ScalingLaw(A, 0.0, beta, E, 1e6 * 10 ** rng.uniform(0, 6)), rng


@pytest.mark.parametrize("points", [12, 24, 48])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_known_laws_are_recovered(points, share):
    """Seen up to `share` of the run, predicted at its end: exact without noise, to .003 nats (median) with .002."""
    exact, noisy = [], []
    for law, rng in random_laws(30):
        end = law.tokens_scale
        tokens = end * np.linspace(0.02, share, points)
        losses = law.predict(tokens)
        exact.append(abs(fit(tokens, losses).predict(end) - law.predict(end)))
        noisy.append(abs(fit(tokens, losses + 0.002 * rng.standard_normal(points)).predict(end) - law.predict(end)))
    assert max(exact) < 1e-6
    assert np.median(noisy) <= 0.003


def test_shrinking_model_is_told_from_training():
    """While pruning P falls first, T rises all the time: both exponents come out."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        truth = ScalingLaw(rng.uniform(0.2, 1), rng.uniform(0.2, 1), rng.uniform(0.2, 1), rng.uniform(1, 2), 1e7, 5e5)
        share = np.linspace(0.02, 0.6, 24)
        tokens, params = 1e7 * share, 1.25e6 - 0.75e6 * np.minimum(share / 0.2, 1)
        losses = truth.predict(tokens, params)
        assert losses[5] > losses[0] or losses[-1] < losses[5]
        law = fit(tokens, losses, params)
        assert law.predict(1e7, 5e5) == pytest.approx(truth.predict(1e7, 5e5), abs=1e-4)
        assert (law.alpha, law.beta) == pytest.approx((truth.alpha, truth.beta), rel=0.02)


def test_not_worse_than_scipys_least_squares():
    """The same least-squares problem, by a general solver from the true parameters."""
    worse = 0
    for law, rng in random_laws(30, seed=2):
        tokens = np.linspace(0.05, 1, 20)
        losses = law.predict(tokens * law.tokens_scale) + 0.002 * rng.standard_normal(20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            best, _ = curve_fit(
                lambda t, A, b, E: A * t**-b + E,
                tokens,
                losses,
                p0=(law.A, law.beta, law.E),
                bounds=(0, 10),
                max_nfev=9999,
            )
        squares = np.sum((best[0] * tokens ** -best[1] + best[2] - losses) ** 2)
        ours = fit(tokens * law.tokens_scale, losses)
        residual = np.abs(ours.predict(tokens * law.tokens_scale) - losses)
        worse += np.sum(residual**2) > 1.05 * squares  # Huber's weights cost a little
    assert worse <= 2


@pytest.mark.parametrize("outlier", [0.5, -0.3, 5.0])
def test_one_outlier_moves_the_prediction_little(outlier):
    errors = []
    for law, rng in random_laws(40, seed=3):
        end = law.tokens_scale
        tokens = end * np.linspace(0.02, 0.6, 24)
        losses = law.predict(tokens) + 0.002 * rng.standard_normal(24)
        losses[rng.integers(2, 24)] += outlier
        errors.append(abs(fit(tokens, losses).predict(end) - law.predict(end)))
    assert np.median(errors) < 0.006


@pytest.mark.parametrize("scale", [1.0, 1e12])
def test_units_do_not_matter(scale):
    law = fit(scale * np.arange(1, 21), 2 + np.arange(1, 21) ** -0.5)
    assert law.predict(scale * 80) == pytest.approx(2 + 80**-0.5, abs=1e-8)
    assert law.predict(scale * np.array([40, 80])).shape == (2,)


GOOD = np.linspace(1, 10, 12)
IMPOSSIBLE = {
    "too few points": (GOOD[:4], 1 / GOOD[:4], "4 points"),
    "rising": (GOOD, GOOD, "do not fall"),
    "flat": (GOOD, np.full(12, 2.0), "do not fall"),
    "noise": (GOOD, 2 + 0.01 * np.random.default_rng(0).standard_normal(12), "do not fall"),
    "nan": (GOOD, np.where(GOOD > 5, np.nan, 1 / GOOD), "finite"),
    "infinite": (GOOD, np.where(GOOD > 5, np.inf, 1 / GOOD), "finite"),
    "no tokens yet": (GOOD - 1, 1 / GOOD, "above 0"),
    "one token count": (np.ones(12), 1 / GOOD, "different token counts"),
    "lengths": (GOOD, 1 / GOOD[:6], "same length"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_fits_say_why(name):
    tokens, losses, words = IMPOSSIBLE[name]
    with pytest.raises(FitError, match=words):
        fit(tokens, losses)


@pytest.mark.parametrize("fall, is_law", [(0.003, False), (0.05, True)])
def test_a_fall_that_is_lost_in_the_noise_is_no_law(fall, is_law):
    """Noise .01. The falling part varies by .05 and by .75 of it (standard deviations over the points)."""
    tokens = np.linspace(1, 10, 24)
    found = []
    for seed in range(8):
        losses = 2 + fall * tokens**-0.5 + 0.01 * np.random.default_rng(seed).standard_normal(24)
        try:
            found.append(fit(tokens, losses))
        except FitError as error:
            assert "do not fall" in str(error)
    assert len(found) == (8 if is_law else 0)


# -- with the learning rate -----------------------------------------------------------------------------------------


def cosine(share):
    return 0.1 + 0.45 * (1 + np.cos(np.pi * share))


def three_domains(share, noise=0.0, seed=0):
    """Three domains under a cosine schedule, seen up to `share` of the run: tokens, losses, rates, the end."""
    rng = np.random.default_rng(seed)
    progress, speeds = np.linspace(0.02, share, 24), np.array([1e6, 3e5, 5e4])
    laws = [ScalingLaw(A, 0.0, 0.4, E, s, None, 0.15) for A, E, s in zip((0.1, 0.2, 0.05), (1.7, 1.2, 2.0), speeds)]
    tokens, rates = progress[:, None] * speeds, cosine(progress)
    losses = np.stack([law.predict(t, rate=rates) for law, t in zip(laws, tokens.T)], 1)
    end = [law.predict(s, rate=0.1) for law, s in zip(laws, speeds)]
    return tokens, losses + noise * rng.standard_normal(losses.shape), rates, np.array(end), speeds


def test_what_the_falling_rate_gains_is_foreseen():
    """Half of a cosine run seen: eq. 4 alone misses what the rate will still give, the law that knows it does not."""
    tokens, losses, rates, end, speeds = three_domains(0.5)
    laws = fit_together(tokens, losses, rates=rates)
    together = np.array([law.predict(s, rate=0.1) for law, s in zip(laws, speeds)])
    alone = np.array([fit(t, y).predict(s) for t, y, s in zip(tokens.T, losses.T, speeds)])
    assert np.abs(together - end).max() < 0.007  # the ridge costs a little
    assert np.abs(alone - end).min() > 0.03
    assert laws[0].B == pytest.approx(0.15, rel=0.1) and len({(law.alpha, law.beta, law.B) for law in laws}) == 1


def test_together_is_the_least_squares_solution(monkeypatch):
    """The same problem, the prior on B included, as plain least squares from the true parameters."""
    monkeypatch.setattr("scaling_law.HUBER", (1e6,))  # no residual is an outlier
    tokens, losses, rates, _, speeds = three_domains(0.6, noise=0.003, seed=5)
    t = tokens / tokens[-1]

    def residuals(v):
        return np.append((v[2:5] * t ** -v[0] + v[1] * rates[:, None] + v[5:8] - losses).ravel(), PRIOR_B * v[1])

    best = least_squares(residuals, [0.4, 0.15, 0.1, 0.2, 0.05, 1.7, 1.2, 2.0], xtol=1e-12, ftol=1e-12).x
    law, *others = fit_together(tokens, losses, rates=rates)
    mine = [law.beta, law.B, law.A, others[0].A, others[1].A, law.E, others[0].E, others[1].E]
    assert np.sum(residuals(np.array(mine)) ** 2) == pytest.approx(np.sum(residuals(best) ** 2), rel=1e-6)


def test_a_rate_that_has_not_moved_tells_nothing():
    """With the rate constant so far B is 0, and a domain's law is eq. 4's."""
    tokens, losses, *_ = three_domains(1.0)
    assert all(law.B == 0 for law in fit_together(tokens, losses, rates=np.ones(24)))
    law, *_ = fit_together(tokens[:, :1], losses[:, :1], rates=np.ones(24))
    assert replace(law, B=0.0) == fit(tokens[:, 0], losses[:, 0])


def test_together_each_domain_has_its_own_reason():
    tokens, losses, rates, end, speeds = three_domains(0.8)
    losses[:, 1] = np.nan
    tokens[:, 2] = np.maximum(0, tokens[:, 2] - tokens[9, 2])  # drawn late
    laws = fit_together(tokens, losses, rates=rates)
    assert isinstance(laws[0], ScalingLaw) and "finite" in str(laws[1]) and isinstance(laws[2], ScalingLaw)
    assert [str(e) for e in fit_together(tokens[:3], losses[:3])] == [
        "3 points, at least 5 are needed", "3 points, at least 5 are needed", "0 points, at least 5 are needed",
    ]  # fmt: skip
    with pytest.raises(FitError, match="same length"):
        fit_together(tokens, losses, rates=rates[:5])


@pytest.mark.parametrize("share", [0.5, 0.6, 0.75, 0.9])
def test_a_domain_that_rises_does_not_get_the_fall_of_the_others(share):
    """B is shared: what the others regain as the rate falls is no law for a domain whose losses go the other way."""
    tokens, losses, rates, *_ = three_domains(share, noise=0.01)
    progress = tokens[:, :1] / 1e6
    rising = 2 + 0.05 * progress
    *laws, law = fit_together(np.hstack([tokens, tokens, progress]), np.hstack([losses, losses, rising]), rates=rates)
    assert str(law) == "the losses do not fall" and all(isinstance(law, ScalingLaw) for law in laws)


HISTORIES = json.loads((Path(__file__).parent / "histories.json").read_text())


def test_real_runs_are_foreseen_better_than_by_eq_4():
    """Loss histories of real toy runs (tests/histories.json): at half of the run, where will it end?"""
    errors = []
    for run in HISTORIES.values():
        run = {key: np.array(values) for key, values in run.items()}
        known = (run["progress"] >= 0.02) & (run["progress"] <= 0.5)
        tokens, losses, params, rates = (run[key][known] for key in ("tokens", "losses", "params", "rates"))
        tokens_end, params_end, rate_end, end = (run[key][-1] for key in ("tokens", "params", "rates", "losses"))
        together = fit_together(tokens, losses, params, rates)
        alone = [fit_together(t[:, None], y[:, None], params)[0] for t, y in zip(tokens.T, losses.T)]
        alone = [y.min() if isinstance(law, FitError) else law for law, y in zip(alone, losses.T)]
        predictions = [
            [
                law.predict(t, params_end, rate_end) if isinstance(law, ScalingLaw) else law
                for law, t in zip(laws, tokens_end)
            ]
            for laws in (together, alone)
        ]
        errors.append(np.abs(np.array(predictions) - end).mean(1))
    errors = np.array(errors)  # (runs, 2)
    assert (errors[:, 0] < errors[:, 1]).all() and errors[:, 0].mean() < 0.5 * errors[:, 1].mean()


# -- where a law is not to be trusted -------------------------------------------------------------------------------


def test_a_prediction_far_beyond_the_points_is_refused():
    """A domain that is hardly drawn learns from the others: its loss falls, its tokens hardly rise."""
    tokens = 1e6 * np.linspace([1, 0.1], [1.02, 2], 24)
    losses = np.stack([np.linspace(2.444, 2.144, 24), 2 + (tokens[:, 1] / 1e6) ** -0.3], 1)
    assert fit(tokens[:, 0], losses[:, 0]).predict(4e6) < 0.1  # what the law would say
    stale, even = fit_together(tokens, losses, tokens_end=[4e6, 4e6])
    assert isinstance(stale, FitError) and "so far ahead" in str(stale)
    assert isinstance(even, ScalingLaw)
    assert "so far ahead" in str(fit_together(tokens, losses, tokens_end=[4e6, np.nan])[1])


def test_no_prediction_of_a_real_run_is_refused():
    """Once there are MIN_POINTS: neither the true end of the run nor the one that the tokens so far foretell."""
    for run in HISTORIES.values():
        progress, tokens = np.array(run["progress"]), np.array(run["tokens"])
        for now in range(MIN_POINTS, len(progress)):
            seen = tokens[1 : now + 1]
            for ahead in (tokens[-1], seen[-1] / progress[now]):
                assert all(end <= tokens_supported(t[t > 0]) for t, end in zip(seen.T, ahead))


def test_an_even_run_is_asked_from_9_percent_on():
    """By the end of the run, of points at each percent from 2 % on."""
    asked = [percent for percent in range(3, 100) if tokens_supported(np.arange(2.0, percent + 1)) >= 100]
    assert asked == list(range(9, 100))


@pytest.mark.parametrize("B", [0.1, 0.3, 0.6])
def test_what_the_prior_takes_from_B(B):
    """Beyond .07 it is a constant pull, .14 · .01. Against it stands the share of the rate that no other term has."""
    t = np.linspace(0.02, 1, 24)
    rate = 0.1 + 0.45 * (1 + np.cos(np.pi * t))
    (law,) = fit_together(1e6 * t[:, None], (0.3 * t**-0.4 + B * rate + 1.5)[:, None], rates=rate)
    others, *_ = np.linalg.qr(np.stack([-0.3 * np.log(t) * t**-0.4, t**-0.4, np.ones(24)], 1))
    alone = rate - others @ (others.T @ rate)
    assert B - law.B == pytest.approx(0.14 * 0.01 / (alone @ alone), rel=0.05)


def test_no_points_are_no_law():
    with pytest.raises(FitError, match="0 points, at least 5"):
        fit([], [])


def test_trusted_predictions_fall_by_no_more_than_the_points_support():
    """Whatever the law: up to `tokens_supported` it falls by at most REACH times what it fell over the points."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = np.sort(rng.uniform(1, 1 + 10 ** rng.uniform(-3, 2), 12))
        law = ScalingLaw(rng.uniform(0.01, 2), 0.0, rng.uniform(0.02, 5), 1.0, tokens[-1])
        older, newest, furthest = law.predict(
            np.array([np.quantile(tokens, 0.25), tokens[-1], tokens_supported(tokens)])
        )
        assert newest - furthest <= REACH * (older - newest)


@pytest.mark.parametrize("seed", range(4))
def test_extreme_points_give_a_finite_law_or_none(seed):
    """A seeded fuzz over duplicates, 1 token, losses of 1e300, shares of 1e-320 and the like."""
    rng = np.random.default_rng(seed)
    extremes = [1e-320, 1e-12, 1.0, 2.144, 1e6, 1e18, 1e150, 1e300, np.inf, np.nan, -1.0]
    for _ in range(40):
        n, d = rng.integers(5, 14), rng.integers(1, 4)
        tokens = np.cumsum(rng.choice([0, 1, 1, 1e3, 1e9, 1e15, 1e300], (n, d)), 0)
        losses = 2 + np.sort(rng.random((n, d)), 0)[::-1]
        params = np.sort(10 ** rng.uniform(0, rng.choice([1, 300]), n))[::-1].copy()
        rates = rng.choice([0, 0.1, 1, 1e-320], n)
        for values in (tokens, losses)[rng.integers(2) :]:
            values[rng.integers(n), rng.integers(d)] = rng.choice(extremes)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for law, end in zip(fit_together(tokens, losses, params, rates), tokens[-1]):
                if isinstance(law, ScalingLaw):
                    assert np.isfinite(
                        [law.A, law.alpha, law.beta, law.E, law.B, law.predict(2 * end, params[-1], 0.1)]
                    ).all()


def test_extreme_losses_are_refused():
    losses = 1 / GOOD
    losses[3] = 1e300
    with pytest.raises(FitError, match="above"):
        fit(GOOD, losses)


def test_a_prediction_that_is_not_finite_is_an_error():
    law = ScalingLaw(1.0, 2.0, 0.5, 1.0, 1e6, 1e6)
    with pytest.raises(FitError, match="finite"):
        law.predict(1e6, params=0)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_law_that_is_not_finite_is_an_error(monkeypatch, wrong):
    """Whatever the solver returns."""
    for place in range(5):
        monkeypatch.setattr("scaling_law.solve", lambda points, i=place: np.where(np.arange(5) == i, wrong, 0.5))
        with pytest.raises(FitError, match="finite"):
            fit(GOOD, 1 / GOOD, params=np.linspace(2, 1, 12))


def test_the_jacobian_is_the_derivative():
    rng = np.random.default_rng(0)
    points = Points(*rng.uniform(-1, 1, (4, 12)), domain=np.arange(12) % 3)
    theta, step = rng.uniform(0.2, 1, 9), 1e-6 * np.eye(9)
    by = [(residuals(theta + s, points) - residuals(theta - s, points)) / 2e-6 for s in step]
    np.testing.assert_allclose(jacobian(theta, points), np.transpose(by), atol=1e-8)
