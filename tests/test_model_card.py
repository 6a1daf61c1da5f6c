"""The card of a trained model: what the Hub's own parser finds in it, before and after an evaluation."""

import json
import os

import pytest
from huggingface_hub import ModelCard, metadata_load

from mlc_min.evaluation.metrics import summarize
from mlc_min.evaluation.model_card import add_results, model_card
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.settings import TrainConfig

RECORD = {"settings": {"lora": 0}, "rows": {"used": 8}, "versions": {"torch": "2"}, "git_commit": "0", "hardware": "x"}


def verdicts() -> list[dict]:
    """One of two harmful prompts refused in English, none in Swahili; and one harmless prompt, answered."""
    rows = [("a", "en", True, "refusal"), ("b", "en", True, "compliance"), ("a", "sw", True, "compliance"),
            ("b", "sw", True, "compliance"), ("c", "en", False, "compliance"),
            ("c", "sw", False, "compliance")]  # fmt: skip
    names = ("id", "language", "harmful", "verdict")
    return [dict(zip(names, row, strict=True)) | {"ended": True, "reply_language": row[1]} for row in rows]


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it: `model`, and `safety` with what generate has written."""
    for name in ("model", "safety"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    folder = tmp_path / "mine"
    (folder / "model/train_config.json").write_text("{}", "utf-8")
    (folder / "model/README.md").write_text(model_card(TrainConfig(output=str(folder)), RECORD, []), "utf-8")
    settings = {
        "model": str(folder / "model"),
        "control": None,
        "test": "sets/MultiJail.csv",
        "harmless": "sets/mild.csv",
    }
    (folder / "safety/run.json").write_text(json.dumps(settings), "utf-8")
    return folder


def test_the_hub_finds_the_library_in_a_new_card(run):
    assert metadata_load(run / "model/README.md") == {"library_name": "transformers"}


def test_the_hubs_own_parser_finds_the_figures_of_the_report_in_the_card(run):
    before = ModelCard.load(run / "model/README.md").text
    assert add_results(run / "safety", summarize(verdicts()), ["phrases"]) == run / "model/README.md"
    card = ModelCard.load(run / "model/README.md")
    assert card.text == before and card.data.model_name == "mine" and card.data.library_name == "transformers"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {
        "avg": 25.0,  # of 50 and 0
        "lenient_avg": 25.0,
        "var": 6.25,  # 0.25² x 100
        "pag": 0.5,  # a: refused in one language only; b: complied with in both
        "over_refusal": 0.0,
        "helpful": 100.0,
        "in_language": 100.0,
        "invalid": 0.0,
        "strict_en": 50.0,
        "strict_sw": 0.0,
        "selectivity_avg": 25.0,
    }  # no language is unseen, so there is no such figure
    (first, *_) = card.data.eval_results
    assert (first.task_type, first.dataset_type, first.dataset_name) == (
        "text-generation",
        "MultiJail",
        "MultiJail.csv",
    )
    assert first.metric_args == {"judge": "phrases"}
    assert first.dataset_args == {"harmless": "mild.csv", "aligned": ["en", "sw"]}
    assert len(metadata_load(run / "model/README.md")["model-index"][0]["results"]) == 1


def test_a_second_report_replaces_the_figures_of_the_same_test_set_and_keeps_those_of_another(run):
    add_results(run / "safety", summarize(verdicts()), ["phrases"])
    add_results(run / "safety", summarize(verdicts()[1:]), ["exact"])
    settings = json.loads((run / "safety/run.json").read_text("utf-8"))
    (run / "safety/run.json").write_text(json.dumps(settings | {"test": "other.jsonl"}), "utf-8")
    add_results(run / "safety", summarize(verdicts()), ["exact"])
    results = ModelCard.load(run / "model/README.md").data.eval_results
    found = [(r.dataset_name, r.metric_value) for r in results if r.metric_type == "strict_en"]
    assert found == [("MultiJail.csv", 0.0), ("other.jsonl", 50.0)]


def test_a_card_is_left_alone_unless_the_evaluation_beside_it_is_of_the_model_as_it_is(run, tmp_path):
    card, settings = run / "model/README.md", json.loads((run / "safety/run.json").read_text("utf-8"))
    before = card.read_text("utf-8")
    for changes in ({"control": "gibberish"}, {"model": str(tmp_path)}, {"model": None}):
        (run / "safety/run.json").write_text(json.dumps(settings | changes), "utf-8")
        assert add_results(run / "safety", summarize(verdicts()), ["phrases"]) is None
    elsewhere = tmp_path / "elsewhere/safety"
    elsewhere.mkdir(parents=True)
    (elsewhere / "run.json").write_text(json.dumps(settings), "utf-8")
    assert add_results(elsewhere, summarize(verdicts()), ["phrases"]) is None
    (run / "safety/run.json").write_text(json.dumps(settings), "utf-8")
    later = (run / "safety/run.json").stat().st_mtime + 60  # trained anew a minute after the replies
    os.utime(run / "model/train_config.json", (later, later))
    assert add_results(run / "safety", summarize(verdicts()), ["phrases"]) is None
    assert card.read_text("utf-8") == before


@pytest.mark.parametrize("metadata", ["a: [", "- a list", "model-index: 7", "model-index:\n- name: x"])
def test_a_card_whose_metadata_somebody_broke_is_refused_in_one_line_and_left_as_it_is(run, metadata):
    card = run / "model/README.md"
    card.write_text(f"---\n{metadata}\n---\n# Mine\n", "utf-8")
    with pytest.raises(InputError, match="its first lines, the metadata, cannot be read") as error:
        add_results(run / "safety", summarize(verdicts()), ["phrases"])
    assert "\n" not in str(error.value)
    assert card.read_text("utf-8") == f"---\n{metadata}\n---\n# Mine\n"
