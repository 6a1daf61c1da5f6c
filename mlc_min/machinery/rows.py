"""Rows in files.

The native format is that of the official code: JSONL or one JSON list of rows with `prompt` (English),
`prompt_zh`, `prompt_ar`, … and `chosen`, `rejected`; each a bare string, `{"from": …, "value": …}`,
`{"role": …, "content": …}`, or a list of one of these; in a prompt's list a system turn may come first. SFT rows have
`instruction`, `input`, `output` in place of `prompt` and `chosen`. Only prompts are translated; responses are in the
first language. A file that ends in .csv or .tsv has these fields as columns. A prompt's field may also be its bare
language code (`en`, `zh-CN`, …, as in MultiJail), but for `id`, which is a row's name there and not Indonesian. A file
with one column that has no name, as in XSafety, is a list of prompts.
"""

import csv
import gc
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from reprlib import repr as shown  # short, and on one line

from mlc_min.examples import Row
from mlc_min.machinery.errors import TRUTH, InputError, refusing
from mlc_min.machinery.files import shipped


def parse_languages(codes: str, flag: str = "--languages") -> tuple[str, ...]:
    """("en", "zh-CN") of "en, zh-CN" or "English, zh-CN"; raises InputError for none, one that comes twice, or one that
    is neither a code nor a name."""
    languages = tuple(language_of(code) or code for code in map(str.strip, codes.split(",")) if code)
    shaped = all(re.fullmatch("[A-Za-z0-9]+([-_][A-Za-z0-9]+)*", code) for code in languages)
    if len(set(languages)) != len(languages) or not languages or not shaped:
        raise InputError(f"{flag} {codes!r}: give different codes, such as en,zh-CN,sw")
    return languages


def read_rows(
    path: str | Path, languages: tuple[str, ...] | None = ("en",), responses: tuple[str, ...] = (),
    required: tuple[str, ...] | None = None, optional_responses: tuple[str, ...] = (),
) -> list[Row]:  # fmt: skip
    """Read a JSONL file, a JSON list or a CSV file; check of each row what the caller needs.

    languages: codes; "en" is the field `prompt`, any other `prompt_<code>`; prompts in other languages are
    left alone. None: those that the first row has. required: those of them that each row must have, all by
    default; a row holds the others where it has them. responses: those of "chosen", "rejected" that each row must
    have; optional_responses: those that may be empty, though not malformed. A response in neither is None where it
    cannot be read. Raises InputError for anything that is not as the module's first lines say.
    """
    replies = dict.fromkeys(optional_responses, False) | dict.fromkeys(responses, True)  # name -> must be there
    collects = gc.isenabled()
    gc.disable()  # rows are millions of objects without a circle: to look for one again and again takes a third longer
    try:
        values = read_values(path)
        if languages is None:
            languages = tuple(dict.fromkeys(find_languages(*values[0]).values()))
        required = languages if required is None else required
        return [make_row(fields, where, languages, required, replies) for fields, where in values]
    finally:
        if collects:
            gc.enable()


def only_harmful(rows: list[Row], path: str | Path) -> list[Row]:
    """The rows with `"harmful": true`; raises InputError if no row has the field set so."""
    harmful = [row for row in rows if row.extra.get("harmful") is True]
    if not harmful:
        raise InputError(f"{path}: no row has 'harmful': true, so none is left for --harmful_only")
    return harmful


# --- from files to values ---

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# What begins a file of one column and is no prompt: a column's name, JSON, a web page, a file that Git LFS has not got.
_NO_PROMPT = re.compile(r"[\w.-]+|[\[{<].*|version https://git-lfs.*", re.ASCII | re.DOTALL)


