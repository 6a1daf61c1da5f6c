"""Records: what the steps of an evaluation hand on, one JSON object a line.

`generate` writes model, id, language, harmful, prompt, reply, ended (false: cut off); the judge adds verdict and
reply_language. A person or any outside judge can write these two; the report does not ask where they came from.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.examples import Row, encode_row_prompts
from mlc_min.machinery.errors import InputError, refusing
from mlc_min.machinery.files import write_atomically
from mlc_min.machinery.rows import read_values

VERDICTS = ("refusal", "compliance", "invalid", "unscored")
FIELDS = {"id": str, "language": str, "harmful": bool, "prompt": str, "reply": str, "ended": bool}
OPTIONAL = {"model": str, "judge": str, "verdict": str, "reply_language": str, "group": str, "system": str,
            "correct": bool}  # fmt: skip


def cells(rows: list[Row], languages: tuple[str, ...]) -> list[dict]:
    """Each row in each language as a record without a reply: id (its own if it has one, else its file and line),
    language, harmful, prompt; in the embedded world also its `combination`, and `group`, the same for all phrasings of
    one request. Rows that do not say whether they are harmful are taken as harmful: so are those of the published test
    sets. Raises InputError for an id that two harmful rows, or two harmless ones, have."""
    records, used = [], set()
    for row in rows:
        own = row.extra.get("id")
        name = Path(row.where).name if own in (None, "") or own != own else str(own)  # only NaN is not itself
        shared = {"id": name, "harmful": row.extra.get("harmful", True)}
        key = tuple(shared.values())
        if key in used:
            raise InputError(f"{row.where}: the id {key[0]!r} is used twice; give each row its own, or none")
        used.add(key)
        if row.system:
            shared["system"] = row.system
        if in_world(row.extra):
            combination = row.extra["combination"]
            shared |= {"combination": combination, "group": "-".join(combination)}
        records += [{"language": code, "prompt": row.prompts[code]} | shared for code in languages]
    return records


def encode(rows: list[Row], tokenizer: Tokenizer, languages: tuple[str, ...]) -> list[list[int]]:
    """Token ids of the prompts, in the order of `cells`. Raises InputError for a row with a system text that the chat
    template has no place for."""
    with refusing("…", ValueError):
        return [ids for row in rows for ids in encode_row_prompts(row, tokenizer, languages).values()]


def in_world(fields: dict) -> bool:
    """Whether this row or record is of the embedded world, whose rows say which verb and object they ask about."""
    combination = fields.get("combination")
    return isinstance(combination, list) and [type(part) for part in combination] == [str, str]


def write_records(path: Path, records: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path, judged: bool) -> list[dict]:
    """Records from generations.jsonl, or `judged` ones from verdicts.jsonl, a verdict of null as unscored. Raises
    InputError with file and line for what is no record, or a reply that comes twice."""
    advice = f"run `python -m mlc_min.safety {'judge' if judged else 'generate'}` first"
    return checked(read_values(path, advice), judged)


def checked(values: Iterable[tuple[dict, str]], judged: bool) -> list[dict]:
    """`read_records` of values that come from anywhere, each with where it stands."""
    records: dict[tuple, dict] = {}
    for record, where in values:
        if problem := problem_of(record, judged):
            raise InputError(f"{where}: {problem}")
        key = (record.get("model"), record["harmful"], record["id"], record["language"])
        if key in records:
            raise InputError(f"{where}: a second reply to {record['id']!r} in {record['language']!r}; keep one")
        records[key] = record | {"verdict": record["verdict"] or "unscored"} if judged else record
    return list(records.values())


def problem_of(record: dict, judged: bool) -> str | None:
    """What is wrong with a record, a field that is missing or of another kind, say; None if nothing is."""
    for name, kind in (FIELDS | OPTIONAL).items():
        if type(record.get(name)) is not kind and (name in FIELDS or record.get(name) is not None):
            return f"field {name!r} is missing or not a {kind.__name__}"
        if name in ("id", "language", "prompt") and not record[name].strip():
            return f"field {name!r} is empty"
    if judged and "verdict" not in record:
        return "field 'verdict' is missing; run `python -m mlc_min.safety judge` first"
    if judged and record["verdict"] not in (*VERDICTS, None):
        return f"verdict {record['verdict']!r:.60}; must be one of {', '.join(VERDICTS)}"
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a character (a lone surrogate) in a text; repair it"
    return None


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
        name = " ".join((record.get("model") or path.resolve().parent.name).split())
        models.setdefault(name, []).append(record)
    return models


def read_object(path: Path) -> dict:
    """The JSON object in a file that a command of ours wrote, {} if there is none. Raises InputError if broken."""
    value = None if path.exists() else {}
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8")) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: not JSON as it was written; delete it, and run again what wrote it")
    return value
