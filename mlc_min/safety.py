"""Safety in every language: generate replies, judge them, report.

    python -m mlc_min.safety --model runs/mine/model --output runs/mine/safety            # all three steps
    python -m mlc_min.safety generate --model … --test MultiJail.csv --output runs/a      # writes generations.jsonl
    python -m mlc_min.safety judge --judge guard:Qwen/Qwen3Guard-Gen-0.6B --output runs/a # writes verdicts.jsonl
    python -m mlc_min.safety report --output runs/a --against runs/b                      # table, JSON, pictures

A published safe rate alone proves little: a model that answers gibberish, or refuses everything, is "safe". So
two rates stand side by side: *strict*, the share of harmful prompts with a real refusal, and *lenient*, with
anything but compliance, which is what published tables count. Beside them stand the harmless prompts: how many
are refused (over-refusal), how many are answered (helpful), and how many replies are in the prompt's language.

The steps are joined by JSONL files of records: model, id, language, harmful, prompt, reply, ended (false: cut off);
the judge adds verdict (refusal, compliance, invalid, or unscored: could not say) and reply_language. A person
or any outside judge can write these two fields; the report does not ask where they came from.
"""

import argparse
import json
import random
from pathlib import Path

import torch

from mlc_min.diagnose import diagnose
from mlc_min.examples import encode_prompt
from mlc_min.generate import generate
from mlc_min.judges import VERDICTS, breakage, exact, guard_prompt, parse_guard, phrases, reply_language
from mlc_min.machinery.errors import Help, InputError, run_command
from mlc_min.machinery.models import load_model, pick_device
from mlc_min.machinery.pictures import plot_rates, plot_tradeoff
from mlc_min.machinery.report import safety_report
from mlc_min.machinery.rows import Row, parse_languages, read_rows
from mlc_min.machinery.saving import write_atomically, write_json
from mlc_min.metrics import compare, summarize
from mlc_min.world.sentences import ALIGNED, EMBEDDED, LANGUAGES, refusal_text

CONTROLS = ("always-refuse", "gibberish")
GUARD_TOKENS = 64  # the documented answer has about 20


# --- records ---


def cells(rows: list[Row], languages: tuple[str, ...]) -> list[dict]:
    """Each row in each language as a record without a reply: id, language, harmful, prompt; in the embedded world
    also its `combination`, and `group`, the same for all phrasings of one request. Rows that do not say whether
    they are harmful are taken as harmful: so are those of the published test sets."""
    records = []
    for row in rows:
        identity, combination = str(row.extra.get("id", Path(row.where).name)), row.extra.get("combination")
        for language in languages:
            record = {"id": identity, "language": language, "harmful": row.extra.get("harmful", True)}
            record["prompt"] = row.prompts[language]
            if combination is not None:
                record |= {"combination": combination, "group": "-".join(map(str, combination))}
            records.append(record)
    return records


def evaluate(
    model, tokenizer, rows: list[Row], languages: tuple[str, ...], max_new_tokens: int = 48, batch_size: int = 256
) -> list[dict]:
    """Generate and judge every row of the embedded world in every language, in memory; returns the judged records."""
    records = cells(rows, languages)
    prompts = [encode_prompt(tokenizer, record["prompt"]) for record in records]
    replies = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return judge([record | reply for record, reply in zip(records, replies, strict=True)], "exact")


def control_reply(control: str, record: dict) -> dict:
    """What a model would be compared with that knows nothing. always-refuse: a refusal, in the prompt's language where
    the embedded world has one, else in English; gibberish: the prompt's letters in random order, always the same."""
    if control == "always-refuse":
        language = record["language"] if record["language"] in LANGUAGES else "en"
        return {"reply": refusal_text(language), "ended": True}
    letters = list(record["prompt"])
    random.Random(record["prompt"]).shuffle(letters)
    return {"reply": "".join(letters), "ended": True}


# --- the judge's step ---


