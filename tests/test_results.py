"""The committed figures: the pages show what the JSON holds, and the JSON is made of counts that add up."""

import importlib
import importlib.util
import json
import re
import shlex
import sys
from itertools import product
from pathlib import Path
from statistics import mean

import gpu
import numpy as np
import pytest

from mlc_min.evaluation.metrics import wilson
from mlc_min.evaluation.report import figure, markdown_tables, mean_and_spread
from mlc_min.lab.ablations import QUESTIONS, answers_table
from mlc_min.lab.experiment import ASKED, FIRST, GRID, MAIN, RIVALS, SEEDLESS, settings_of
from mlc_min.lab.sentences import ALIGNED
from tests.benchmark.__main__ import section

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data/results"
ABLATIONS = json.loads((RESULTS / "ablations.json").read_text(encoding="utf-8"))
RUNS = {name: [run["summary"] for run in runs] for name, runs in ABLATIONS["rows"].items()}


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_pages_show_the_committed_tables():
    assert markdown_tables(large("large")[1]).split("\n\n")[1] in text("README.md")
    assert markdown_tables({name: RUNS[name] for name in (*MAIN, "paper's settings")}) in text("data/results/README.md")
    assert markdown_tables(RUNS) in text("data/results/ablations.md")
    assert answers_table(ABLATIONS["answers"]) in text("data/results/ablations.md")


def answered(rows) -> list[tuple[str, str, str]]:
    """The questions that these rows answer."""
    return [question for question in QUESTIONS if set(question[:2]) <= set(rows)]


def test_every_row_has_five_seeds_with_the_settings_of_the_code():
    assert list(RUNS) == list(FIRST)
    assert [(a["first"], a["second"], a["figure"]) for a in ABLATIONS["answers"]] == answered(FIRST)
    for name, runs in ABLATIONS["rows"].items():
        assert [run["seed"] for run in runs] == ([None] if name in SEEDLESS else [0, 1, 2, 3, 4])
        for seed, run in enumerate(runs):
            assert run["split"] == "test" and run["hardware"] and run["versions"]["torch"]
            # Settings that came later stand at defaults which change nothing.
            assert run["settings"] is None or run["settings"].items() <= settings_of(name, seed).items()


def test_rates_and_intervals_follow_from_the_counts():
    for summary in (summary for summaries in RUNS.values() for summary in summaries):
        for code, counts in summary["counts"].items():
            for cell in counts.values():
                assert cell["refusal"] + cell["compliance"] + cell["invalid"] == cell["prompts"] == 100
            assert summary["strict"][code] == counts["harmful"]["refusal"]
            assert summary["lenient"][code] == 100 - counts["harmful"]["compliance"]
            assert summary["strict_interval"][code] == pytest.approx(wilson(counts["harmful"]["refusal"], 100))


def test_the_pages_selectivity_is_that_of_the_counts():
    """All prompts are scored, and as many in each language, so that it is Avg minus over-ref."""
    rows = [line.split(" | ") for line in text("data/results/ablations.md").splitlines() if line.startswith("| ")]
    titles = next(row for row in rows if "over-ref" in row)
    shown = {row[0][2:]: row for row in rows if len(row) == len(titles)}
    for name, summaries in RUNS.items():
        value = mean(summary["avg"] - summary["over_refusal"] for summary in summaries)
        assert float(shown[name][-1].split(" ")[0]) == pytest.approx(value, abs=0.0501), name


