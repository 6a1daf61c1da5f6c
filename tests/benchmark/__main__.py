"""How fast, how much memory, against what. Everything is a ratio of jobs run in turn in one process.

    python -m tests.benchmark                             # all parts; about half an hour on 2 CPU cores
    python -m tests.benchmark --parts cost loss           # some
    python -m tests.benchmark --shape qwen2.5-0.5b --rows 2 --parts cost official

Models have random weights, of a real shape; rows are random tokens. Prints tables, and writes benchmark.json and
benchmark.md; a part that is run again replaces itself there. On a GPU `python -m tests.gpu` runs these parts and more.
"""

import math
import signal
import sys
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mlc_min.evaluation.records import read_object
from mlc_min.evaluation.report import aligned_text, markdown_table
from mlc_min.lab.random_model import SHAPES
from mlc_min.machinery.errors import SWITCH, Help, InputError, first_line, run_command
from mlc_min.machinery.files import usable_folder, write_atomically, write_json
from mlc_min.machinery.log import git_commit, hardware, versions
from mlc_min.machinery.models import pick_device
from tests.benchmark import parts
from tests.benchmark.measure import fresh

PARTS = (parts.cost, parts.official, parts.trl, parts.loss, parts.evaluation, parts.reading)


def main() -> None:
    run_parts(PARTS, "python -m tests.benchmark", __doc__)


def run_parts(known: tuple[Callable, ...], program: str, description: str, needs_gpu: bool = False) -> None:
    """The command `program` over these parts, whose flags each of them gets as `at`. One that fails does not stop the
    others, and makes the exit code 1. Raises InputError if a GPU is needed and not there, but for a rehearsal."""
    parser = ArgumentParser(prog=program, description=description, formatter_class=Help)
    add, named = parser.add_argument, {part.__name__: part for part in known}
    add("--parts", nargs="+", choices=named, default=list(named), help="what to run")
    add("--shape", choices=SHAPES, help="of the model where the part has none; without it small, on a GPU qwen2.5-0.5b")
    add("--rows", type=int, default=4, help="rows of a batch, each in ten languages")
    add("--repeats", type=int, default=5, help="rounds after the warm-up")
    add("--minutes", type=float, help="what is not done by then is skipped; without it 9 on a GPU, else no end")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--small", **SWITCH, default=False, help="a rehearsal of what a GPU runs, in tiny sizes, and no result")
    add("--output", type=Path, default=Path("runs/benchmark"), help="folder for the results")
    at = parser.parse_args()
    if at.repeats < 1 or at.rows < 1:
        raise InputError("--repeats and --rows must be at least 1")
    at.device = pick_device(at.device)
    at.for_gpu = at.small or at.device.type == "cuda"  # the sizes and the arithmetic
    at.mlc_parts = 1 if at.for_gpu else 4  # on a GPU each pass has a cost of its own
    if needs_gpu and not at.for_gpu:
        raise InputError("--device: PyTorch finds no GPU with CUDA here; --small rehearses all parts on a CPU")
    usual = "tiny" if at.small else "qwen2.5-0.5b" if at.for_gpu else "small"
    at.shape = at.shape or usual
    path = at.output / ("rehearsal.json" if at.small else "benchmark.json")
    results = read_object(path)
    usable_folder(at.output, "--output")
    minutes = at.minutes or (9.0 if at.device.type == "cuda" else math.inf)
    end, lines = time.perf_counter() + 60 * minutes, []
    for name in at.parts:
        title = ("REHEARSAL, no result: " if at.small else "") + named[name].__doc__.splitlines()[0]
        print(f"\n{title}", flush=True)
        start = time.perf_counter()
        result = attempt(named[name], at, end)
        how = f"--parts {name} --shape {at.shape} --rows {at.rows} --repeats {at.repeats}" + " --small" * at.small
        key = name if at.shape == usual else f"{name}, {at.shape}"
        results[key] = {
            "title": title, **result, "command": f"{program} {how}", "seconds": round(time.perf_counter() - start),
            "hardware": hardware(at.device), "versions": versions(), "commit": git_commit(),
        }  # fmt: skip
        lines.append(f"{key}: {verdict(result)}")
        table = [aligned_text([result["columns"], *result["rows"]])] if result["rows"] else []
        print(*table, *filter(None, [result.get("note")]), lines[-1], sep="\n", flush=True)
        write_json(path, results)
        write_atomically(path.with_suffix(".md"), "\n\n".join(map(section, results.values())) + "\n")
    print("", *lines, f"saved in {at.output}/: {path.name}, {path.stem}.md", sep="\n")
    if any(": failed: " in line for line in lines):
        sys.exit(1)


def attempt(part: Callable, at, end: float) -> dict:
    """What the part returns, its "ok" as "status" in words; if it fails, or is not done by `end`, or a package is not
    there, a result that says so."""

    def stop(*_) -> None:
        sys.exit("out of time")

    has_alarm = end < math.inf and hasattr(signal, "SIGALRM")  # Windows has none
    try:
        if time.perf_counter() >= end:
            stop()
        if has_alarm:
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, end - time.perf_counter())
        result = part(at)
        return {"status": "ok" if result.pop("ok") else "not as hoped"} | result
    except (Exception, SystemExit) as error:
        status = "skipped" if isinstance(error, ImportError) or str(error) == "out of time" else "failed"
        if status == "failed":
            traceback.print_exc()
        return {"status": status, "found": f"{type(error).__name__}: {first_line(error)}", "columns": [], "rows": []}
    finally:
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(RuntimeError):  # a GPU that has broken down
            fresh(at.device)


def verdict(result: dict) -> str:
    """How it went, what was found, and what was hoped for, in one line."""
    hoped = f" (hoped for: {result['goal']})" if "goal" in result else ""
    return f"{result['status']}: {result['found']}{hoped}"


def section(result: dict) -> str:
    """One part as Markdown."""
    table = markdown_table(result["columns"], result["rows"]) if result["rows"] else ""
    said = f"**{verdict(result)}**" if "status" in result else f"Goal: {result['goal']}." if "goal" in result else ""
    how = f"`{result['command']}`, {result['seconds']} s, {result['hardware']}, torch {result['versions']['torch']}"
    return "\n\n".join(filter(None, [f"### {result['title']}", table, said, result.get("note"), how]))


if __name__ == "__main__":
    run_command(main)
