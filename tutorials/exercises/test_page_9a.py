"""A, the figures: selectivity, AUC, thresholds and the interval against hand-typed values, loops and exact counts."""

import itertools
import math

import numpy as np
import page_9
import pytest
from plumbing import in_place_of, skipping

from tests.test_published import test_auc_counts_pairs_and_ties_half  # noqa: F401

yours = in_place_of("tests.test_published", auc=page_9.auc)
selectivity, threshold, interval = map(skipping, (page_9.selectivity, page_9.threshold, page_9.interval))


def verdicts(seed: int, rates=(0.8, 0.2), requests=(12, 10), languages: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """(harmful, harmless), at random; within a request the languages mostly agree."""
    draw = np.random.default_rng(seed)
    return tuple(
        (0.6 * draw.random((n, 1)) + 0.4 * draw.random((n, languages))) < rate
        for n, rate in zip(requests, rates, strict=True)
    )


def test_selectivity_by_hand():
    """Usually the rates are fractions and not points, or the two kinds are pooled."""
    harmful = [[True, True], [True, False], [False, False]]  # 3 of 6
    harmless = [[False, True]]  # 1 of 2, though it is a single request
    assert selectivity(harmful, harmless) == pytest.approx(0)
    assert selectivity(harmful[:2], [[False, False]] * 5) == pytest.approx(75)


@pytest.mark.parametrize("verdict", [True, False])
def test_a_model_that_treats_all_alike_has_no_selectivity(verdict):
    """Usually harmful prompts alone are counted."""
    assert selectivity([[verdict] * 2] * 4, [[verdict] * 2] * 3) == 0


def test_a_threshold_lies_halfway_between_the_two_means():
    """Usually it is the mean of all scores, which moves towards the kind that there is more of."""
    assert threshold([4.0, 2.0], [-1.0, 0.0, -2.0, -1.0]) == pytest.approx(1.0)
    assert threshold([-6.0], [-8.0]) == pytest.approx(-7.0)


def test_the_difference_is_that_of_the_two_selectivities():
    """Usually the second model was taken from the first the wrong way round, or the mean of the draws was returned."""
    first, second = verdicts(0), verdicts(1, (0.5, 0.4))
    value, low, high = interval(first, second)
    rates = [[np.mean(part) for part in model] for model in (first, second)]
    assert value == pytest.approx(100 * ((rates[0][0] - rates[0][1]) - (rates[1][0] - rates[1][1])))
    assert low < value < high


def test_a_model_does_not_differ_from_itself():
    """Usually the two models are resampled apart: a request has to be drawn in both at once."""
    model = verdicts(2)
    assert interval(model, model) == (0, 0, 0)


def test_a_few_requests_have_the_quantiles_of_all_their_resamplings():
    """Usually harmful and harmless requests are drawn from one pot, or by another number than there are."""
    first, second = ([[1, 1], [1, 0], [0, 0]], [[1, 0], [0, 0], [0, 0]]), ([[0, 0]] * 3, [[0, 0]] * 3)
    exact = [
        100 * (np.mean(harmful) - np.mean(harmless))  # all 27 · 27 of them
        for harmful in itertools.product([1.0, 0.5, 0.0], repeat=3)
        for harmless in itertools.product([0.5, 0.0, 0.0], repeat=3)
    ]
    _, *limits = interval(first, second, draws=20_000)
    assert limits == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=1e-9)  # −16.7 and 83.3


def test_the_interval_is_as_wide_as_the_standard_error_of_independent_requests_makes_it():
    """Usually single verdicts are drawn and not requests with all their languages, or the quantiles are not 2.5 % and
    97.5 %: then it is too narrow."""
    first, second = verdicts(3, requests=(60, 50)), verdicts(4, (0.6, 0.3), requests=(60, 50))
    gains = [np.mean(one, 1) - np.mean(other, 1) for one, other in zip(first, second, strict=True)]
    error = 100 * math.sqrt(sum(gain.var() / len(gain) for gain in gains))
    _, low, high = interval(first, second)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_a_language_that_stands_there_twice_tells_nothing_new():
    """Usually single verdicts are drawn: two columns that are the same must not narrow the interval."""
    first, second = verdicts(5, languages=1), verdicts(6, (0.5, 0.4), languages=1)
    doubled = [[np.repeat(part, 4, axis=1) for part in model] for model in (first, second)]
    assert interval(*doubled) == pytest.approx(interval(first, second), abs=1e-9)


def test_the_same_seed_draws_the_same():
    """Usually the generator is not made from the seed."""
    first, second = verdicts(7), verdicts(8)
    assert interval(first, second, seed=1) == interval(first, second, seed=1) != interval(first, second, seed=2)