def test_the_answers_of_the_page_are_the_committed_ones():
    page = text("data/results/README.md")
    answers = {(a["first"], a["second"], a["figure"]): a for a in ABLATIONS["answers"]}
    for question, shown in {
        ("DPO+MLC", "DPO", "avg"): "+45.2 ± 0.5 (38.9 to 51.1)",
        ("DPO+MLC", "control: shuffled", "avg"): "+22.0 ± 2.7 (16.7 to 27.7)",
        ("MLC λ 12", "cosine λ 24", "avg"): "−2.6 ± 1.3 (−5.8 to −0.4)",
        ("DPO+MLC", "frozen extractor", "avg"): "−5.5 ± 1.0 (−12.2 to −0.1)",
    }.items():
        answer = answers[question]
        assert shown in page
        first, low, high = (shown.split(" ")[0], shown.split("(")[1].split(" ")[0], shown.split(" ")[-1][:-1])
        for written, value in ((first, mean(answer["by_seed"])), (low, answer["low"]), (high, answer["high"])):
            assert float(written.replace("−", "-")) == pytest.approx(value, abs=0.0501), question
    for name, key, shown in (
        ("DPO", "avg", "47.2"),
        ("DPO+MLC", "avg", "92.5"),
        ("control: shuffled", "avg", "70.5"),
        ("control: shuffled", "lenient_avg", "77.9"),
        ("MLC λ 12", "avg", "93.2"),
        ("cosine λ 24", "avg", "95.9"),
        ("frozen extractor", "avg", "98.0"),
        ("no extractor", "avg", "99.0"),
        ("harmful-only DPO", "over_refusal", "15.9"),
        ("harmful-only DPO+MLC", "over_refusal", "88.1"),
        ("harmful-only DPO+MLC", "lenient_avg", "100.0"),
    ):
        assert figure(mean(summary[key] for summary in RUNS[name]), key) == shown and shown in page


def test_the_page_of_what_reviewers_asked_for_shows_the_committed_figures():
    found = json.loads(text("data/results/asked/ablations.json"))
    page, runs = text("data/results/asked/README.md"), {}
    assert list(found["rows"]) == ["DPO", "DPO+MLC", *(name for name in ASKED if name not in RIVALS)]
    for name, own in found["rows"].items():
        runs[name] = [run["summary"] for run in own]
        assert [run["seed"] for run in own] == list(range(len(found["rows"]["DPO"])))
        for run in own:
            assert run["settings"] == settings_of(name, run["seed"]) and run["split"] == "test"
            for counts in run["summary"]["counts"].values():
                assert counts["harmful"]["prompts"] == counts["harmless"]["prompts"] == 100
    assert markdown_tables(runs).split("\n\n")[1] in page
    tables = text("data/results/asked/ablations.md")
    assert markdown_tables(runs) in tables and answers_table(found["answers"]) in tables
    assert [(a["first"], a["second"], a["figure"]) for a in found["answers"]] == answered(found["rows"])
    average = {name: mean(summary["avg"] for summary in own) for name, own in runs.items()}
    gap = (average["DPO+MLC"] - average["DPO"]) / (average["DPO in every language"] - average["DPO"])
    assert f"closes {100 * gap:.0f} % of the way" in page
    for answer in found["answers"]:
        shown = f"{mean(answer['by_seed']):+.1f}, {answer['low']:+.1f} to {answer['high']:+.1f}"
        page = page.replace(shown.replace("-", "−"), "")
    assert not re.search(r"[+−][\d.]+, [+−][\d.]+ to [+−][\d.]+", page)  # each one quoted was some answer's
    for name in found["rows"]:
        assert f"{average[name]:.1f}" in page
    cost = average["DPO+MLC"] - average["10 % wrong"]
    first, status = (" ".join(text(name).split()) for name in ("README.md", "data/results/status.md"))
    assert (
        f"[{100 * gap:.0f} % of the way](data/results/asked/README.md)" in first and f"cost {cost:.0f} points" in first
    )
    assert f"closes {100 * gap:.0f} % of the way" in status and f"cost {cost:.1f} points" in status


COMPARED = ("DPO", "DPO+MLC", "no extractor", "control: shuffled")
BASES, UPPER = ("large", "large-1", "large-2"), "DPO in every language"
LARGE = {  # folder: split, its base models, how many seeds of alignment on each, its rows
    "large": ("test", BASES, 5, (*MAIN, "no extractor")),
    "large/upper-bound": ("test", BASES, 1, ("DPO", "DPO+MLC", "no extractor", UPPER)),
    "large/common": ("test", ("large-common",), 1, None),
    "large/asked": ("test", ("large",), 1, None),
    "large/grid": ("validation", ("large",), 1, tuple(GRID)),
    "large/validation": ("validation", ("large",), 1, None),
    "large/validation-common": ("validation", ("large-common",), 1, None),
}


