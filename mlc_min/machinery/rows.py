"""Rows in files.

The native format is that of the official code: JSONL or one JSON list of rows with `prompt` (English),
`prompt_zh`, `prompt_ar`, … and `chosen`, `rejected`; each a bare string, `{"from": …, "value": …}`,
`{"role": …, "content": …}`, or a list of one of these. SFT rows have `instruction`, `input`, `output` in
place of `prompt` and `chosen`. Only prompts are translated; responses are in the first language. A file that
ends in .csv has these fields as columns. A prompt's field may also be its bare language code (`en`, `zh`, …, as in
MultiJail), but for `id`, which is a row's name there and not Indonesian (`prompt_id`).
"""

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from mlc_min.machinery.errors import InputError


@dataclass(frozen=True)
class Row:
    """One training or test row as text."""

    where: str  # "file:line", for messages
    prompts: dict[str, str]  # language code -> prompt
    chosen: str | None = None
    rejected: str | None = None
    extra: dict = field(default_factory=dict)  # every other field, untouched


def parse_languages(codes: str, flag: str = "--languages") -> tuple[str, ...]:
    """Comma-separated language codes; raises InputError for none, or one that comes twice.

    >>> parse_languages("en, zh")
    ('en', 'zh')
    """
    languages = tuple(filter(None, (code.strip() for code in codes.split(","))))
    if len(set(languages)) != len(languages) or not languages:
        raise InputError(f"{flag} {codes!r}: give different codes, such as en,zh,sw")
    return languages


def read_rows(
    path: str | Path,
    languages: tuple[str, ...] | None = ("en",),
    responses: tuple[str, ...] = (),
    required: tuple[str, ...] | None = None,
) -> list[Row]:
    """Read a JSONL file, a JSON list or a CSV file; check that each row has `languages` and `responses`.

    languages: codes; "en" is the field `prompt`, any other `prompt_<code>`; prompts in other languages are
    left alone. None: those that the first row has. required: those of them that each row must have, all by
    default; a row holds the others where it has them. responses: of "chosen", "rejected". Raises InputError for
    anything that is not as the module's first lines say.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # a byte-order mark is not part of the data
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give an existing JSON or JSONL file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    rows = []
    for value, line in _csv_values(text, path) if path.suffix.lower() == ".csv" else _json_values(text, path):
        if languages is None and isinstance(value, dict):
            languages = _languages_in(value, f"{path}:{line}")
        needed = languages if required is None else required
        rows.append(_make_row(value, f"{path}:{line}", languages or (), needed or (), responses))
    if not rows:
        raise InputError(f"{path}: holds no rows; expected one JSON object a line, a JSON list of objects, or CSV")
    return rows


def _languages_in(fields: dict, where: str) -> tuple[str, ...]:
    """The languages that a row has prompts in, in the order of its fields."""
    languages = []
    for name in fields:
        code = name.removeprefix("prompt_") if isinstance(name, str) else ""
        if name in ("prompt", "instruction"):
            languages.append("en")
        elif code != name or (re.fullmatch("[a-z]{2}", code) and code != "id"):
            languages.append(code)
    if not languages:
        raise InputError(f"{where}: no prompt found; name the fields `prompt`, `prompt_zh`, … or `en`, `zh`, …")
    return tuple(dict.fromkeys(languages))


def _csv_values(text: str, path: Path):
    """Yield (dict, line number) of each row; a quoted field may hold newlines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, line = None, 1
    try:
        for fields in reader:
            if fields and header is None:
                header = [name.strip() for name in fields]
                if len(set(header)) != len(header):
                    raise InputError(f"{path}:{line}: two columns have the same name; give each its own")
            elif fields:
                if len(fields) != len(header):
                    raise InputError(
                        f"{path}:{line}: {len(fields)} fields where the header has {len(header)}; "
                        "put a field that holds a comma or a newline in double quotes"
                    )
                yield dict(zip(header, fields, strict=True)), line
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not CSV ({error}); quote fields with double quotes, doubled inside") from None