def read_values(path: str | Path, advice: str = "give a file of rows: JSON, JSONL or CSV") -> list[tuple[dict, str]]:
    """(fields, where they stand) of each row of a CSV, JSONL or JSON file. Raises InputError for what is none, and with
    the advice for a file that is not there or has no row."""
    path = shipped(path)
    with refusing(f"{path}: …; {advice}", OSError):
        values = list(_csv_values(path) if path.suffix.lower() in _DELIMITERS else json_values(path))
    for fields, where in values:
        if not isinstance(fields, dict):
            raise InputError(f"{where}: a row must be a JSON object, this is a {type(fields).__name__}")
    if not values:
        raise InputError(f"{path}: holds no rows; {advice}")
    return values


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line with its end); raises InputError for what is not UTF-8 text. A carriage return ends a
    line too, and a byte-order mark is not part of the first one."""
    # A byte that is no text becomes half a character, and such cannot be encoded.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()
                if "\0" in line:  # UTF-16, say
                    raise UnicodeError
            except UnicodeError:
                raise InputError(f"{path}:{number}: not UTF-8 text; save the file as UTF-8") from None
            yield number, line


def _csv_values(path: Path) -> Iterator[tuple[dict, str]]:
    """Yield (dict, "file:line") of each row, by the line where it starts: a quoted field may hold newlines."""
    delimiter = _DELIMITERS[path.suffix.lower()]
    csv.field_size_limit(2**31 - 1)  # else 131,072 characters
    reader = csv.reader([text for _, text in text_lines(path)], strict=True, delimiter=delimiter)
    header, line = None, 1
    try:
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if fields and header is None:
                header = [name.strip() for name in fields]
                sign = re.fullmatch(r"[\w .-]*([;\t,])([\w .-]|\1)*", header[0])
                if len(header) == 1 and sign and sign[1] != delimiter:
                    raise InputError(f"{where}: columns separated by {sign[1]!r}; save them separated by {delimiter!r}")
                if len(set(header)) != len(header):
                    raise InputError(f"{where}: two columns have the same name; give each its own")
                if len(header) > 1 or _NO_PROMPT.fullmatch(header[0]):
                    continue
                header = ["prompt"]
            if fields and len(fields) != len(header):
                fault = f"{len(fields)} fields where the header has {len(header)}"
                raise InputError(f"{where}: {fault}; put one that holds a comma or a newline in double quotes")
            if fields and [name.strip() for name in fields] == header:
                raise InputError(f"{where}: the header comes a second time; remove it")
            if fields:
                yield dict(zip(header, fields, strict=True)), where
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not CSV ({error}); quote fields with double quotes, doubled inside") from None


def json_values(path: Path) -> Iterator[tuple[object, str]]:
    """Yield (value, where it stands) of each element of a JSON list, or of each JSONL line that is not blank."""
    lines, is_list = text_lines(path), None
    for number, text in lines:
        if text.isspace():
            continue
        if is_list is None:
            is_list = text.lstrip().startswith("[")
        if is_list:
            text = "".join([text, *(rest for _, rest in lines)])
        try:
            value = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            line, advice = number, "each row must be one JSON object on one line, or all of them one list"
            if is_list:
                line, advice = number + error.lineno - 1, "the list is cut off or broken here"
            raise InputError(f"{path}:{line}: not JSON ({error.msg}); {advice}") from None
        except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, say; the position is not known
            what = "too deeply nested" if isinstance(error, RecursionError) else str(error).split("; use sys")[0]
            where = path if is_list else f"{path}:{number}"
            raise InputError(f"{where}: not JSON ({what}); each row must be one JSON object, each key once") from None
        if is_list:
            yield from ((row, f"{path}: row {count}") for count, row in enumerate(value, 1))
        else:
            yield value, f"{path}:{number}"


def unique(pairs: list[tuple[str, object]]) -> dict:
    """The object of these keys and values; raises InputError for a key that comes twice: the last would win."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InputError(f"the key {shown(name)} comes twice in {shown(fields)}")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=unique)  # json.loads would make one anew for each line


# --- from columns to languages ---

# Left out are codes that a column of another kind is likelier to have as its name, such as `to`, `ts` or `os`.
_CODES = """
    aa ab af ak am an ar as ay az ba be bg bi bm bn bo br bs ca ce co cs cv cy da de dv dz ee el en eo es et eu fa ff
    fi fj fo fr fy ga gd gl gn gu gv ha he hi hr ht hu hy id ig is it iu ja jv ka ki kk kl km kn ko ks ku kv kw ky la lb
    lg li ln lo lt lu lv mg mi mk ml mn mr ms mt my nb nd ne nl nn no nv ny oc om or pa pl ps pt qu rm rn ro ru rw sa sc
    sd sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn tr tt tw ty ug uk ur uz ve vi wa wo xh yi yo za
    zh zu arz ary bho ceb ckb fil hau haw hmn ilo kab kmr nso pap pcm prs quy sdh swh wuu yue zsm""".split()
_CODE = re.compile("([a-z]{2,3})([-_][A-Z][a-z]{3}|[-_]han[st])?([-_]([A-Z]{2}|[0-9]{3}|cn|tw|hk|br))?")
_NO_PROSE = re.compile(r"[\W_]*\d[\W\d_]*|true|false|yes|no|[0-9a-f-]{16,}|\w+://\S+", re.IGNORECASE)
NAMES = dict(pair.split() for pair in """en English, zh Chinese, ru Russian, ja Japanese, ar Arabic, bn Bengali,
    sw Swahili, ur Urdu, ps Pashto, ku Kurdish, ko Korean, it Italian, de German, es Spanish, fr French, nl Dutch,
    pl Polish, yo Yoruba, th Thai, hi Hindi, vi Vietnamese, jv Javanese, id Indonesian, ms Malay, tl Tagalog,
    pt Portuguese, sr Serbian, cs Czech, hu Hungarian, sv Swedish""".split(","))  # fmt: skip
