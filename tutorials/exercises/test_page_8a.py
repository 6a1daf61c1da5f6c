"""A, the method: your first ten losses and your evaluation of the untrained model against the project's."""

import copy
import itertools

import page_8
import pytest
from plumbing import skipping

from mlc_min import loop
from mlc_min.evaluation.metrics import summarize
from mlc_min.examples import encode_prompt, encode_rows
from mlc_min.lab.experiment import evaluate
from mlc_min.lab.sentences import ALIGNED, EMBEDDED, LANGUAGES, refusal_text
from mlc_min.machinery.models import freeze, load_model
from mlc_min.machinery.rows import read_rows
from mlc_min.machinery.settings import PRESETS, TrainConfig

RECIPE = TrainConfig(**PRESETS["embedded"])
REFUSALS = {refusal_text(language) for language in LANGUAGES}


@pytest.fixture(scope="module")
def world():
    """(model, tokenizer, training examples, validation rows: one phrasing of four)"""
    model, tokenizer = load_model(EMBEDDED / "model")
    rows = read_rows(EMBEDDED / "train.jsonl", ALIGNED, ("chosen", "rejected"))
    examples, _ = encode_rows(rows, tokenizer, ALIGNED, RECIPE.max_length)
    held_out = read_rows(EMBEDDED / "validation.jsonl", ALIGNED)
    return model, tokenizer, examples, [row for row in held_out if row.extra["id"].endswith("-0")]


@pytest.fixture(scope="module")
def first_ten(world):
    """The losses of the first ten steps of your training."""
    base, _, examples, _ = world
    losses = skipping(lambda model: list(itertools.islice(page_8.training(model, examples, RECIPE), 10)), "training")
    return losses(copy.deepcopy(base))


def yours_and_ours(model, world):
    """Your table of a model on the harmful rows, and the summary of the project's own judge on all rows."""
    _, tokenizer, _, rows = world
    harmful = [row for row in rows if row.extra["harmful"]]
    prompts = [[encode_prompt(tokenizer, row.prompts[language]) for language in ALIGNED] for row in harmful]
    yours = skipping(page_8.evaluation)(model, tokenizer, prompts, REFUSALS)
    return yours, summarize(evaluate(model, tokenizer, rows, ALIGNED), ALIGNED)


def test_evaluation_of_the_untrained_model_is_the_projects(world):
    """Usually the padding is on the right, so that replies go on after it, or "Sorry" anywhere counts as a refusal."""
    yours, ours = yours_and_ours(world[0], world)
    assert list(yours["rates"]) == pytest.approx(list(ours["strict"].values()), abs=1e-6)
    assert (yours["avg"], yours["var"], yours["pag"]) == pytest.approx(
        (ours["avg"], ours["var"], ours["pag"]), abs=1e-6
    )


def test_the_first_loss_is_the_projects(world, first_ten):
    """Usually the order of the rows, the extractor's seed, the layer, the layout, the shift, or a missing term."""
    assert first_ten[0] == pytest.approx(losses_of_the_project(world, 1)[0], abs=5e-5)


def test_the_first_ten_losses_are_the_projects(world, first_ten):
    """Usually the warm-up, if step 1 differs; from step 2 on `.detach()`, clipping, or what is trained (`freeze`)."""
    assert first_ten == pytest.approx(losses_of_the_project(world, 10), abs=5e-5)


def losses_of_the_project(world, steps):
    model, _, examples, _ = world
    model = copy.deepcopy(model)
    freeze(model, RECIPE.freeze)
    run = loop.Run.start(model, RECIPE)
    order = list(itertools.islice(loop.row_order(len(examples), RECIPE.seed), steps * RECIPE.batch_size))
    examples = list(examples)  # only these rows need a reference
    for i, example in zip(order, loop.with_reference(model, [examples[i] for i in order], RECIPE), strict=True):
        examples[i] = example
    return [figures["loss"].item() for figures in itertools.islice(loop.train(run, examples, RECIPE), steps)]