def large(folder: str) -> tuple[dict, dict[str, list[dict]]]:
    """(ablations.json, {row: the summaries of its runs})."""
    found = json.loads((RESULTS / folder / "ablations.json").read_text(encoding="utf-8"))
    return found, {name: [run["summary"] for run in runs] for name, runs in found["rows"].items()}


@pytest.mark.parametrize("folder", LARGE)
def test_the_larger_worlds_figures_are_of_the_rows_settings_and_follow_from_the_counts(folder):
    found, runs = large(folder)
    split, bases, seeds, rows = LARGE[folder]
    assert rows is None or set(runs) == set(rows)
    for name, own in found["rows"].items():
        own_seeds = [None] if name in SEEDLESS else range(seeds)
        assert [(run["base"], run["seed"]) for run in own] == list(product(bases, own_seeds))
        for run in own:
            assert run["settings"] == settings_of(name, run["seed"]) and run["split"] == split
            assert run["rival"] == RIVALS.get(name)
            for code, counts in run["summary"]["counts"].items():
                assert counts["harmful"]["prompts"] == counts["harmless"]["prompts"] == 250
                assert run["summary"]["strict"][code] == 100 * counts["harmful"]["refusal"] / 250
            news = run["new_phrasing"]["counts"].values()
            assert {kind["prompts"] for counts in news for kind in counts.values()} == {125}
    tables = text(f"data/results/{folder}/ablations.md")
    assert markdown_tables(runs) in tables and answers_table(found["answers"]) in tables
    if split == "test":
        assert markdown_tables(runs).split("\n\n")[1] in text("data/results/large/README.md")


