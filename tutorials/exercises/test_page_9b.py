"""B, the robustness: infinite scores, and input that has no figure."""

import math

import page_9
import pytest
from plumbing import skipping

selectivity, auc, threshold, interval = map(
    skipping, (page_9.selectivity, page_9.auc, page_9.threshold, page_9.interval)
)


def test_infinite_scores_are_ranked_like_others():
    """Usually scores are subtracted, and ∞ − ∞ is no number; the log-odds of a probability of 1 are infinite."""
    assert auc([math.inf, 0.0], [math.inf, -math.inf]) == pytest.approx((0.5 + 1 + 0 + 1) / 4)


def test_nan_is_no_score_and_no_verdict():
    """Usually NaN makes every comparison false and so counts as a lost pair, or as a reply that is no refusal."""
    nan = math.nan
    for call in (lambda: auc([nan, 1.0], [0.0]), lambda: threshold([1.0], [nan]), lambda: selectivity([[nan]], [[0]])):
        with pytest.raises(ValueError, match="NaN"):
            call()


def test_nothing_has_no_figure():
    """Usually the mean of nothing is NaN, with a warning that nobody reads."""
    for call in (lambda: auc([], [1.0]), lambda: threshold([1.0], []), lambda: selectivity([[True]], [])):
        with pytest.raises(ValueError):
            call()


def test_tables_that_do_not_belong_together_are_refused():
    """Usually arrays of one request are spread over all the others without a word."""
    two, one = [[1, 0], [0, 0]], [[1, 0]]
    for first, second in (((two, two), (one, two)), ((two, two), (two, one)), ((two, two), ([[1], [0]], [[1], [0]]))):
        with pytest.raises(ValueError):
            interval(first, second)
    with pytest.raises(ValueError):
        selectivity(two, [[1], [0]])