def judge(records: list[dict], name: str, judge_cut_off: bool = False, guard=None, **settings) -> list[dict]:
    """Each record with its verdict, in order. name: "exact", "phrases" or "guard"; guard: (model, tokenizer), with
    `settings` for `generate`. judge_cut_off: judge cut-off replies by what is there; else they are invalid."""
    languages = tuple(sorted({record["language"] for record in records}))
    if name == "exact":
        return [record | exact(record) for record in records]
    if name == "phrases":
        return [record | phrases(record, languages, judge_cut_off) for record in records]
    broken = [breakage(record["reply"], record["ended"] or judge_cut_off) for record in records]
    asked = [record for record, problem in zip(records, broken, strict=True) if not problem]
    prompts = [guard_prompt(guard[1], record["prompt"], record["reply"]) for record in asked]
    answers = iter(generate(*guard, prompts, GUARD_TOKENS, **settings))
    judged = []
    for record, problem in zip(records, broken, strict=True):
        if problem:
            verdict = {"verdict": "invalid", "why": problem}
        else:
            answer = next(answers)
            verdict = {"guard_answer": answer["reply"], **parse_guard(answer["reply"], record["harmful"])}
        judged.append(record | verdict | {"reply_language": reply_language(record["reply"], languages)})
    return judged


# --- the files ---


FIELDS = {"id": str, "language": str, "harmful": bool, "prompt": str, "reply": str, "ended": bool}


def write_records(path: Path, records: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path, judged: bool) -> list[dict]:
    """Records from generations.jsonl, or `judged` ones from verdicts.jsonl, checked. Raises InputError with file and
    line for a field that is missing or wrong, a verdict that is none, or a reply that comes twice."""
    step = "judge" if judged else "generate"
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run `python -m mlc_min.safety {step}` first") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    records, seen = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); write one object a line") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object; write one record a line")
        for name, kind in FIELDS.items():
            if type(record.get(name)) is not kind:
                raise InputError(f"{path}:{number}: field '{name}' is missing or not a {kind.__name__}")
        if judged and "verdict" not in record:
            raise InputError(f"{path}:{number}: field 'verdict' is missing; run `python -m mlc_min.safety judge` first")
        if judged and record["verdict"] is None:
            record["verdict"] = "unscored"
        if judged and record["verdict"] not in VERDICTS:
            raise InputError(f"{path}:{number}: verdict {record['verdict']!r}; must be one of {', '.join(VERDICTS)}")
        key = (record.get("model"), record["harmful"], record["id"], record["language"])
        if key in seen:
            raise InputError(f"{path}:{number}: a second reply to {record['id']!r} in {record['language']!r}; keep one")
        seen.add(key)
        records.append(record)
    if not records:
        raise InputError(f"{path}: holds no records; run `python -m mlc_min.safety {step}` first")
    return records


def by_model(path: Path) -> dict[str, list[dict]]:
    """{model name: its records} of a verdicts.jsonl or of the folder that holds one."""
    path = path / "verdicts.jsonl" if path.is_dir() or path.suffix != ".jsonl" else path
    models: dict[str, list[dict]] = {}
    records = read_records(path, judged=True)
    generations = path.with_name("generations.jsonl")
    if path.name == "verdicts.jsonl" and generations.exists():
        replied = {tuple(r[key] for key in FIELDS) for r in read_records(generations, judged=False)}
        if not {tuple(r[key] for key in FIELDS) for r in records} <= replied:
            raise InputError(f"{path}: judges other replies than those in {generations.name}; run the judge again")
    for record in records:
        models.setdefault(str(record.get("model", path.parent.name)), []).append(record)
    return models


# --- the commands ---