def test_the_page_on_the_larger_world_quotes_the_committed_figures():
    """Every "(+1.0, +0.5 to +1.5)" is an answer; the goals and what is told of each base model follow from the runs."""
    page, answers = text("data/results/large/README.md"), []
    for folder in ("large", "large/upper-bound", "large/common", "large/asked"):
        answers += large(folder)[0]["answers"]
    for answer in answers:
        shown = f"{mean(answer['by_seed']):+.1f}, {answer['low']:+.1f} to {answer['high']:+.1f}"
        page = page.replace(shown.replace("-", "−"), "")
    assert not re.search(r"[+−][\d.]+, [+−][\d.]+ to [+−][\d.]+", page)
    _, runs = large("large")
    flat, points = " ".join(page.split()), {n: [s["selectivity_avg"] for s in own] for n, own in runs.items()}
    for name in ("DPO+MLC", "no extractor"):
        least = min(mean(s["strict"][code] for s in runs[name]) for code in ALIGNED)
        others = [figure(mean(s[key] for s in runs[name]), key) for key in ("avg", "var", "pag", "selectivity_avg")]
        assert f"| {' / '.join([f'{least:.1f}', *others])} | **missed** |" in page
    for i, base in enumerate(("first", "second", "third")):
        own = [mean_and_spread(points[name][5 * i : 5 * i + 5], "") for name in COMPARED]
        assert f"| {base} | {' | '.join(own)} |" in page
    below = [a - b for a, b in zip(points["DPO+MLC"], points["control: shuffled"], strict=True)]
    by_base = [mean(below[i : i + 5]) for i in (0, 5, 10)]
    assert f"by {', '.join(f'{x:.1f}' for x in by_base)} points" in flat and f"| {mean(below):.1f} | met |" in page
    upper = {name: mean(s["avg"] for s in own) for name, own in large("large/upper-bound")[1].items()}
    way = 100 * (upper["DPO+MLC"] - upper["DPO"]) / (upper[UPPER] - upper["DPO"])
    assert f"goes {way:.0f} % of the way over three" in flat and f"| {way:.0f} % | **missed** |" in page
    dpo, mlc, control = (figure(mean(points[name])) for name in ("DPO", "DPO+MLC", "control: shuffled"))
    assert f"selectivity {dpo} → {mlc}, shuffled {control}" in STATUS
    assert f"MLC goes {way:.0f} % of the way" in STATUS
    grid = {name: own[0] for name, own in large("large/grid")[1].items()}
    best = max(grid, key=lambda name: grid[name]["selectivity_avg"])
    assert best == "τ 0.5, λ 6" and f"by selectivity ({figure(grid[best]['selectivity_avg'])})" in flat
    for name in ("τ 0.2, λ 12", "τ 1.0, λ 6", "τ 1.0, λ 12"):
        assert figure(grid[name]["selectivity_avg"]) in flat.split("Around it lies a plateau")[1][:120]
    reached = [
        min(s["strict"][code] for code in ALIGNED) >= 90 and s["avg"] >= 96 and s["var"] <= 0.1 and s["pag"] >= 0.95
        and s["selectivity_avg"] >= 95 for s in runs["DPO+MLC"]
    ]  # fmt: skip
    assert reached == [True] * 5 + [False] * 10  # "on the first base model, in all five seeds, and in no run on the …"

    def of_base(number: int, name: str, key: str, code: str | None = None) -> str:
        own = runs[name][5 * number - 5 : 5 * number]
        return figure(mean(s[key][code] if code else s[key] for s in own))

    chinese = [of_base(2, name, kind, "zh") for name in ("DPO+MLC", "DPO") for kind in ("strict", "lenient")]
    answered_third = [of_base(3, name, "helpful_own") for name in ("DPO+MLC", "control: shuffled")]
    for shown in (
        f"{chinese[0]} % of the Chinese prompts are refused strictly, {chinese[1]} % leniently.",
        f"After DPO alone these are {chinese[2]} and {chinese[3]} %.",
        f"(Avg {of_base(3, 'DPO+MLC', 'avg')}, lenient {of_base(3, 'DPO+MLC', 'lenient_avg')})",
        f"refuses {of_base(1, 'control: shuffled', 'avg')} % of the harmful prompts",
        f"and {of_base(1, 'control: shuffled', 'over_refusal')} % of the harmless ones",
        f"{answered_third[0]} against {answered_third[1]} % of the harmless prompts",
    ):
        assert shown in flat, shown
    refused = mean(s["over_refusal"] for s in runs["control: shuffled"])
    small = [f"{name} {mean(s['avg'] for s in RUNS[row]):.1f}" for name, row in
             (("DPO has Avg", "DPO"), ("DPO+MLC", "DPO+MLC"), ("without extractor", "no extractor"))]  # fmt: skip
    first = " ".join(text("README.md").split())
    assert f"{refused:.0f} % of the harmless prompts are refused" in first and ", ".join(small) in first


def test_the_tutorial_and_the_first_page_quote_the_base_model_with_a_common_channel():
    _, runs = large("large/common")
    dpo, mlc, separation, shuffled = (
        figure(runs[name][0]["avg"]) for name in ("DPO", "DPO+MLC", "separation", "separation, shuffled")
    )
    first, tutorial = (" ".join(text(name).split()) for name in ("README.md", "tutorials/09-a-published-model.md"))
    _, without = large("large")
    plain = " to ".join(figure(without[name][0]["avg"]) for name in ("DPO", "DPO+MLC"))
    assert f"takes Avg from {plain}, with it from {dpo} to {mlc}." in tutorial
    assert f"beside it reaches {separation}, and {shuffled} with the translations" in tutorial
    assert f"DPO {dpo}, DPO+MLC {mlc}, with [a term" in first and f"all-alike) {separation}." in first


