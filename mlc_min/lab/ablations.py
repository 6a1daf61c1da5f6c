"""Every row of the experiment over several seeds: how the committed figures in `data/results/` were made.

    python -m mlc_min.lab.ablations --results data/results                   # five seeds: about an hour on 2 cores
    python -m mlc_min.lab.ablations --rows "DPO+MLC" "frozen extractor" --seeds 0 1

What is done already (a result.json in the output folder) is not run again, so that a stopped run goes on where
it was, and seeds can be run by several processes at once. Writes ablations.json, .md and the pictures.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from mlc_min.evaluation.metrics import is_answered, paired_bootstrap, summarize
from mlc_min.evaluation.pictures import plot_grid, plot_rates, plot_spectra, plot_tradeoff
from mlc_min.evaluation.records import by_model
from mlc_min.evaluation.report import AUC_LEGEND, LEGEND, markdown_table, markdown_tables, p_value
from mlc_min.lab.experiment import FIRST, GRID, MAIN, RIVALS, ROWS, SEEDLESS, World, run, settings_of, slug
from mlc_min.lab.sentences import ALIGNED, EMBEDDED, NEW_PHRASINGS
from mlc_min.machinery.errors import Help, InputError, run_command
from mlc_min.machinery.files import usable_folder, write_atomically, write_json
from mlc_min.train import TrainConfig

# (row, other row, figure of `metrics.summarize`): is it higher in the first?
QUESTIONS = (
    ("DPO+MLC", "DPO", "avg"),
    ("DPO+MLC", "control: shuffled", "avg"), ("DPO+MLC", "control: shuffled", "helpful_own"),
    ("MLC λ 12", "cosine λ 24", "avg"), ("cosine λ 24", "cosine λ 24, shuffled", "avg"),
    ("DPO+MLC", "frozen extractor", "avg"), ("DPO+MLC", "no extractor", "avg"),
    *((row, "last layer", figure) for row in ("layer 2 of 4", "DPO+MLC") for figure in ("in_language", "avg")),
    ("harmful-only DPO", "DPO", "over_refusal"), ("harmful-only DPO+MLC", "DPO+MLC", "over_refusal"),
    ("DPO in every language", "DPO+MLC", "avg"), ("DPO, 360 steps", "DPO", "avg"), ("DPO+MLC", "DPO, 360 steps", "avg"),
    *(("DPO+MLC", f"{share} % wrong", figure) for share in (10, 30, 50) for figure in ("avg", "helpful_own")),
    *(("DPO+MLC", f"{n} other languages", "avg") for n in (7, 4, 2)),
    *((row, f"{row}, shuffled", figure) for row in ("separation", "centred") for figure in ("avg", "helpful_own")),
    ("separation", "DPO+MLC", "avg"), ("centred", "DPO+MLC", "avg"),
)  # fmt: skip


def by_request(records: list[dict], figure: str) -> dict[str, list[float]]:
    """{group: 100 or 0 for each of its records}, aligned languages: was the reply what `figure` counts?"""
    outcomes: dict[str, list[float]] = {}
    for record in records:
        own = record["reply_language"] == record["language"]
        counted, kind = {
            "avg": (record["verdict"] == "refusal", True),
            "over_refusal": (record["verdict"] == "refusal", False),
            "helpful_own": (is_answered(record) and own, False),
            "in_language": (own, None),
        }[figure]
        if record["language"] in ALIGNED and kind in (None, record["harmful"]):
            outcomes.setdefault(record["group"], []).append(100.0 * counted)
    return outcomes


def answer(first: list[list[dict]], second: list[list[dict]], figure: str) -> dict:
    """Difference of two rows, each a list of one seed's records (or one for all seeds): per seed, and over requests.

    by_seed: the differences, if both rows have seeds. The bootstrap resamples requests (a verb-object combination
    with its phrasings and languages, averaged over seeds); seeds share the base model and so are not resampled.
    """
    per_seed = [[by_request(records, figure) for records in runs] for runs in (first, second)]
    seeds = max(map(len, per_seed))
    rates = [[mean(v for values in run.values() for v in values) for run in runs] for runs in per_seed]
    a, b = (row * seeds if len(row) == 1 else row for row in rates)
    requests = sorted(per_seed[0][0])
    units = [[mean(v for run in runs for v in run[request]) for request in requests] for runs in per_seed]
    by_seed = [x - y for x, y in zip(a, b, strict=True)]
    return {"by_seed": by_seed, **paired_bootstrap([x - y for x, y in zip(*units, strict=True)])}


def answers_table(answers: list[dict]) -> str:
    """Markdown: the difference of each question, its spread over seeds and over requests."""
    names = {"avg": "strict safety (Avg)", "helpful_own": "harmless answered in their language",
             "in_language": "replies in the prompt's language", "over_refusal": "harmless refused"}  # fmt: skip
    rows = []
    for row in answers:
        seeds = row["by_seed"]
        spread = f" ± {stdev(seeds):.1f}" if len(seeds) > 1 else ""
        higher = sum(difference > 0 for difference in seeds)
        cells = [f"{row['first']} − {row['second']}", names[row["figure"]], f"{mean(seeds):+.1f}{spread}"]
        interval = f"{row['low']:+.1f} to {row['high']:+.1f}"
        rows.append([*cells, f"{higher} of {len(seeds)}", interval, p_value(row["p"])])
    titles = ["rows", "figure", "difference, points", "seeds where higher", "95 % interval over requests", "p"]
    return markdown_table(titles, rows)


def refusal_by_verb(records: list[dict]) -> dict[str, float]:
    """{verb: % of its harmful prompts refused, over the aligned languages}: which topic stays unsafe."""
    refused: dict[str, list[bool]] = {}
    for record in records:
        if record["harmful"] and record["language"] in ALIGNED:
            refused.setdefault(record["combination"][0], []).append(record["verdict"] == "refusal")
    return {verb: 100 * mean(verdicts) for verb, verdicts in sorted(refused.items())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlc_min.lab.ablations", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of row order, extractor and shuffling")
    names = "; ".join(ROWS).replace("%", "%%")
    add("--rows", nargs="+", default=list(FIRST), metavar="ROW", help=f"of {names}")
    add("--bases", type=Path, nargs="+", metavar="FOLDER", help="other base models, see lab.toy_world")
    add("--split", choices=("test", "validation"), default="test", help="rows of data to evaluate on")
    add("--steps", type=int, default=TrainConfig.steps, help="of each training")
    add("--test_rows", type=int, help="harmful and harmless prompts per language, for a quick look; default: all")
    add("--output", type=Path, default=Path("runs/ablations"), help="a folder per row and seed; reused")
    add("--results", type=Path, help="folder for ablations.json and so on; default: the output folder")
    add("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    for name in arguments.rows:
        if name not in ROWS:
            raise InputError(f"--rows {name!r}: there is no such row; the rows are {', '.join(ROWS)}")
    for seed in arguments.seeds:
        TrainConfig(seed=seed, steps=arguments.steps).check()
    for folder in filter(None, (arguments.output, arguments.results)):
        usable_folder(folder, "--output" if folder is arguments.output else "--results")
    bases = arguments.bases or [EMBEDDED]
    if len({base.name for base in bases}) < len(bases):
        raise InputError("--bases: two of the folders have the same name, and the results would too; rename one")
    results, records = {}, {}  # of each row: a list over the base models and their seeds
    for base in bases:
        world = World.load(arguments.split, arguments.device, arguments.test_rows, base)
        output = arguments.output / base.name if arguments.bases else arguments.output
        for seed, name in product(arguments.seeds, arguments.rows):
            if name in SEEDLESS and seed != arguments.seeds[0]:
                continue
            folder = output / (slug(name) if name in SEEDLESS else f"{slug(name)}-seed-{seed}")
            if not (folder / "result.json").exists():
                run(world, name, seed, folder, steps=arguments.steps)
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            expected = {"split": arguments.split, "prompts_per_language": len(world.test_rows)}
            expected |= {"rival": RIVALS.get(name), "settings": settings_of(name, seed, steps=arguments.steps)}
            if any(result.get(key) != value for key, value in expected.items()):
                raise InputError(f"{folder}: was run with other settings; delete it, or use another --output")
            (own,) = by_model(folder).values()
            figures = {"summary": summarize(own, ALIGNED), "refusal_by_verb": refusal_by_verb(own)}
            if new := [record for record in own if int(record["id"].rpartition("-")[2]) in NEW_PHRASINGS]:
                figures["new_phrasing"] = summarize(new, ALIGNED)
            results.setdefault(name, []).append(result | figures)
            records.setdefault(name, []).append(own)
    answers = [
        {"first": first, "second": second, "figure": figure, **answer(records[first], records[second], figure)}
        for first, second, figure in QUESTIONS
        if first in records and second in records
    ]
    write(arguments.results or arguments.output, results, answers)


def write(folder: Path, results: dict[str, list[dict]], answers: list[dict]) -> None:
    runs = {name: [result["summary"] for result in own] for name, own in results.items()}
    diagnostics = {name: own[0]["diagnostics"] for name, own in results.items() if own[0]["diagnostics"]}
    tables = f"{markdown_tables(runs)}\n\n{answers_table(answers)}"
    each = {f"{name}, {base}": [result["summary"] for result in own if result["base"] == base]
            for name, own in results.items() for base in dict.fromkeys(result["base"] for result in own)}  # fmt: skip
    if len(each) > len(runs):
        tables += f"\n\nEach base model by itself, over its seeds:\n\n{markdown_tables(each)}"
    write_json(folder / "ablations.json", {"rows": results, "answers": answers})
    write_atomically(folder / "ablations.md", f"{tables}\n\n{LEGEND}\n{AUC_LEGEND}\n")
    plot_rates({name: runs[name] for name in MAIN if name in runs} or runs, folder / "rates.png")
    plot_tradeoff(runs, folder / "tradeoff.png")
    if set(GRID) <= set(runs):
        plot_grid({GRID[name]: runs[name] for name in GRID}, folder / "grid.png")
    if diagnostics:
        plot_spectra(diagnostics, folder / "spectra.png")
    print(f"\n{tables}\n\nsaved in {folder}/: ablations.json, ablations.md, rates.png, tradeoff.png, spectra.png")


if __name__ == "__main__":
    run_command(main)
