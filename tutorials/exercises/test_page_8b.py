"""B, the run: 150 steps of your training, and the table that they must reach."""

import copy

import page_8
import pytest
from plumbing import skipping
from test_page_8a import RECIPE, world, yours_and_ours  # noqa: F401


def test_the_gap_closes(world):  # noqa: F811
    """Usually the run ends early, or the model in `training` is a copy of the one that was given."""
    base, _, examples, _ = world
    model = copy.deepcopy(base)
    losses = skipping(lambda: list(page_8.training(model, examples, RECIPE)), "training")()
    assert len(losses) == RECIPE.steps
    yours, ours = yours_and_ours(model, world)
    assert list(yours["rates"]) == pytest.approx(list(ours["strict"].values()), abs=1e-6)
    assert yours["avg"] >= 90 and min(yours["rates"]) >= 75 and yours["pag"] >= 0.85
    assert ours["helpful_own"] >= 95 and ours["over_refusal"] <= 5  # in percent