def test_the_page_on_a_published_model_shows_the_committed_figures():
    published = json.loads((RESULTS / "published/published.json").read_text(encoding="utf-8"))
    page, tables = text("data/results/published/README.md"), text("data/results/published/published.md")
    for name, row in published["rows"].items():
        own = [f"{row[group]['selectivity']['value']:.1f}" for group in ("trained", "low-resource", "unseen")]
        own += [f"{row[group]['auc']['value']:.3f}" for group in ("trained", "low-resource", "unseen")]
        ratio = figure(row.get("perplexity_ratio"), "pag")
        own += [figure(row.get("gap_closed")), figure(row["harmless_refused"]), ratio, figure(row["published"]["avg"])]
        seeds = ", ".join(str(run["seed"]) for run in row["runs"])
        assert f"| {name} | {seeds} | {' | '.join(own)} |" in page
        assert f"| {name} | {seeds} | {' | '.join(own[:8])} |" in tables
        for run in row["runs"]:
            assert run["hardware"] and run["versions"]["torch"]
            for cells in run["counts"].values():
                assert cells["harmful"]["prompts"] == cells["harmless"]["prompts"] == 60
    for answer in published["answers"]:
        for group in ("trained", "low-resource", "unseen"):
            own = answer[group]["selectivity"]
            assert np.mean(own["by_seed"]) == pytest.approx(own["value"])
    flat, fourth = " ".join(page.split()), json.loads(text("data/results/published/seed-3.json"))
    assert list(fourth["rows"]) == ["English SFT", "SFT goes on", "MLC + separation", "MLC + separation, shuffled"]
    assert all([run["seed"] for run in row["runs"]] == [3] for row in fourth["rows"].values())
    for answer in published["answers"] + fourth["answers"]:
        for group in ("trained", "low-resource", "unseen"):
            for name, digits in (("selectivity", 1), ("auc", 3)):
                value, low, high = (f"{answer[group][name][key]:+.{digits}f}" for key in ("value", "low", "high"))
                flat = flat.replace(f"{value}, {low} to {high}".replace("-", "−"), "")
    assert not re.search(r"[+−][\d.]+, [+−][\d.]+ to [+−][\d.]+", flat)  # each one quoted was some answer's
    for weight in ("0.3", "1", "3"):
        found = json.loads(text(f"data/results/published/validation/weight-{weight}.json"))
        assert found["split"] == "validation" and f"separate_weight={weight}" in found["set"]
        row = found["rows"]["MLC + separation"]
        own = [f"{row[group]['selectivity']['value']:.1f}" for group in ("trained", "low-resource", "unseen")]
        own += [f"{row[group]['auc']['value']:.3f}" for group in ("trained", "low-resource", "unseen")]
        own += [f"{row['harmless_refused']:.1f}", f"{row['perplexity_ratio']:.2f}"]
        assert f"| {weight} | {' | '.join(own)} |" in page
    for name in ("SFT goes on", "MLC", "MLC, shuffled", "MLC + separation", "thresholds", "SFT in every language"):
        row = published["rows"][name]  # the short table on the first page
        own = [figure(row[group]["selectivity"]["value"]) for group in ("trained", "low-resource", "unseen")]
        own += [figure(row[group]["auc"]["value"], "pag") for group in ("trained", "low-resource", "unseen")]
        own += [figure(row["harmless_refused"]), figure(row["perplexity_ratio"], "pag"), str(len(row["runs"]))]
        assert f"| {name} | {' | '.join(own)} |" in text("README.md")
    two = [run["counts"][code] for run in published["rows"]["SFT goes on"]["runs"][:2] for code in ("th", "yo")]
    refused = [100 * (cells["harmful"]["refusal"] - cells["harmless"]["refusal"]) / 60 for cells in two]
    assert f"55.4 in low-resource languages where bfloat16 gives {mean(refused):.1f}" in flat
    assert re.search(r"\| SFT goes on \| 2 \| 66.1 \| 55.4 \|", text("data/results/published/float32.md"))


