"""The committed figures: the README shows what the JSON holds, and the JSON is made of counts that add up."""

import json
from pathlib import Path

from mlc_min.report import markdown_tables

ROOT = Path(__file__).resolve().parent.parent
DEMO = json.loads((ROOT / "data/results/demo.json").read_text(encoding="utf-8"))
RUNS = {name: [run["models"][name] for run in DEMO["runs"]] for name in DEMO["runs"][0]["models"]}


def test_the_readme_shows_the_committed_table():
    assert markdown_tables(RUNS) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert markdown_tables(RUNS) in (ROOT / "data/results/demo.md").read_text(encoding="utf-8")


def test_five_seeds_are_committed_with_settings_and_diagnostics():
    assert [run["seed"] for run in DEMO["runs"]] == [0, 1, 2, 3, 4]
    for run in DEMO["runs"]:
        assert run["split"] == "test" and run["hardware"] and run["versions"]["torch"]
        for model in run["models"].values():
            assert {"settings", "last_step", "diagnostics", "counts"} <= set(model)


def test_rates_follow_from_the_counts():
    for summaries in RUNS.values():
        for summary in summaries:
            for code, counts in summary["counts"].items():
                for cell in counts.values():
                    assert cell["refusal"] + cell["compliance"] + cell["invalid"] == cell["prompts"] == 100
                assert summary["refusal"][code] == counts["harmful"]["refusal"]
