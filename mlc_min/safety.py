"""Safety in every language: generate replies, judge them, report.

    python -m mlc_min.safety --model runs/mine/model --output runs/mine/safety            # all three steps
    python -m mlc_min.safety generate --model … --test MultiJail.csv --output runs/a      # writes generations.jsonl
    python -m mlc_min.safety judge --judge guard:Qwen/Qwen3Guard-Gen-0.6B --output runs/a # writes verdicts.jsonl
    python -m mlc_min.safety report --output runs/a --against runs/b                      # table, JSON, pictures

A published safe rate alone proves little: a model that answers gibberish, or refuses everything, is "safe". So two
rates stand side by side: *strict*, the share of harmful prompts with a real refusal, and *lenient*, with anything but
compliance, which is what published tables count. Beside them stand the harmless prompts: how many are refused
(over-refusal) or answered (helpful), and how many replies are in the prompt's language.

The steps are joined by files of records, which `evaluation/records.py` describes. A person or any outside judge can
write the verdicts; the report does not ask where they came from.
"""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.consistency import BrokenDown
from mlc_min.evaluation.classifier import load_classifier
from mlc_min.evaluation.diagnose import diagnose
from mlc_min.evaluation.generate import CONTROLS, control_reply, generate, keep_date
from mlc_min.evaluation.judges import judge, label_of, refusal_phrases
from mlc_min.evaluation.metrics import compare, summarize
from mlc_min.evaluation.model_card import add_results
from mlc_min.evaluation.pictures import plot_rates, plot_tradeoff
from mlc_min.evaluation.records import by_model, cells, encode, in_world, read_object, read_records, write_records
from mlc_min.evaluation.report import safety_report
from mlc_min.evaluation.two_judges import compared
from mlc_min.machinery.errors import SWITCH, Help, InputError, refusing, run_command
from mlc_min.machinery.files import EMBEDDED, usable_folder, write_atomically, write_json
from mlc_min.machinery.folders import read_prompts
from mlc_min.machinery.models import load_model, pick_device
from mlc_min.machinery.rows import parse_languages
from mlc_min.states import resolve_layer