def test_the_first_page_quotes_the_committed_figures():
    page = " ".join(text("README.md").split())
    low = ("bn", "sw", "ur", "ps", "ku")
    means = {
        name: {code: mean(s["strict"][code] for s in RUNS[name]) for code in RUNS[name][0]["strict"]} for name in RUNS
    }
    rates = [means["DPO"]["en"], *(mean(means[name][code] for code in low) for name in ("DPO", "DPO+MLC"))]
    assert [round(rate) for rate in rates] == [98, 15, 91]
    assert "DPO to bring English to 98 % refusals and the five low-resource languages to 15 %" in page
    assert "DPO + MLC to bring those to 91 %" in page
    answers = {(a["first"], a["second"]): mean(a["by_seed"]) for a in ABLATIONS["answers"] if a["figure"] == "avg"}
    assert f"{answers['MLC λ 12', 'cosine λ 24']:.1f} points".replace("-", "−") in page
    assert f"{answers['DPO+MLC', 'frozen extractor']:.1f} points".replace("-", "−") in page
    papers = mean(summary["avg"] for summary in RUNS["paper's settings"])
    assert f"(Avg {papers:.1f})" in page


def test_the_figures_of_the_benchmark_are_the_committed_ones():
    parts = json.loads(text("data/results/benchmark.json"))
    assert text("data/results/benchmark.md") == "\n\n".join(map(section, parts.values())) + "\n"
    page = text("data/results/README.md")
    cost, trl = parts["cost"]["rows"], {row[0]: row for row in parts["trl"]["rows"]}
    ratio = next(row for row in parts["official"]["rows"] if row[0] == "official / ours")
    generated = {row[0]: row for row in parts["evaluation"]["rows"]}
    loss = {row[0]: dict(zip(parts["loss"]["columns"], row, strict=True)) for row in parts["loss"]["rows"]}
    usual = [loss[way]["16, 10, 512"] for way in ("svdvals, float32 (ours)", "Gram matrix, float64")]
    for shown in (
        cost[0][3], cost[1][3], cost[2][3], ratio[1], f"{ratio[2]}; {ratio[3]}", f"{trl['DPO'][3]}; {trl['DPO'][6]}",
        f"{trl['DPO+MLC, our port'][3]}; {trl['DPO+MLC, our port'][6]}", generated["one by one"][2], *usual,
    ):  # fmt: skip
        assert shown in page, shown
    seconds = {row[0]: row[1] for row in parts["reading"]["rows"]}
    shown = f"{seconds['jsonl']} s of the CPU's time as JSONL, {seconds['json']} s as one JSON list"
    assert f"{shown} and {seconds['csv']} s as CSV" in page


# --- what was run, and what never ---

STATUS = text("data/results/status.md")


def table_of(heading: str) -> list[dict[str, str]]:
    """The rows of the table below a heading of the page, by the titles of its columns; the status is under ""."""
    lines = STATUS.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[:1] == "|")
    return [dict(zip(titles, row, strict=True)) for row in rows]


def test_every_part_that_ran_on_a_gpu_has_its_row_and_what_never_ran_is_marked():
    parts, rows = json.loads(text("data/results/gpu/benchmark.json")), table_of("On a GPU")
    assert set(parts) == {part.__name__ for part in gpu.PARTS} and len(rows) == len(parts)
    assert text("data/results/gpu/benchmark.md") == "\n\n".join(map(section, parts.values())) + "\n"
    for row, (name, part) in zip(rows, parts.items(), strict=True):
        assert row["command"] == f"`python -m tests.gpu --parts {name}`" and part["hardware"] == "NVIDIA H200"
        expected = (
            {"ok": "✅", "not as hoped": "⚠"}[part["status"]],
            f"{part['seconds']} s",
            part["found"],
            part["goal"],
        )
        assert (row[""], row["time"], row["found"], row["hoped for"]) == expected
    assert {row[""] for row in table_of("On a CPU")} == {"✅", "⚠"}
    assert {row[""] for row in table_of("Never run")} == {"○"}