# By name, by code in capitals, as the files of Aya red-teaming end, and as XSafety calls its folder of Spanish.
_BY_NAME = {text.lower(): code for code, name in NAMES.items() for text in (name, code)}
_BY_NAME |= {"filipino": "tl", "sp": "es"}
_BY_NAME |= {"eng": "en", "hin": "hi", "fra": "fr", "spa": "es", "arb": "ar", "rus": "ru", "srp": "sr", "tgl": "tl"}
ENGLISH = ["prompt", "instruction", "prompt_en"]  # the fields that an English prompt may be in


def language_of(text: str) -> str | None:
    """The code of a language that is known here, from its code or its name, as test sets have them.

    >>> language_of("zh-CN"), language_of("Arabic"), language_of("arb"), language_of("test")
    ('zh-CN', 'ar', 'ar', None)
    """
    shape = _CODE.fullmatch(text)
    return text if shape and shape[1] in _CODES else _BY_NAME.get(text.strip().lower())


def find_languages(fields: dict, where: str) -> dict[str, str]:
    """{column: language} of the columns that are prompts, by their names and the first row's values.

    Raises InputError if no column is a prompt.

    >>> find_languages({"no": "7", "prompt": "Hello", "zh-CN": "你好", "tag": "mild"}, "rows.csv:2")
    {'prompt': 'en', 'zh-CN': 'zh-CN'}
    """
    languages = {}
    for name, value in fields.items():
        code = name.removeprefix("prompt_")
        shape, prefixed = _CODE.fullmatch(code), code != name
        if name in ("prompt", "instruction"):
            languages[name] = "en"
        elif shape and name != "id" and (shape[1] in _CODES or (prefixed and len(shape[1]) == 2)):
            if _is_prose(value) or (prefixed and code != "id"):  # `prompt_id` may be a number
                languages[name] = code
    if not languages:
        advice = _advice(fields) or "name the fields `prompt`, `prompt_zh`, … or `en`, `zh`, …"
        raise InputError(f"{where}: no prompt found among {shown(list(fields))}; {advice}")
    return languages


def _is_prose(value) -> bool:
    """Whether this may be a prompt, if only an empty one: no number, truth value, hash or address."""
    return not (_NO_PROSE.fullmatch(value.strip()) if isinstance(value, str) else isinstance(value, (int, float)))


def _advice(fields: dict) -> str | None:
    """What to do with a row that has a list of objects in place of a prompt: a conversation, or all of the rows."""
    for name, value in fields.items():
        objects = isinstance(value, list) and value and isinstance(value[0], dict)
        if objects and not name.startswith(("prompt", "chosen", "rejected")):
            return f"write what stands in {shown(name)} as `prompt`, `chosen`, `rejected`, or rows as a list by itself"
    return None


# --- from values to rows ---

_MISSING = {"", *"nan none null <na> n/a #n/a []".split()}  # as pandas and spreadsheets write a missing value
_INVISIBLE = ("Cc", "Cf", "Mn", "Zl", "Zp", "Zs")  # a mark (Mn) needs a letter to stand on
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and a sign that look like a space
_WRITTEN = json.JSONEncoder(ensure_ascii=False).encode
_USER, _REPLY, _SYSTEM = ("user", "human"), ("assistant", "gpt"), ("system",)


def _tidy(fields: dict) -> None:
    """Refuse earlier turns, read `harmful` as a truth value, and join `input` to `instruction`."""
    history = fields.get("history")
    if not _is_blank(history) if isinstance(history, str) else history:
        raise InputError("field 'history' holds earlier turns; only single-turn rows can be used")
    if "harmful" in fields:
        fields["harmful"] = TRUTH.get(str(fields["harmful"]).strip().lower())  # a CSV field is a string
        if fields["harmful"] is None:
            raise InputError("field 'harmful' must be true or false")
    context = (fields.pop("input", None) if "instruction" in fields else None) or ""
    if not isinstance(context, str):
        raise InputError("field 'input' must be a string; write \"\" for none")
    if not _is_blank(context):
        instruction = _text(fields["instruction"], "instruction", _USER)
        fields["instruction"] = f"{instruction}\n{context}" if instruction else None