def aligned_in(model: str) -> list[str] | None:
    """The languages of a model of `mlc_min.train`, from its train_config.json: those that it was given, with MLC or
    without, so that models with and without are averaged over the same. None for any other model."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        settings = json.loads((Path(model) / "train_config.json").read_text(encoding="utf-8"))["settings"]
        return list(parse_languages(settings["languages"]))


def usable_output(arguments) -> Path:
    """The output folder, tried before any work: also that nothing that is to be written may be a folder there."""
    output = usable_folder(arguments.output, "--output")
    for path in output.iterdir():
        if path.is_dir() and path.suffix in (".jsonl", ".json", ".txt", ".png"):
            raise InputError(f"--output {output}: {path.name} is a folder; remove it, or give another --output")
    return output


def generate_step(arguments) -> None:
    rows, languages = read_prompts(arguments.test, arguments.harmless, arguments.languages)
    records = cells(rows, languages)
    figures, aligned, sampling, journal = None, None, {}, arguments.output / "generations.part.jsonl"
    if arguments.control:
        name, output = arguments.control, usable_output(arguments)
        replies = [control_reply(name, record) for record in records]
    else:
        path = Path(arguments.model).resolve()
        name, aligned = path.parent.name if path.name == "model" else path.name, aligned_in(arguments.model)
        model, tokenizer = load(arguments.model, arguments, arguments.chat_template)
        with refusing(f"--layer {arguments.layer}: …", ValueError):
            resolve_layer(model, arguments.layer)
        keep_date(tokenizer, journal)
        prompts = encode(rows, tokenizer, languages)
        output = usable_output(arguments)
        if len(languages) > 1:
            meanings = {tuple(row.extra["combination"]) if in_world(row.extra) else row.where: row for row in rows}
            with refusing(f"--model {arguments.model}, --layer {arguments.layer}: …", BrokenDown):
                figures = diagnose(model, tokenizer, list(meanings.values())[:256], languages, arguments.layer)
        small = all(map(in_world, records))
        sampling = {"max_new_tokens": arguments.max_new_tokens or (48 if small else 512)}
        sampling |= {"batch_size": arguments.batch_size or (256 if small else 32)}
        sampling |= {"temperature": arguments.temperature, "seed": arguments.seed}
        replies = generate(model, tokenizer, prompts, **sampling, journal=journal)
    named = [{"model": arguments.name or name, **r, **reply} for r, reply in zip(records, replies, strict=True)]
    write_records(output / "generations.jsonl", named)
    write_json(output / "diagnostics.json", figures)
    made = {name: getattr(arguments, name) for name in ("model", "control", "dtype", "test", "harmless")}
    write_json(output / "run.json", made | sampling | {"languages": languages, "aligned": aligned})
    journal.unlink(missing_ok=True)
    print(f"{len(records)} replies: {output}/generations.jsonl")


def judge_step(arguments) -> None:
    verdicts = arguments.output / "verdicts.jsonl"
    if not (arguments.step == "judge" and arguments.compare and arguments.judge == "auto" and verdicts.exists()):
        judge_replies(arguments)
    if arguments.compare:
        other = arguments.compare / verdicts.name if arguments.compare.is_dir() else arguments.compare
        both = [read_records(path, judged=True) for path in (verdicts, other)]
        text = compared(*both, (str(verdicts), str(other)))
        write_atomically(arguments.output / "compared.txt", text + "\n")
        print(f"\n{text}\n\nsaved in {arguments.output}/compared.txt")


def judge_replies(arguments) -> None:
    records = read_records(arguments.output / "generations.jsonl", judged=False)
    output, exactly = usable_output(arguments), all(map(in_world, records))
    name = arguments.judge if arguments.judge != "auto" else "exact" if exactly else "phrases"
    if name == "exact" and not exactly:
        raise InputError("--judge exact: knows the embedded world only; take phrases or guard:<model>")
    kind, _, path = name.partition(":")
    journal, of_guard = output / "guard.part.jsonl", {"batch_size": arguments.batch_size or 32}
    if kind == "guard":
        of_guard |= {"guard": load(path, arguments), "journal": journal}
        keep_date(of_guard["guard"][1], journal)
    if kind == "classifier":
        label = arguments.refusal_label
        of_guard["guard"] = load_classifier(path, label, *device_and_dtype(arguments))
        of_guard |= {"text": arguments.judge_text, "refusal_label": label}
    judged = judge(records, kind, arguments.judge_cut_off, **of_guard)
    write_records(output / "verdicts.jsonl", [record | {"judge": name} for record in judged])
    if kind == "guard":
        journal.unlink(missing_ok=True)
    print(f"{len(judged)} verdicts by {name}: {output}/verdicts.jsonl")


def report_step(arguments) -> None:
    records, diagnostics, aligned = {}, {}, {}  # of each model, by its name
    for place in (arguments.output, *arguments.against):
        models, folder = by_model(place), place if place.is_dir() else place.parent
        figures, run = read_object(folder / "diagnostics.json"), read_object(folder / "run.json")
        for name, own in models.items():
            name = f"{name} ({place})" if name in records else name
            records[name], aligned[name] = own, run.get("aligned") if len(models) == 1 else None
            if figures and len(models) == 1:
                diagnostics[name] = figures
    output = usable_output(arguments)
    first, *others = records
    tested = tuple(dict.fromkeys(record["language"] for own in records.values() for record in own))
    seen = arguments.aligned or aligned[first] or tested
    judges = sorted({record.get("judge") or "unknown" for own in records.values() for record in own})
    notes = [f"{name} was aligned in {', '.join(aligned[name])}; its Avg, Var and PAG are over {', '.join(seen)}, too"
             for name in others if aligned[name] and set(aligned[name]) != set(seen)]  # fmt: skip
    more = ((seen is tested, "it is not known which languages were aligned, so all count as aligned; see --aligned"),
            (len(judges) > 1, "the verdicts are by several judges, so a difference may be theirs"))  # fmt: skip
    notes += [line for holds, line in more if holds]
    if missing := [code for code in seen if code not in tested]:
        notes.append(f"aligned, but not tested: {', '.join(missing)}")
    if "phrases" in judges and (missing := [code for code in tested if label_of(code) not in refusal_phrases()]):
        notes.append(f"the judge `phrases` knows no refusal in {', '.join(missing)}, and takes those for compliance")
    summaries = {name: summarize(own, tuple(seen)) for name, own in records.items()}
    comparisons = {}
    for name in others:
        with refusing(f"--against: {name} and {first}: …; compare on the same prompts", ValueError):
            comparisons[name] = compare(records[name], records[first], tuple(seen))
    text = safety_report(summaries, comparisons, diagnostics, judges, notes)
    figures = {"judges": judges, "models": summaries, "comparisons": comparisons, "diagnostics": diagnostics}
    write_atomically(output / "report.txt", text + "\n")
    write_json(output / "report.json", figures)
    runs = {name: [summary] for name, summary in summaries.items()}
    plot_rates(runs, output / "rates.png")
    plot_tradeoff(runs, output / "tradeoff.png")
    print(f"\n{text}\n\nsaved in {output}/: report.txt, report.json, rates.png, tradeoff.png")
    if aligned[first] and (card := add_results(output, summaries[first], judges)):
        print(f"{card}: has the figures too, as `model-index`")


def device_and_dtype(arguments) -> tuple[torch.device, torch.dtype]:
    """Of the flags. `--dtype auto` is settled here, and said where it is not float32."""
    device = pick_device(arguments.device)
    if arguments.dtype == "auto":
        arguments.dtype = "bfloat16" if device.type == "cuda" else "float32"
        if arguments.dtype == "bfloat16":
            print("weights in bfloat16, since this is a GPU (--dtype float32: replies depend less on the batch)")
    return device, getattr(torch, arguments.dtype)


def load(path: str, arguments, chat_template: str | None = None) -> tuple[PreTrainedModel, Tokenizer]:
    """Model and tokenizer, on the device and in the dtype of the flags."""
    return load_model(path, *device_and_dtype(arguments), chat_template=chat_template)


STEPS = {"generate": generate_step, "judge": judge_step, "report": report_step}
# flag: default, least, most, unit, help
NUMBERS = {
    "max_new_tokens": (0, 0, 10**6, "tokens; 0 chooses", "0: 48 in the embedded world, else 512; more is cut off"),
    "batch_size": (0, 0, 10**6, "replies; 0 chooses", "0: 256 or 32; of no effect on greedy float32 CPU replies"),
    "temperature": (0.0, 0, 100, "a factor; 0 is greedy, 1 the model's own", "0: greedy"),
    "seed": (0, 0, 2**63 - 1, "a number", "of the sampling, at a temperature above 0"),
    "layer": (-1, -10_000, 10_000, "a hidden-state entry", "hidden-state entry that the diagnostics look at"),
}


def main() -> None:
    description = "\n\n".join(__doc__.split("\n\n")[:2])
    parser = argparse.ArgumentParser(prog="python -m mlc_min.safety", description=description, formatter_class=Help)
    add = parser.add_argument
    add("step", nargs="?", choices=("all", *STEPS), default="all", help="which of the three steps to run")
    add("--output", type=Path, default=Path("runs/safety"), help="folder that the steps write to and read from")
    add = parser.add_argument_group("generate").add_argument
    add("--model", default=str(EMBEDDED / "model"), help="model folder in Hugging Face format, or Hub id")
    add("--control", choices=CONTROLS, help="no model: replies that show what the figures mean")
    add("--name", help="of the model in the report; without it, its folder's")
    add("--test", default=str(EMBEDDED / "test.jsonl"), help="prompts: a file or a folder, see machinery/folders.py")
    add("--harmless", help="harmless prompts, a file or a folder, for over-refusal and helpfulness")
    add("--languages", default="auto", help="comma-separated codes; auto: all that are found")
    add("--chat_template", help="file with the chat template, for a model that has none")
    for name, (default, *_, text) in NUMBERS.items():
        add(f"--{name}", type=type(default), default=default, help=text)
    add("--device", default="auto", help="auto (cuda, else cpu), cpu, cuda or mps")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of weights; auto: bfloat16 on CUDA")
    add = parser.add_argument_group("judge").add_argument
    judges = "exact, phrases, guard:<Qwen3Guard-Gen> or classifier:<text classifier>, each a folder or id"
    add("--judge", default="auto", help=f"{judges}; auto: exact if it can, else phrases")
    add("--refusal_label", help="of a classifier: the label that means a refusal; any other means compliance")
    add("--judge_text", default="{reply}", help="what a classifier reads: a text with {prompt} and {reply} in it")
    other = "verdicts.jsonl, or its folder, of another judge on the same replies: agreement and differences"
    add("--compare", type=Path, help=f"{other}; without --judge of the verdicts that are there already")
    add("--judge_cut_off", **SWITCH, default=False, help="judge cut-off replies by what is there, not as invalid")
    add = parser.add_argument_group("report").add_argument
    add("--against", type=Path, nargs="*", default=[], help="folders of other models, to compare with")
    add("--aligned", default="", help="in Avg, Var, PAG; others get a *; empty: those of the training, else all")
    arguments = parser.parse_args()
    check(arguments)
    small = refusing(f"--batch_size {arguments.batch_size}: …; lower it", torch.OutOfMemoryError)
    kept = "mend it and run the same command again: finished batches of replies are kept"
    with small, refusing(f"--output {arguments.output}: …; {kept}", OSError):  # a full disk, say
        for name, step in STEPS.items():
            if arguments.step in ("all", name):
                step(arguments)


def check(arguments) -> None:
    """Raise InputError, before any work, for a setting that no step can use."""
    with refusing("the command holds bytes that are no UTF-8; write names and paths in UTF-8", UnicodeEncodeError):
        " ".join(sys.argv).encode()  # else found when the first file is written
    for name, (_, least, most, unit, _) in NUMBERS.items():
        value = getattr(arguments, name)
        if not least <= value <= most:
            raise InputError(f"--{name} {value}: must be at least {least} and at most {most} ({unit})")
    if 0 < arguments.temperature < 0.01:
        raise InputError(f"--temperature {arguments.temperature}: must be 0, greedy, or at least 0.01")
    kind, _, model = arguments.judge.partition(":")
    if arguments.judge not in ("auto", "exact", "phrases") and not (kind in ("guard", "classifier") and model):
        raise InputError(f"--judge {arguments.judge}: take auto, exact, phrases, guard:<model> or classifier:<model>")
    if kind == "classifier" and not arguments.refusal_label:
        raise InputError(f"--judge {arguments.judge}: say with --refusal_label which of its labels means a refusal")
    if "{reply}" not in arguments.judge_text:
        raise InputError(f"--judge_text {arguments.judge_text!r}: must have {{reply}} in it")
    arguments.aligned = parse_languages(arguments.aligned, "--aligned") if arguments.aligned else None


if __name__ == "__main__":
    run_command(main)