def read_test(arguments) -> tuple[list[Row], tuple[str, ...]]:
    """Rows of --test, and of --harmless marked as such; and the languages asked for or found."""
    languages = None if arguments.languages == "auto" else parse_languages(arguments.languages)
    rows = read_rows(arguments.test, languages)
    languages = languages or tuple(rows[0].prompts)
    if arguments.harmless:
        harmless = read_rows(arguments.harmless, languages)
        rows += [Row(row.where, row.prompts, extra=row.extra | {"harmful": False}) for row in harmless]
    elif not any("harmful" in row.extra for row in rows):
        print(f"{arguments.test}: no field 'harmful', so all prompts count as harmful; --harmless adds others")
    used: set[tuple] = set()
    for row in rows:
        key = (row.extra.get("harmful", True), str(row.extra.get("id", row.where)))
        if key in used:
            raise InputError(f"{row.where}: the id {key[1]!r} is used twice; give each row its own, or none")
        used.add(key)
    return rows, languages


def generate_step(arguments) -> None:
    rows, languages = read_test(arguments)
    records = cells(rows, languages)
    figures, journal = None, arguments.output / "generations.part.jsonl"
    if arguments.control:
        name = arguments.control
        replies = [control_reply(name, record) for record in records]
        arguments.output.mkdir(parents=True, exist_ok=True)
    else:
        path = Path(arguments.model)
        name = path.parent.name if path.name == "model" else path.name  # runs/mine/model is "mine"
        model, tokenizer = load(arguments.model, arguments)
        prompts = [encode_prompt(tokenizer, record["prompt"]) for record in records]
        if len(languages) > 1:
            meanings = list({tuple(row.extra.get("combination", [i])): row for i, row in enumerate(rows)}.values())
            try:
                figures = diagnose(model, tokenizer, meanings[:256], languages, arguments.layer)
            except ValueError as error:
                raise InputError(f"--layer {arguments.layer}: {error}") from None
        arguments.output.mkdir(parents=True, exist_ok=True)
        in_world = all("combination" in record for record in records)
        max_new_tokens = arguments.max_new_tokens or (48 if in_world else 512)
        batch_size = arguments.batch_size or (256 if in_world else 32)
        sampling = {"temperature": arguments.temperature, "seed": arguments.seed}
        replies = generate(model, tokenizer, prompts, max_new_tokens, batch_size, **sampling, journal=journal)
    named = [{"model": arguments.name or name, **r, **reply} for r, reply in zip(records, replies, strict=True)]
    write_records(arguments.output / "generations.jsonl", named)
    write_json(arguments.output / "diagnostics.json", figures)
    journal.unlink(missing_ok=True)
    print(f"{len(records)} replies: {arguments.output}/generations.jsonl")


def judge_step(arguments) -> None:
    output: Path = arguments.output
    records = read_records(output / "generations.jsonl", judged=False)
    in_world = [isinstance(record.get("combination"), list) for record in records]
    name = arguments.judge if arguments.judge != "auto" else "exact" if all(in_world) else "phrases"
    if name == "exact" and not all(in_world):
        raise InputError("--judge exact: knows the embedded world only; take phrases or guard:<model>")
    if name.startswith("guard:"):
        guard = load(name.removeprefix("guard:"), arguments)
        journal = output / "guard.part.jsonl"
        settings = {"batch_size": arguments.batch_size or 32, "journal": journal}
        judged = judge(records, "guard", arguments.judge_cut_off, guard, **settings)
        journal.unlink(missing_ok=True)
    else:
        judged = judge(records, name, arguments.judge_cut_off)
    write_records(output / "verdicts.jsonl", [record | {"judge": name} for record in judged])
    print(f"{len(judged)} verdicts by {name}: {output}/verdicts.jsonl")


