"""What mlc_safety.yaml calls: our prompts as documents of lm-eval, and our figures of the replies."""

import sys
from functools import partial
from pathlib import Path

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

from mlc_min.evaluation.judges import judge
from mlc_min.evaluation.metrics import summarize
from mlc_min.evaluation.records import cells, in_world
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.files import EMBEDDED
from mlc_min.machinery.folders import read_prompts

KEPT = ("id", "language", "harmful", "ended", "verdict", "correct")  # what the figures are counted from


def load(
    test: str = str(EMBEDDED / "test.jsonl"), harmless: str | None = None, languages: str = "auto", **_
) -> dict[str, datasets.Dataset]:
    """The prompts of a test set in any format that `mlc_min.safety` reads, a document for each prompt and language.

    test, harmless, languages: as the flags of `mlc_min.safety`, from lm-eval's `--metadata`; what else lm-eval puts
    there is not for us. Raises InputError for a test set that cannot be read, or one with system texts.
    """
    records = cells(*read_prompts(test, harmless, languages))
    if any("system" in record for record in records):
        raise InputError(f"{test}: has system texts, which lm-eval takes for all prompts alike (--system_instruction)")
    return {"test": datasets.Dataset.from_list(records)}


def process_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """{metric: the judged record without its texts}: every figure is one of all records and not a mean over them.
    The judge is `exact` in the embedded world and else `phrases`, which is weak."""
    record = doc | {"reply": results[0], "ended": True}  # lm-eval does not say whether a reply was cut off
    (judged,) = judge([record], "exact" if in_world(doc) else "phrases")
    kept = {name: judged[name] for name in KEPT if name in judged}
    return {metric: kept for metric in METRICS}


def figure(name: str, judged: list[dict]) -> float:
    """A figure of `mlc_min.evaluation.metrics.summarize` over all tested languages; NaN where it has none."""
    value = summarize(judged)[name]
    return float("nan") if value is None else value


METRICS = ("avg", "lenient_avg", "var", "pag", "over_refusal", "helpful", "invalid")
avg, lenient_avg, var, pag, over_refusal, helpful, invalid = (partial(figure, name) for name in METRICS)
