"""How fast, how much memory, against what. Everything is a ratio of jobs run in turn in one process.

    python -m mlc_min.lab.benchmark                             # all parts; about half an hour on 2 CPU cores
    python -m mlc_min.lab.benchmark --parts cost loss           # some
    python -m mlc_min.lab.benchmark --shape qwen2.5-0.5b --rows 2 --parts cost official

Models have random weights, of a real shape; rows are random tokens. Prints tables, and writes benchmark.json,
benchmark.md and, of the part `growth`, growth.png. A part that is run again replaces itself in these files.
"""

import json
import time
from argparse import ArgumentParser
from pathlib import Path

from mlc_min.evaluation.pictures import plot_growth
from mlc_min.evaluation.report import aligned_text, markdown_table
from mlc_min.lab.benchmark import parts
from mlc_min.lab.random_model import SHAPES
from mlc_min.machinery.errors import Help, InputError, run_command
from mlc_min.machinery.files import usable_folder, write_atomically, write_json
from mlc_min.machinery.log import git_commit, hardware, versions
from mlc_min.machinery.models import pick_device

PARTS = {
    "cost": (parts.cost, "Cost of MLC: a DPO+MLC step over a DPO step"),
    "official": (parts.official, "Against the official layout"),
    "trl": (parts.trl, "Against TRL's DPOTrainer"),
    "growth": (parts.growth, "Growth of the MLC pass"),
    "loss": (parts.loss_alone, "The loss alone"),
    "evaluation": (parts.evaluation, "Evaluation: generated tokens a second"),
    "utilisation": (parts.utilisation, "Utilisation of a training step"),
    "reading": (parts.reading, "Reading rows"),
}
SHAPELESS = ("evaluation", "reading")  # they have no model of the shape that is asked for


def main() -> None:
    parser = ArgumentParser(prog="python -m mlc_min.lab.benchmark", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--shape", choices=SHAPES, default="small", help="of the model, where the part does not say otherwise")
    add("--rows", type=int, default=4, help="rows of a batch, each in ten languages")
    add("--repeats", type=int, default=5, help="rounds after the warm-up")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--output", type=Path, default=Path("runs/benchmark"), help="folder for the results")
    arguments = parser.parse_args()
    shape, rows, repeats, folder = arguments.shape, arguments.rows, arguments.repeats, arguments.output
    if repeats < 1 or rows < 1:
        raise InputError("--repeats and --rows must be at least 1")
    device, path = pick_device(arguments.device), folder / "benchmark.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise InputError(f"{path}: not JSON; delete it, or use another --output") from None
    usable_folder(folder, "--output")
    for name in arguments.parts:
        measure, title = PARTS[name]
        print(f"\n{title}", flush=True)
        start = time.perf_counter()
        measured = measure(shape, rows, repeats, device)
        settings = f"--parts {name} --shape {shape} --rows {rows} --repeats {repeats}"
        key = name if shape == "small" or name in SHAPELESS else f"{name}, {shape}"
        results[key] = {
            "title": title if name in SHAPELESS else f"{title}, {shape}", **measured,
            "command": f"python -m mlc_min.lab.benchmark {settings}", "seconds": round(time.perf_counter() - start),
            "hardware": hardware(device), "versions": versions(), "commit": git_commit(),
        }  # fmt: skip
        print(table_text(results[key]), flush=True)
        write_json(path, results)
        write_atomically(folder / "benchmark.md", "\n\n".join(map(section, results.values())) + "\n")
        if "curves" in measured:
            plot_growth(measured["curves"], folder / "growth.png")
    files = "benchmark.json, benchmark.md" + (", growth.png" if "growth" in arguments.parts else "")
    print(f"\nsaved in {folder}/: {files}")


def table_text(result: dict) -> str:
    """One part as plain text."""
    lines = [aligned_text([result["columns"], *result["rows"]])] if result["rows"] else []
    return "\n".join(lines + [f"{word}: {result[word]}" for word in ("goal", "note") if word in result])


def section(result: dict) -> str:
    """One part as Markdown."""
    table = markdown_table(result["columns"], result["rows"]) if result["rows"] else ""
    goal = f"Goal: {result['goal']}." if "goal" in result else ""
    how = f"`{result['command']}`, {result['seconds']} s, {result['hardware']}, torch {result['versions']['torch']}"
    return "\n\n".join(filter(None, [f"### {result['title']}", table, goal, result.get("note"), how]))


if __name__ == "__main__":
    run_command(main)
