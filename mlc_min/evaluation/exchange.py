"""Prompts for other tools, and their replies for our judges: so a model behind any API or server can be judged.

    python -m mlc_min.evaluation.exchange export --to inspect --test MultiJail.csv --output prompts.jsonl
    python -m mlc_min.evaluation.exchange import --from inspect log.json --output runs/api      # generations.jsonl
    python -m mlc_min.evaluation.exchange import --from lm-eval samples.jsonl --output runs/api # the same
    python -m mlc_min.safety judge --output runs/api --judge guard:Qwen/Qwen3Guard-Gen-0.6B

`data/lm-eval/` is the way to lm-eval: a task that reads our test sets itself.
"""

import argparse
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mlc_min.evaluation.records import cells, checked, write_records
from mlc_min.examples import turns
from mlc_min.machinery.errors import Help, InputError, refusing, run_command
from mlc_min.machinery.files import EMBEDDED, usable_folder, write_json
from mlc_min.machinery.folders import read_prompts
from mlc_min.machinery.rows import read_values, text_lines

CUT_OFF = ("max_tokens", "model_length", "limit")  # inspect's stop reasons, and a limit of its own
SHARED = ("id", "language", "harmful", "system", "combination", "group")  # what a record has beside prompt and reply


def sample(record: dict) -> dict:
    """A record as a line for inspect_ai's `json_dataset`, with the fields of its `Sample` (inspect.aisi.org.uk,
    "Datasets"): input, the verdict to be wished for as target, an id of its own, and the record's other fields as
    metadata."""
    wished = "refusal" if record["harmful"] else "compliance"
    return {
        "input": turns(record["prompt"], record["system"]) if record.get("system") else record["prompt"],
        "target": wished,
        "id": f"{record['id']} {record['language']} {wished}",
        "metadata": {name: record[name] for name in SHARED if name in record},
    }


def from_inspect(path: Path) -> Iterator[tuple[dict, str]]:
    """(record, where) of each sample of a finished inspect_ai log in JSON; those without a reply are told and left
    out. A sample's metadata must have `language` and `harmful`. Raises InputError for anything else."""
    if path.suffix == ".eval":
        advice = "make it JSON with `inspect log convert --to json --output-dir FOLDER`"
        raise InputError(f"{path}: a packed log; {advice}")
    with refusing(f"{path}: not an inspect_ai log in JSON (…)"):
        log = json.loads("".join(line for _, line in text_lines(path)))
        status, model, samples = log["status"], log["eval"]["model"], [*log["samples"]]
    if status != "success":
        raise InputError(f"{path}: the run's status is {status!r}, so replies are missing; see `inspect eval-retry`")
    failed, unknown = [], 0
    for count, own in enumerate(samples, 1):
        where = f"{path}: sample {count}"
        with refusing(f"{where}: not as inspect_ai writes it (…)"):
            if own.get("error") or not own["output"]["choices"]:
                failed.append(str(own["id"]))
                continue
            prompt, metadata, output = own["input"], own["metadata"], own["output"]
            if not isinstance(prompt, str):
                (prompt,) = (turn["content"] for turn in prompt if turn["role"] == "user")
            record = {"id": str(own["id"])} | {name: metadata[name] for name in SHARED if name in metadata}
            stop = "limit" if own.get("limit") else output["choices"][0]["stop_reason"]
            unknown += stop == "unknown"
            replied = {"prompt": prompt, "reply": output["completion"], "ended": stop not in CUT_OFF}
        yield {"model": model} | record | replied, where
    if failed:
        print(f"{path}: {len(failed)} samples without a reply are left out, the first is {failed[0]!r}")
    if unknown:
        print(f"{path}: does not say of {unknown} replies whether they were cut off, so these count as whole")


def from_lm_eval(path: Path) -> Iterator[tuple[dict, str]]:
    """(record, where) of each line that `lm_eval --log_samples` wrote of the task in data/lm-eval; the model's name is
    its folder's. Raises InputError for anything else."""
    first = None
    for value, where in read_values(path, "give a samples_*.jsonl of `lm_eval --log_samples`"):
        with refusing(f"{where}: not one reply as `lm_eval --log_samples` writes it for data/lm-eval (…)"):
            first = first or value["filter"]
            if value["filter"] != first:  # the same replies once more
                continue
            ((reply,),) = value["resps"]
            known = {name: part for name, part in value["doc"].items() if name in ("prompt", *SHARED)}
        record = {name: part for name, part in known.items() if part is not None}  # a column of `datasets` fills up
        yield {"model": path.resolve().parent.name, **record, "reply": reply, "ended": True}, where
    print(f"{path}: lm-eval does not say which replies were cut off, so all of them count as whole")


READERS = {"inspect": from_inspect, "lm-eval": from_lm_eval}


def export_step(arguments: Namespace) -> None:
    records = cells(*read_prompts(arguments.test, arguments.harmless, arguments.languages))
    usable_folder(arguments.output.parent, "--output")
    write_records(arguments.output, [sample(record) for record in records])
    print(f"{len(records)} samples: {arguments.output}")


def import_step(arguments: Namespace) -> None:
    records = checked(READERS[arguments.source](arguments.log), judged=False)
    if not records:
        raise InputError(f"{arguments.log}: holds no replies")
    if arguments.name:
        records = [record | {"model": arguments.name} for record in records]
    output = usable_folder(arguments.output, "--output")
    write_records(output / "generations.jsonl", records)
    write_json(output / "diagnostics.json", None)  # of another model, if there is one
    run = {"model": records[0]["model"], "from": arguments.source, "log": str(arguments.log)}
    write_json(output / "run.json", run)
    languages = Counter(record["language"] for record in records)
    per_prompt = Counter((record["harmful"], record["id"]) for record in records)
    print(f"{len(records)} replies: {output}/generations.jsonl; {', '.join(f'{c} {n}' for c, n in languages.items())}")
    if lacking := [name for (_, name), n in per_prompt.items() if n < len(languages)]:
        print(f"note: {len(lacking)} prompts lack a reply in some language, the first is {lacking[0]!r}")


def main() -> None:
    about = {"description": __doc__.partition("\n\n`data")[0], "formatter_class": Help}
    parser = argparse.ArgumentParser(prog="python -m mlc_min.evaluation.exchange", **about)
    steps = parser.add_subparsers(required=True)
    add = (step := steps.add_parser("export", help="prompts for another tool", formatter_class=Help)).add_argument
    step.set_defaults(step=export_step)
    add("--to", choices=("inspect",), default="inspect", help="whose format: JSONL of inspect_ai's Samples")
    add("--test", default=str(EMBEDDED / "test.jsonl"), help="prompts, as `python -m mlc_min.safety` takes them")
    add("--harmless", help="more prompts, harmless ones")
    add("--languages", default="auto", help="comma-separated codes; auto: all that are found")
    add("--output", type=Path, default=Path("prompts.jsonl"), help="file to write")
    add = (step := steps.add_parser("import", help="replies from another tool", formatter_class=Help)).add_argument
    step.set_defaults(step=import_step)
    add("--from", dest="source", choices=READERS, required=True, help="which tool wrote the log")
    add("log", type=Path, help="inspect_ai's log in JSON, or lm-eval's samples_….jsonl")
    add("--name", help="of the model in the report; without it, what the log says")
    add("--output", type=Path, default=Path("runs/imported"), help="folder for generations.jsonl")
    arguments = parser.parse_args()
    arguments.step(arguments)


if __name__ == "__main__":
    run_command(main)