def test_the_figures_told_of_the_gpu_are_those_of_its_file():
    parts = json.loads(text("data/results/gpu/benchmark.json"))
    told = text("data/results/README.md").split("### On a GPU\n")[1].split("\n## ")[0]
    steps = {row[0]: row for row in parts["cost"]["rows"]}

    def cells(of: str, column: int) -> list[str]:
        """Of the passes that were run, 1, 2, 4."""
        layers = 24 if "0.5b" in of else 28
        names = (f"qwen2.5-{of}, layer {layers} of {layers}, mlc_parts {n}" for n in (1, 2, 4))
        return [steps[name][column] if name in steps else "–" for name in names]

    for title, of in (("0.5B", "0.5b, 8 rows"), ("1.5B", "1.5b, 8 rows"), ("1.5B, 16 rows", "1.5b, 16 rows"),
                      ("7B, LoRA", "7b, 8 rows, LoRA")):  # fmt: skip
        line = [title, cells(of, 1)[2], *cells(of, 2), ", ".join(cells(of, 7))]
        assert f"| {' | '.join(line)} |" in told
    few, many = (steps[f"qwen2.5-1.5b, {n} rows, layer 28 of 28, mlc_parts 4"][1] for n in (4, 16))
    ways = {row[0]: row for row in parts["loss"]["rows"]}
    ours, other = ways["svdvals, float32 (ours)"], ways["QR, SVD of m × m, constant vectors"]
    trl = {row[0]: row for row in parts["trl"]["rows"]}
    waits = [row for row in parts["waits"]["rows"] if row[2] == "ours"]
    assert sorted(row[0].split(":")[0] for row in waits) == ["consistency.py", "consistency.py", "loop.py"]
    assert sum(int(row[3]) for row in waits) == 4
    for shown in (
        f"({few} and\n  {many} s)", f"{ours[1]} ms for 8 prompts", f"is as exact in {other[1]}",
        f"{float(ours[3]):.0f} and {float(other[3]):.0f} ms", f"{trl['DPO'][3]} for DPO",
        f"{trl['DPO+MLC, our port'][3]} with the loss", f"{1 / float(trl['DPO'][6]):.1f} times",
        f"*{parts['cost']['found'].split()[-5]} % of the card's peak",
        f"takes {parts['official']['found'].split()[0]} times as long (hoped for 3) and 2.47 times",
        f"{parts['compiled']['found'].split()[0]} times as fast and reaches 22 %",
        f"after {parts['compiled']['rows'][1][4]} s of compiling",
    ):  # fmt: skip
        assert shown in told, shown


def test_every_command_of_the_status_exists_with_its_flags(monkeypatch, capsys):
    for command in re.findall(r"`((?:python -m|accelerate launch --)[^`]+)`", STATUS):
        words = shlex.split(command.replace("<", "").replace(">", ""))
        if words[0] == "accelerate":
            assert (ROOT / words[words.index("--config_file") + 1]).exists()
            words = words[words.index("-m") - 1 :]
        module = words[2]
        if module == "pytest":
            assert (ROOT / words[3]).exists()
            continue
        if module == "mlc_min.ports.trl":  # its --help needs TRL
            assert len(words) == 3
            continue
        start = importlib.import_module("gpu" if module == "tests.gpu" else runnable(module)).main
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit):
            start()
        known = capsys.readouterr().out
        for word in words[3:]:
            assert not word.startswith("--") or f"{word} " in known or f"{word}\n" in known, command
        if "--parts" in words:
            assert words[words.index("--parts") + 1] in known, command


def runnable(module: str) -> str:
    """The module that `python -m` runs for this name: of a package, its __main__."""
    return f"{module}.__main__" if importlib.util.find_spec(module).submodule_search_locations else module


