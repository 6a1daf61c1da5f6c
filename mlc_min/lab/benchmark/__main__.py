"""How fast, how much memory, against what. Everything is a ratio of jobs run in turn in one process.

    python -m mlc_min.lab.benchmark                             # all parts; about half an hour on 2 CPU cores
    python -m mlc_min.lab.benchmark --parts cost loss           # some
    python -m mlc_min.lab.benchmark --shape qwen2.5-0.5b --rows 2 --parts cost official

Models have random weights, of a real shape; rows are random tokens. Prints tables, and writes benchmark.json,
benchmark.md and, of the part `growth`, growth.png. A part that is run again replaces itself in these files.
"""

import argparse
import json
import time
from pathlib import Path

from mlc_min.evaluation.pictures import plot_growth
from mlc_min.evaluation.report import aligned_text, markdown_table
from mlc_min.lab.benchmark import parts
from mlc_min.lab.benchmark.against_trl import trl
from mlc_min.lab.random_model import SHAPES
from mlc_min.machinery.errors import Help, InputError, run_command
from mlc_min.machinery.files import usable_folder, write_atomically, write_json
from mlc_min.machinery.log import git_commit, hardware, versions
from mlc_min.machinery.models import pick_device

PARTS = {
    "cost": (parts.cost, "Cost of MLC: a DPO+MLC step over a DPO step"),
    "official": (parts.official, "Against the official layout"),
    "trl": (trl, "Against TRL's DPOTrainer"),
    "growth": (parts.growth, "Growth of the MLC pass"),
    "loss": (parts.loss_alone, "The loss alone"),
    "evaluation": (parts.evaluation, "Evaluation: generated tokens a second"),
    "utilisation": (parts.utilisation, "Utilisation of a training step"),
    "reading": (parts.reading, "Reading rows"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlc_min.lab.benchmark", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--shape", choices=SHAPES, default="small", help="of the model, where the part does not say otherwise")
    add("--rows", type=int, default=4, help="rows of a batch, each in ten languages")
    add("--repeats", type=int, default=5, help="rounds after the warm-up")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--output", type=Path, default=Path("runs/benchmark"), help="folder for the results")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.rows < 1:
        raise InputError("--repeats and --rows must be at least 1")
    device = pick_device(arguments.device)
    path = arguments.output / "benchmark.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise InputError(f"{path}: not JSON; delete it, or use another --output") from None
    usable_folder(arguments.output, "--output")
    for name in arguments.parts:
        measure, title = PARTS[name]
        shapeless = name in ("evaluation", "reading")  # they have no model of that shape
        key = name if arguments.shape == "small" or shapeless else f"{name}, {arguments.shape}"
        command = f"python -m mlc_min.lab.benchmark --parts {name} --shape {arguments.shape} --rows {arguments.rows}"
        print(f"\n{title}", flush=True)
        start = time.perf_counter()
        measured = measure(arguments.shape, arguments.rows, arguments.repeats, device)
        results[key] = {
            "title": title if shapeless else f"{title}, {arguments.shape}", **measured,
            "command": f"{command} --repeats {arguments.repeats}",
            "seconds": round(time.perf_counter() - start), "hardware": hardware(device), "versions": versions(),
            "commit": git_commit(),
        }  # fmt: skip
        print(table_text(results[key]), flush=True)
        write_json(path, results)
        write_atomically(arguments.output / "benchmark.md", "\n\n".join(map(section, results.values())) + "\n")
        if "curves" in measured:
            plot_growth(measured["curves"], arguments.output / "growth.png")
    files = "benchmark.json, benchmark.md" + (", growth.png" if "growth" in arguments.parts else "")
    print(f"\nsaved in {arguments.output}/: {files}")


def table_text(result: dict) -> str:
    lines = [aligned_text([result["columns"], *result["rows"]])] if result["rows"] else []
    return "\n".join(lines + [f"{word}: {result[word]}" for word in ("goal", "note") if word in result])


def section(result: dict) -> str:
    """One part as Markdown."""
    text = [f"### {result['title']}", *([markdown_table(result["columns"], result["rows"])] if result["rows"] else [])]
    text += [f"Goal: {result['goal']}."] if "goal" in result else []
    text += [result["note"]] if "note" in result else []
    threads = f"torch {result['versions']['torch']}"
    return "\n\n".join([*text, f"`{result['command']}`, {result['seconds']} s, {result['hardware']}, {threads}"])


if __name__ == "__main__":
    run_command(main)
