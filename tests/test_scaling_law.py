"""The scaling law: known laws recovered, against scipy's curve_fit, and honest where it cannot know."""

import warnings

import numpy as np
import pytest
from scipy.optimize import curve_fit

from scaling_law import FitError, ScalingLaw, fit


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
    for law, rng in random_laws(60):
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