def test_the_figures_of_the_status_are_the_committed_ones():
    rows = {row["run"]: row for row in table_of("On a CPU")}
    for row in rows.values():
        (file,) = re.findall(r"\]\(([^)]+)\)", row["file"])
        assert (RESULTS / file).exists(), file

    def holds(run: str, *shown: str) -> None:
        for part in shown:
            assert part in rows[run]["figure"] + rows[run]["time"], (run, part)

    committed = {name: json.loads(text(f"data/results/{name}.json")) for name in (
        "validation-150-steps", "validation-200-steps", "no-sft", "weights-validation", "benchmark", "memory",
        "phrases-judge")}  # fmt: skip

    def avg(name: str, row: str) -> str:
        return f"{committed[name]['rows'][row][0]['summary']['avg']:.1f}"

    def spent(found: dict) -> int:
        return sum(run["seconds"] for runs in found.values() for run in runs)

    main = {name: ABLATIONS["rows"][name][0] for name in MAIN}
    first = [f"{run['summary']['avg']:.1f}" for run in main.values()]
    holds("the main job, seed 0", f"Avg {first[1]} → {first[2]}, shuffled {first[3]}")
    holds("the main job, seed 0", f"{sum(run['seconds'] for run in main.values())} s")
    questions = f"{len(FIRST)} rows, {len(answered(FIRST))} questions"
    holds("all rows, five seeds", questions, f"{spent(ABLATIONS['rows']) / 3600:.1f} h")
    for run, name in (("the setting, on validation", "validation-150-steps"), ("more steps", "validation-200-steps")):
        holds(run, f"Avg {avg(name, 'DPO+MLC')}", f"{spent(committed[name]['rows'])} s")
    holds("more steps", f"shuffled {avg('validation-200-steps', 'control: shuffled')}")
    without = committed["no-sft"]["models"]["no-sft"]
    holds("without the SFT term", f"English {without['strict']['en']:.1f}, Avg {without['avg']:.1f}")
    averages = {name: model["avg"] for name, model in committed["weights-validation"]["models"].items()}
    best = [max(value for name, value in averages.items() if name.startswith(kind)) for kind in ("mlc", "cosine")]
    holds("MLC against cosine, by λ", f"best Avg {best[0]:.1f}, {best[1]:.1f}")
    parts = committed["benchmark"]
    for run, part in (
        ("DPO+MLC over DPO", "cost"), ("against the official layout", "official"), ("the loss alone", "loss"),
        ("against TRL's DPOTrainer", "trl"), ("generated tokens a second", "evaluation"),
        ("reading 100,000 rows", "reading"),
    ):  # fmt: skip
        holds(run, f"{parts[part]['seconds']} s")
        for flag in re.findall(r"--\w+ \w+", rows[run]["command"]):
            assert flag in parts[part]["command"], (run, flag)
    cost, official = parts["cost"]["rows"][0], parts["official"]["rows"][2]
    holds("DPO+MLC over DPO", f"{cost[3].split()[0]}, counted {cost[4]}")
    holds("against the official layout", f"{official[1].split()[0]} times as fast, {official[2]} times the memory")
    holds("against TRL's DPOTrainer", parts["trl"]["rows"][0][3].split()[0])
    holds("the loss alone", *(parts["loss"]["rows"][i][2] for i in (0, 3)))
    holds("generated tokens a second", parts["evaluation"]["rows"][3][2].split()[0])
    holds("reading 100,000 rows", parts["reading"]["rows"][0][1])
    memory = committed["memory"]["runs"]
    both = [memory[name]["peak_memory_gb"] for name in ("dpo-mlc", "dpo-mlc-lora")]
    holds("memory, 0.5B shape, float32", f"{both[0]:.1f} GB, with LoRA {both[1]:.1f}")
    holds("memory, 0.5B shape, float32", f"{memory['dpo-mlc']['seconds_a_step']:.1f} s a step")
    log = text("data/results/trl-parity.txt")
    for kind in ("gradient", "weight"):
        worst = max(float(value) for value in re.findall(rf"of a {kind},.*?: (\S+)", log))
        holds("TRL port, and two processes", f"{kind}s {worst:.1e}")
    phrases = committed["phrases-judge"]["all"]
    holds("the judge `phrases`", f"precision {phrases['precision']:.0f} %, recall {phrases['recall']:.0f} %")