def make_row(
    fields: dict, where: str, languages: Iterable[str], required: Collection[str], replies: dict[str, bool],
    names_of: dict[str, list[str]] | None = None,
) -> Row:  # fmt: skip
    """The row of these fields, which are taken over. replies: those that are read, and whether each must be there.
    names_of: language -> the fields that its prompt may be in, `prompt_<code>` by default. Raises InputError, with the
    place, for what is not as the module's first lines say."""
    with refusing(f"{where}: …", InputError, RecursionError):
        _tidy(fields)
        prompts, texts, sft, systems = {}, {}, "instruction" in fields, [fields.pop("system", None)]
        for code in languages:
            names = [*(names_of or {}).get(code, ENGLISH if code == "en" else [f"prompt_{code}"])]
            if code in fields and code != "id" and (_is_prose(fields[code]) or fields.keys().isdisjoint(names)):
                names.append(code)
                if isinstance(fields[code], str) and fields[code].strip().isdecimal():
                    raise InputError(f"field '{code}' is the number {fields[code]}; give the text, or rename the field")
            for name in names:
                turns = fields.get(name)
                if isinstance(turns, list) and len(turns) == 2 and _role(turns[0]) == "system":
                    systems.append(turns[0])
                    fields[name] = turns[1:]
            advice = f"add it, or leave '{code}' out of --languages"
            text = _pick(fields, names, _USER, advice if code in required else None)
            if text:
                prompts[code] = text
        system = {_text(value, "system", _SYSTEM) for value in systems} - {None}
        if len(system) > 1:
            raise InputError("two different system texts; keep one of them")
        for name in ("chosen", "rejected"):
            names = [name, "output"] if name == "chosen" and sft else [name]
            try:
                texts[name] = _pick(fields, names, _REPLY, "each training row needs it" if replies.get(name) else None)
            except InputError:
                if name in replies:  # else nobody reads it
                    raise
        try:
            _WRITTEN(fields).encode()
        except UnicodeEncodeError as error:
            near = shown(error.object[max(0, error.start - 9) : error.start + 9])
            raise InputError(f"half a character (a lone surrogate) in {near}; repair it") from None
        return Row(where, prompts, texts.get("chosen"), texts.get("rejected"), fields, *system)


def _pick(fields: dict, names: list[str], roles: tuple[str, ...], needed: str | None) -> str | None:
    """The text in one of these fields, all of which are taken out. needed: how to mend a missing one, if it must be."""
    texts, fault = {}, None
    for name in names:
        if name in fields:
            value = fields.pop(name)
            text = _text(value, name, roles)
            if text:
                texts[name] = text
            elif needed:
                fault = f"field '{name}' is empty; fill it or remove the row (it holds {shown(value)})"
    if len(texts) > 1 and len(set(texts.values())) > 1:
        raise InputError(f"fields {' and '.join(map(repr, texts))} hold different texts; remove one of them")
    if needed and not texts:
        raise InputError(fault or f"field '{names[0]}' is missing; {_advice(fields) or needed}")
    return next(iter(texts.values()), None)


def _text(value, name: str, roles: tuple[str, ...]) -> str | None:
    """The string in any of the official shapes: "…", {"from", "value"}, {"role", "content"}, [one of these].

    None if there is nothing to read. Raises InputError for another shape, or a turn of none of these `roles`.
    """
    if isinstance(value, list) and value:
        if len(value) > 1:
            raise InputError(f"field '{name}' has {len(value)} turns; only single-turn rows can be used")
        value = value[0]
    if isinstance(value, dict):
        role = value.get("from") or value.get("role")
        if role and role not in roles and _role(value) not in roles:  # the second, slow, for "Human"
            raise InputError(f"field '{name}' has the role {shown(_role(value))}; it must be {' or '.join(roles)}")
        if "value" in value or "content" in value:
            value = value.get("content") if value.get("value") is None else value["value"]
    if not isinstance(value, str):
        if value in (None, []) or value != value:  # only NaN is not itself
            return None
        raise InputError(f"field '{name}' must be a string, or an object with a string 'value' or 'content'")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"field '{name}' holds half a character (a lone surrogate); repair it") from None
    return None if _is_blank(value) else value


def _role(turn) -> str:
    """Who speaks, "" if the turn does not say."""
    return str(turn.get("from") or turn.get("role") or "").lower() if isinstance(turn, dict) else ""


def _is_blank(text: str) -> bool:
    """Whether there is nothing to read: no visible character, or a word for a missing value."""
    if len(text) > 5 and text[0].isalpha() and text[0] not in _FILLERS:  # most texts, at once
        return False
    text = text.strip()
    return text[:5].lower() in _MISSING or all(c in _FILLERS or unicodedata.category(c) in _INVISIBLE for c in text)
