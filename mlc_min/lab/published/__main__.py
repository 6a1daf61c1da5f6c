"""A published multilingual model, taught in English to refuse: is there a gap to other languages, what closes it?

    python -m mlc_min.lab.published --model <folder, .gguf file or Hub id> --data embedded --output runs/published
    python -m mlc_min.lab.published --model … --data polyrefuse:<folder> --seeds 0 1 2 --output runs/polyrefuse

Trains and measures every row of the table, seed by seed. What is done already (a result.json in the output folder, or
an entry in the published.json of the results folder) is not run again: a stopped run goes on where it was, and more
rows or seeds can be added to a table. A row takes about eight minutes on 2 CPU cores with a model of 270 M parameters,
and 7 GB of memory. Writes published.json, published.md and two pictures.
"""

import argparse
import time
from pathlib import Path

from mlc_min.evaluation.pictures import plot_layers
from mlc_min.evaluation.records import read_object
from mlc_min.lab.published.report import entry, plot_languages, tables, tabulate
from mlc_min.lab.published.rows import MAIN, ROWS, START, Bench, run
from mlc_min.lab.published.tasks import load_task
from mlc_min.machinery.errors import Help, InputError, run_command
from mlc_min.machinery.files import usable_folder, write_atomically, write_json
from mlc_min.machinery.models import pick_device
from mlc_min.machinery.rows import json_values
from mlc_min.train import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlc_min.lab.published", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", required=True, help="a pre-trained base model: folder in Hugging Face format, .gguf file or Hub id")
    add("--chat_template", help="file with the chat template, for a model that has none; see data/published")
    add("--attention", help="attention backend of transformers, such as eager or sdpa; default: its own choice")
    add("--data", default="embedded", help="embedded, or polyrefuse:<folder with its JSON files>")
    add("--rows", nargs="+", default=list(MAIN), metavar="ROW", help=f"which rows, or all: {', '.join(ROWS)}")
    add("--seeds", type=int, nargs="+", default=[0], help="of row order, extractor, shuffling and labelled prompts")
    add("--split", choices=("validation", "test"), default="test", help="requests that are measured on")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the further training")
    add("--output", type=Path, default=Path("runs/published"), help="a folder per row and seed; reused")
    add("--results", type=Path, help="folder of published.json and so on, new or to be added to; default: --output")
    add("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    names = list(ROWS) if arguments.rows == ["all"] else [START, *(n for n in arguments.rows if n != START)]
    for name in names:
        if name not in ROWS:
            raise InputError(f"--rows {name!r}: there is no such row; the rows are {', '.join(ROWS)}")
    changes = dict(map(setting, arguments.set))
    for seed in arguments.seeds:
        TrainConfig(seed=seed).check()
    task = load_task(arguments.data)
    bench = Bench(arguments.model, arguments.chat_template, arguments.attention, pick_device(arguments.device), task,
                  arguments.split, usable_folder(arguments.output, "--output"))  # fmt: skip
    folder = usable_folder(arguments.results or arguments.output, "--results")
    wanted = {"model": Path(arguments.model).name, "data": task.name, "split": arguments.split, "set": arguments.set}
    begun = bench.output / "run.json"
    if begun.exists() and read_object(begun) != wanted:
        raise InputError(f"{begun}: another run; use another --output, or delete the folder")
    write_json(begun, wanted)
    known = read_object(folder / "published.json")
    if known and any(known.get(key) != value for key, value in wanted.items()):
        raise InputError(f"{folder}/published.json: of another model, data, split or --set; use another --results")
    runs = {(name, run["seed"]): run for name, row in known.get("rows", {}).items() for run in row["runs"]}
    place = f"measured on {len(bench.rows)} requests in these and {', '.join(task.unseen)}"
    print(f"{task.name}: {len(task.train)} training rows in {', '.join(task.languages)}; {place}")
    print(task.note)
    asked = [(name, seed) for seed in arguments.seeds for name in names]
    todo = [key for key in asked if not (bench.folder(*key) / "result.json").exists() and key not in runs]
    spent = []
    for name, seed in todo:
        started = time.perf_counter()
        run(bench, name, seed, changes)
        spent.append(time.perf_counter() - started)
        minutes, rest = spent[-1] / 60, len(todo) - len(spent)
        left = sum(spent) / len(spent) * rest / 60
        print(f"{name}, seed {seed}: {minutes:.1f} minutes; {rest} more rows, about {left:.0f} minutes", flush=True)
    report(bench, known | wanted, runs, asked, folder)


def setting(text: str) -> tuple[str, object]:
    """A setting of `mlc_min.train` and its value, of the kind that its default has: "mlc_weight=2" -> 2.0."""
    name, _, value = text.partition("=")
    own = vars(TrainConfig()).get(name)
    if own is None or isinstance(own, bool):
        raise InputError(f"--set {text}: take a number or a word of mlc_min.train, such as mlc_weight=2")
    try:
        return name, type(own)(value)
    except ValueError:
        raise InputError(f"--set {text}: must be of the kind of {own!r}") from None


def report(bench: Bench, about: dict, runs: dict[tuple, dict], asked: list[tuple], folder: Path) -> None:
    """Write the tables over the runs that were known and those in the output folder, which win."""
    base = read_object(bench.output / "base.json") or about["base"]
    about |= {"note": bench.task.note, "base": {key: base[key] for key in ("perplexity", "layers")}}
    for name, seed in asked:
        place = bench.folder(name, seed)
        if (place / "result.json").exists():
            records = [record for record, _ in json_values(place / "records.jsonl")]
            runs[name, seed] = entry(read_object(place / "result.json"), records, base["perplexity"])
    rows = {name: [runs[key] for key in sorted(runs) if key[0] == name] for name in ROWS}
    figures = tabulate(bench.task, {name: own for name, own in rows.items() if own})
    write_json(folder / "published.json", about | figures)
    text = tables(bench.task, figures)
    write_atomically(folder / "published.md", text + "\n")
    plot_languages(bench.task, figures, folder / "published-languages.png")
    shown = {name: rows[name][0]["layers"] for name in MAIN[:6] if rows[name]}
    plot_layers({"base": base["layers"]} | shown, folder / "published-layers.png")
    print(f"\n{text}\n\nsaved in {folder}/: published.json and .md, published-languages.png, published-layers.png")


if __name__ == "__main__":
    run_command(main)