def report_step(arguments) -> None:
    records: dict[str, list[dict]] = {}
    diagnostics: dict[str, dict] = {}
    for folder in (arguments.output, *arguments.against):
        models = by_model(folder)
        for name, own in models.items():
            name = f"{name} ({folder})" if name in records else name
            records[name] = own
            path = folder / "diagnostics.json"
            figures = json.loads(path.read_text(encoding="utf-8")) if len(models) == 1 and path.exists() else None
            if figures:
                diagnostics[name] = figures
    summaries = {name: summarize(own, arguments.aligned) for name, own in records.items()}
    first, *others = records
    comparisons = {name: compare(records[name], records[first], arguments.aligned) for name in others}
    judges = sorted({record.get("judge", "unknown") for own in records.values() for record in own})
    text = safety_report(summaries, comparisons, diagnostics, judges)
    output: Path = arguments.output
    write_atomically(output / "report.txt", text + "\n")
    figures = {"judges": judges, "models": summaries, "comparisons": comparisons, "diagnostics": diagnostics}
    write_json(output / "report.json", figures)
    plot_rates({name: [summary] for name, summary in summaries.items()}, output / "rates.png")
    plot_tradeoff({name: [summary] for name, summary in summaries.items()}, output / "tradeoff.png")
    print(f"\n{text}\n\nsaved in {output}/: report.txt, report.json, rates.png, tradeoff.png")


def load(path: str, arguments):
    return load_model(path, pick_device(arguments.device), getattr(torch, arguments.dtype))


STEPS = {"generate": generate_step, "judge": judge_step, "report": report_step}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlc_min.safety",
        description=__doc__.split("\n\n")[0] + "\n\n" + __doc__.split("\n\n")[1],
        formatter_class=Help,
    )
    add = parser.add_argument
    add("step", nargs="?", choices=("all", *STEPS), default="all", help="which of the three steps to run")
    add("--output", type=Path, default=Path("runs/safety"), help="folder that the steps write to and read from")
    add = parser.add_argument_group("generate").add_argument
    add("--model", default=str(EMBEDDED / "model"), help="model folder in Hugging Face format, or Hub id")
    add("--control", choices=CONTROLS, help="no model: replies that show what the figures mean")
    add("--name", help="of the model in the report; without it, its folder's")
    add("--test", default=str(EMBEDDED / "test.jsonl"), help="prompts: JSONL, JSON list or CSV, see machinery/rows.py")
    add("--harmless", help="a second file, of harmless prompts, for over-refusal and helpfulness")
    add("--languages", default="auto", help="comma-separated codes; auto: those in the first row")
    add(
        "--max_new_tokens",
        type=int,
        default=0,
        help="0: 48 in the embedded world, else 512; longer replies are cut off",
    )
    add("--batch_size", type=int, default=0, help="changes the speed, not the verdicts; 0: 256 in that world, else 32")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--seed", type=int, default=0, help="of the sampling, at a temperature above 0")
    add("--layer", type=int, default=-1, help="hidden-state entry that the diagnostics look at")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add = parser.add_argument_group("judge").add_argument
    add("--judge", default="auto", help="exact, phrases or guard:<Qwen3Guard-Gen folder or id>; auto: exact if it can")
    add("--judge_cut_off", action="store_true", help="judge cut-off replies by what is there; else they are invalid")
    add = parser.add_argument_group("report").add_argument
    add("--against", type=Path, nargs="*", default=[], help="folders of other models, to compare with")
    add("--aligned", default=",".join(ALIGNED), help="languages that enter Avg, Var and PAG")
    arguments = parser.parse_args()
    if arguments.batch_size < 0 or arguments.max_new_tokens < 0:
        raise InputError("--batch_size and --max_new_tokens must not be negative")
    if arguments.temperature < 0:
        raise InputError(f"--temperature {arguments.temperature}: must not be negative; 0 is greedy")
    if arguments.judge not in ("auto", "exact", "phrases") and not arguments.judge.startswith("guard:"):
        raise InputError(f"--judge {arguments.judge}: take auto, exact, phrases or guard:<model>")
    arguments.aligned = parse_languages(arguments.aligned, "--aligned")
    for name, step in STEPS.items():
        if arguments.step in ("all", name):
            step(arguments)


if __name__ == "__main__":
    run_command(main)
