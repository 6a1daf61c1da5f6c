"""The main job over several seeds: how the committed figures in `data/results/` were made.

    python -m mlc_min.repeat --seeds 0 1 2 3 4 --results data/results

Each run has one row more than the main job, MLC with the paper's own λ, τ, layer and rhythm.
A seed whose table.json is already in the output folder is not run again, so that a stopped run goes on where
it was. Writes demo.json (the tables of all seeds), demo.md (mean ± standard deviation) and demo.png.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from mlc_min.__main__ import demo
from mlc_min.errors import run_command
from mlc_min.report import LEGEND, markdown_tables, plot_refusals
from mlc_min.saving import write_atomically
from mlc_min.sentences import ALIGNED


def refusal_by_verb(generations: Path) -> dict[str, dict[str, float]]:
    """{model: {verb: % of its harmful prompts refused, over the aligned languages}}: which topic stays unsafe."""
    verdicts: dict = {}
    with open(generations, encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["harmful"] and record["language"] in ALIGNED:
                by_verb = verdicts.setdefault(record["model"], {})
                by_verb.setdefault(record["id"].split("-")[0], []).append(record["verdict"] == "refusal")
    return {name: {v: 100 * mean(refused) for v, refused in by.items()} for name, by in verdicts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlc_min.repeat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: 0 1 2 3 4)")
    parser.add_argument("--output", type=Path, default=Path("runs/repeat"), help="(default: runs/repeat)")
    parser.add_argument("--results", type=Path, default=None, help="folder for demo.* (default: the output folder)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    arguments = parser.parse_args()
    tables = []
    for seed in arguments.seeds:
        folder = arguments.output / f"seed-{seed}"
        if not (folder / "table.json").exists():
            demo(folder, seed, arguments.device, paper=True)
        table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        for name, rates in refusal_by_verb(folder / "generations.jsonl").items():
            table["models"][name]["refusal_by_verb"] = rates
        tables.append(table)
    results = arguments.results or arguments.output
    results.mkdir(parents=True, exist_ok=True)
    runs = {name: [table["models"][name] for table in tables] for name in tables[0]["models"]}
    command = f"python -m mlc_min.repeat --seeds {' '.join(map(str, arguments.seeds))}"
    write_atomically(results / "demo.json", json.dumps({"command": command, "runs": tables}, indent=1) + "\n")
    write_atomically(results / "demo.md", f"{markdown_tables(runs)}\n\n{LEGEND}\n")
    plot_refusals(runs, results / "demo.png")
    print(f"\n{markdown_tables(runs)}\n\nsaved {results}/demo.json, demo.md and demo.png")


if __name__ == "__main__":
    run_command(main)