def _json_values(text: str, path: Path):
    """Yield (value, line number) of each element of a JSON list, or of each JSONL line."""
    decoder = json.JSONDecoder()
    is_list = text.lstrip().startswith("[")
    position = text.index("[") + 1 if is_list else 0
    while True:
        while position < len(text) and text[position].isspace():
            position += 1
        if position == len(text) and not is_list:
            return
        line = text.count("\n", 0, position) + 1
        if is_list and text[position : position + 1] == "]":
            if text[position + 1 :].strip() or text[:position].rstrip().endswith(","):
                raise InputError(f"{path}:{line}: a comma before the ] or text after it; the list must be valid JSON")
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            what = "too deeply nested" if deep else getattr(error, "msg", str(error).split(";")[0])
            raise InputError(f"{path}:{line}: not JSON ({what}); each row must be one JSON object") from None
        yield value, line
        rest = text[end:].lstrip() if is_list else text[end:].split("\n", 1)[0].strip()
        position = end
        if is_list:
            if rest[:1] == ",":
                position = text.index(",", end) + 1
            elif rest[:1] != "]":
                raise InputError(f"{path}:{line}: a comma or ] must follow this row; the list is cut off or broken")
        elif rest:
            raise InputError(f"{path}:{line}: more text after the JSON object; write one object a line")


def _make_row(
    value, where: str, languages: tuple[str, ...], required: tuple[str, ...], responses: tuple[str, ...]
) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a row must be a JSON object, this is a {type(value).__name__}")
    fields = dict(value)
    if "instruction" in fields:  # an SFT row
        instruction = _text(fields.pop("instruction"), "instruction", where)
        context = fields.pop("input", "")
        if not isinstance(context, str):
            raise InputError(f"{where}: field 'input' must be a string; write \"\" for none")
        fields["prompt"] = f"{instruction}\n{context}" if context else instruction
        if "output" in fields:
            fields["chosen"] = fields.pop("output")
    if "harmful" in fields:
        harmful = _TRUTH.get(str(fields["harmful"]).strip().lower())  # a CSV field is a string
        if harmful is None:
            raise InputError(f"{where}: field 'harmful' must be true or false")
        fields["harmful"] = harmful
    prompts = {}
    for language in languages:
        name = "prompt" if language == "en" else f"prompt_{language}"
        if name not in fields and language in fields and language != "id":
            name = language
        if language not in required and fields.get(name) in (None, "", []):
            fields.pop(name, None)
            continue
        if name not in fields:
            raise InputError(f"{where}: field '{name}' is missing; add it, or leave '{language}' out of --languages")
        prompts[language] = _text(fields.pop(name), name, where)
    texts = {}
    for name in ("chosen", "rejected"):
        if name in fields:
            texts[name] = _text(fields.pop(name), name, where)
        elif name in responses:
            raise InputError(f"{where}: field '{name}' is missing; each training row needs it")
    return Row(where, prompts, texts.get("chosen"), texts.get("rejected"), fields)


_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def only_harmful(rows: list[Row], path: str | Path) -> list[Row]:
    """The rows with `"harmful": true`; raises InputError if no row has the field set so."""
    harmful = [row for row in rows if row.extra.get("harmful") is True]
    if not harmful:
        raise InputError(f"{path}: no row has 'harmful': true, so none is left for --harmful_only")
    return harmful


def _text(value, name: str, where: str) -> str:
    """The string in any of the official shapes: "…", {"from", "value"}, {"role", "content"}, [one of these]."""
    if isinstance(value, list):
        if len(value) != 1:
            raise InputError(f"{where}: field '{name}' has {len(value)} turns; only single-turn rows can be used")
        value = value[0]
    if isinstance(value, dict):
        value = value.get("value", value.get("content"))
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{name}' must be a string, or an object with a string 'value' or 'content'")
    if not value.strip():
        raise InputError(f"{where}: field '{name}' is empty; fill it or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: field '{name}' holds half a character (a lone surrogate); repair it") from None
    return value
