"""Test sets as they lie on disk: a file or a folder, with a column, a file, a folder or a row for each language.

A file's language is what its name ends in (`harmful_test_translated_ko.json`, `zh-CN.csv`), what its folder is called
(`ar/Insult.csv`, as in XSafety, with a file for each category), or what each row says in a field `language`; by code or
by name. Its prompts stand in `prompt` or `instruction`; or, as in PolyRefuse, in `instruction_translated`, and the
English text in `instruction` beside it. Any other file is read as `rows.py` reads it. A file whose name has the word
`harmful` or `harmless` holds prompts of that kind. Files of one kind and category are joined by the rows' `id`, else by
their English text, else by position, and that only if their counts agree and no label of theirs says otherwise.
"""

import re
from collections import defaultdict
from dataclasses import replace
from itertools import combinations, count
from pathlib import Path
from reprlib import repr as shown

from mlc_min.examples import Row
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.files import shipped
from mlc_min.machinery.rows import ENGLISH, find_languages, language_of, make_row, parse_languages, read_values

ENDINGS = (".json", ".jsonl", ".csv", ".tsv")
KINDS = {"harmful": True, "harmless": False}
TRANSLATED = "instruction_translated"
SEPARATOR = re.compile("[-_. ]")
APART = "if they are translations, give all of them the same `id`; else take one language at a time with --languages"
Notes = dict[str, list[str]]  # what there is to say of a test set, and the places that it is said of, if any


def read_test_set(
    path: str | Path, languages: tuple[str, ...] | None = None, kinds: tuple[str, ...] = tuple(KINDS)
) -> tuple[list[Row], list[str]]:
    """The rows of a file or a folder, each with a prompt in every language; and lines that say how many were found in
    which languages, what was joined how, and what was left out.

    languages: codes; None: all that are found. kinds: which files of a folder are read, where names tell the kinds
    apart. Rows of a file whose name tells its kind get the field `harmful`, unless they have it. Raises InputError for
    what cannot be read, for a language that is missing, and where it is not certain which rows belong together.
    """
    path, wanted = shipped(path), languages
    kind, _, code = _named(path.stem)
    sets, left_out = _sets(path, languages, kinds) if path.is_dir() else ([(kind, {code: path})], {})
    rows, told = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for kind, files in sets:
        parts = [part for code, file in files.items() for part in _parts(file, code, languages, len(files) == 1)]
        own, notes = _joined(parts)
        wanted = wanted or tuple(own[0].prompts)
        odd = {code for row in own for code in {*wanted} - row.prompts.keys()} if own else {*wanted}
        if odd := odd | (set() if languages else own[0].prompts.keys() - {*wanted}):
            advice = "add what is missing, or name with --languages those that all prompts are in"
            raise InputError(f"{path}: some of the prompts are not in {', '.join(sorted(odd))}; {advice}")
        what, extra = (f"{kind} prompts", {"harmful": KINDS[kind]}) if kind else ("prompts", {})
        own = [replace(row, prompts={c: row.prompts[c] for c in wanted}, extra=extra | row.extra) for row in own]
        rows[what] += own
        for note, places in (notes | _oddities(own)).items():
            told[what][note] += places
    names = f"languages: {len(wanted)} ({', '.join(wanted)})"
    lines = ["; ".join([f"{what}: {len(own)}, {names}", *_in_words(told[what])]) for what, own in rows.items()]
    return [row for own in rows.values() for row in own], [f"{path}: {line}" for line in lines + _in_words(left_out)]


def read_prompts(
    test: str | Path, harmless: str | Path | None = None, languages: str = "auto"
) -> tuple[list[Row], tuple[str, ...]]:
    """What an evaluation asks: the rows of `test`, and those of `harmless` marked as such; and their languages, those
    given as "en,zh", or all that are found ("auto"). Prints what was found. Raises InputError as `read_test_set`, and
    for a prompt that is among the harmful and among the harmless ones."""
    wanted = None if languages == "auto" else parse_languages(languages)
    rows, lines = read_test_set(test, wanted, ("harmful",) if harmless else tuple(KINDS))
    wanted = wanted or tuple(rows[0].prompts)
    if harmless:
        more, told = read_test_set(harmless, wanted, ("harmless",))
        rows += [replace(row, extra=row.extra | {"harmful": False}) for row in more]
        lines += told
    print("\n".join(lines))
    harmful = {(row.system, *row.prompts.values()): row.where for row in rows if row.extra.get("harmful", True)}
    for row in rows:
        if not row.extra.get("harmful", True) and (other := harmful.get((row.system, *row.prompts.values()))):
            raise InputError(f"{row.where}: the same prompt is harmful in {other}; remove one of the two")
    if not any("harmful" in row.extra for row in rows):
        print(f"{test}: no field 'harmful', so all prompts count as harmful; --harmless adds others")
    return rows, wanted


def _in_words(notes: Notes) -> list[str]:
    """The notes, each with the number of its places and the first three of them."""
    some = {note: ", ".join(own[:3] + (["…"] if len(own) > 3 else [])) for note, own in notes.items()}
    return [f"{note}: {len(own)} ({some[note]})" if own else note for note, own in notes.items()]


def _oddities(rows: list[Row]) -> Notes:
    """What a reader should know of these rows. Raises InputError where one language has the prompts of another."""
    first: dict[tuple, str] = {}
    twice = [row.where for row in rows if first.setdefault(tuple(row.prompts.values()), row.where) != row.where]
    unnamed = [row.where for row in rows if row.where.endswith((".csv:1", ".tsv:1"))]
    notes = {"the same prompt as an earlier one": twice, "a first line, taken for a prompt": unnamed}
    for one, other in combinations(sorted(rows[0].prompts, key="en".__ne__), 2):
        same = [row.where for row in rows if row.prompts[one] == row.prompts[other]]
        if len(same) == len(rows) > 1:
            raise InputError(f"{same[0]}: the prompts in {other} are those in {one}; give the translations")
        notes |= {f"in {other} as in English": same} if one == "en" else {}
    return {note: places for note, places in notes.items() if places}


def _named(stem: str) -> tuple[str | None, str, str | None]:
    """A file's name, without its ending: its kind, what stands before its language, and the language's code.

    >>> _named("Harmful_test_zh-CN"), _named("Arabic"), _named("Insult")
    (('harmful', 'harmful_test', 'zh-CN'), (None, '', 'ar'), (None, 'insult', None))
    """
    starts = (0, *(separator.end() for separator in SEPARATOR.finditer(stem)))
    start = next((start for start in starts if language_of(stem[start:])), len(stem))
    name = stem[:start].rstrip("-_. ").lower()
    return next((kind for kind in KINDS if kind in SEPARATOR.split(name)), None), name, language_of(stem[start:])


def _readable(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()


def _sets(
    folder: Path, languages: tuple[str, ...] | None, kinds: tuple[str, ...]
) -> tuple[list[tuple[str | None, dict[str | None, Path]]], Notes]:
    """[(kind, or None where no name tells, {language: file})], and what belongs to none. There are several of a kind
    only where languages are folders, with a file for each category; those are taken that all languages have."""
    entries, inside, found = sorted(folder.iterdir(), key=lambda entry: (not entry.is_dir(), entry)), {}, {}
    if not any(map(_readable, entries)):
        inside = {entry: code for entry in entries if entry.is_dir() and (code := language_of(entry.name))}
        entries = [file for entry in entries for file in (sorted(entry.iterdir()) if entry in inside else [entry])]
    for file in filter(_readable, entries):
        kind, name, code = _named(file.stem)
        if inside:
            own = inside[file.parent]
            if code not in (None, own):
                raise InputError(f"{file}: its name says {code}, its folder {own}; rename one of the two")
            name, code = re.sub("[-_. ][a-z]$", "", name), own  # XSafety's English files end in `_n`
        files = found.setdefault(kind, {}).setdefault(name, {})
        if code in files:
            raise InputError(f"{file}: holds the same as {files[code].relative_to(folder)}; remove one of them")
        files[code] = file
    if found.keys() - {None}:  # where some names tell the kind, the other files are something else
        found = {kind: found[kind] for kind in kinds if kind in found}
    if not found:
        advice = f"name them like {kinds[0]}_en{ENDINGS[0]} ({', '.join(ENDINGS)}), or give the folder that they are in"
        raise InputError(f"{folder}: holds no files of {' or '.join(kinds)} prompts; {advice}")
    sets, lacking, wanted = [], [], {code for code in inside.values() if not languages or code in languages}
    for kind, own in found.items():
        own = {name: own[name] for name in own if "test" in SEPARATOR.split(name)} or own
        if len(own) > 1 and not inside:
            names = ", ".join(next(iter(files.values())).name for files in own.values())
            advice = "end their names in their languages, or keep each set in a folder of its own"
            raise InputError(f"{folder}: holds several sets, those of {names}; {advice}")
        whole = [(kind, files) for files in own.values() if wanted <= files.keys()]
        lacking += [f"{name} not in {min(wanted - own[name].keys())}" for name in own if wanted - own[name].keys()]
        if not whole:
            raise InputError(f"{folder}: no file has the same name in every language: {', '.join(lacking[:9])}; rename")
        sets += whole
        entries = [file for file in entries if not any(file in files.values() for files in own.values())]
    names = [str(entry.relative_to(folder)) for entry in sorted(entries, key=Path.is_file)]
    notes = {"left out, as not there in every language": lacking, "files left out": names}
    return sets, {note: own for note, own in notes.items() if own}


def _parts(path: Path, code: str | None, languages: tuple[str, ...] | None, alone: bool) -> list[list[Row]]:
    """The file's rows, apart by language where each row has one language; only `languages`, if there are any. code:
    what the name or the folder says. alone: there is no other file, and what the rows say is worth more."""
    if languages and code not in (None, *languages) and not alone:
        return []
    values, fields = read_values(path), {}
    for own, _ in values:
        for name in [name for name in own if len(name) > 3 and language_of(name) not in (None, name, *own)]:
            own[language_of(name)] = own.pop(name)  # a column "Arabic"
        fields |= {name: value for name, value in own.items() if name not in fields}
    if TRANSLATED in fields:
        fields.setdefault("instruction", fields[TRANSLATED])
    try:
        columns = tuple(dict.fromkeys(find_languages(fields, values[0][1]).values()))
    except InputError:
        if not (alone and languages):
            raise
        columns = languages
    by_row = "language" in fields and columns == ("en",)
    if not by_row and (code is None or {*columns} - {"en", code} or (languages and code not in languages)):
        return [[make_row(own, where, languages or columns, languages or columns, {}) for own, where in values]]
    parts: dict[str, list[Row]] = {}
    for row, where in values:
        said = row.pop("language", None) if by_row else code
        own = language_of(said) if isinstance(said, str) else None
        if own is None:
            raise InputError(f"{where}: field 'language' is {shown(said)}; write a code, such as en or zh-CN")
        if code and not alone and own.split("-")[0] != code.split("-")[0]:
            raise InputError(f"{where}: field 'language' is {shown(said)}, but its file is named as one in {code}")
        if TRANSLATED in fields:
            names = {own: [TRANSLATED, *(ENGLISH if own == "en" else [])]}
        else:  # `prompt` is in the row's own language, and English may stand beside it
            names = {} if own in columns else {"en": ["prompt_en"], own: ["prompt", "instruction"]}
        parts.setdefault(own, []).append(make_row(row, where, dict.fromkeys(["en", own]), [own], {}, names))
    return [part for own, part in parts.items() if languages is None or own in languages]


def _joined(parts: list[list[Row]]) -> tuple[list[Row], Notes]:
    """The rows that all parts have, each with the prompts of all; and how they were joined."""
    if len(parts) < 2:
        rows = parts[0] if parts else []
        extra = dict.fromkeys(name for row in rows for name in row.extra if name not in ("id", "harmful"))
        return rows, {f"left alone: {', '.join(extra) or 'nothing'}": []}
    parts = sorted(parts, key=lambda part: part[0].prompts.keys() != {"en"})  # the English file first, if there is one
    how, keys = _keys(parts)
    groups: dict[object, list[Row]] = {}
    for part, own in zip(parts, keys, strict=True):
        for row, key in zip(part, own, strict=True):
            groups.setdefault(key, []).append(row)
    whole = [rows for rows in groups.values() if len(rows) == len(parts)]
    apart = [rows[0].where for rows in groups.values() if len(rows) < len(parts)]
    if not whole:
        raise InputError(f"{parts[0][0].where}: no row has the same {how} in all files, so none can be joined")
    if how != "English text":
        _check_labels(whole, how)
    reason = ", as neither `id` nor an English text is in all of them" if how == "position" else ""
    notes = {f"joined by {how}{reason}": []} | ({"left out, as not in all languages": apart} if apart else {})
    return [_merged(rows, how) for rows in whole], notes


def _keys(parts: list[list[Row]]) -> tuple[str, list[list]]:
    """What rows are joined by, and the key of each row of each part, no two in one part the same."""
    ids = [["" if row.extra.get("id") is None else str(row.extra["id"]) for row in part] for part in parts]
    texts = [[" ".join(row.prompts.get("en", "").split()) for row in part] for part in parts]
    for how, keys in (("id", ids), ("English text", texts)):
        numbered = [_numbered(own) for own in keys]
        for part, own in zip(parts, numbered, strict=True):
            lacking = [row.where for row, (key, _) in zip(part, own, strict=True) if not key]
            if 0 < len(lacking) < len(part):
                raise InputError(f"{lacking[0]}: has no {how}, which other rows have; add it")
            twice = [row.where for row, (_, time) in zip(part, own, strict=True) if time]
            if how == "id" and twice and not lacking:
                raise InputError(f"{twice[0]}: its id stands in another row too; give each row its own")
        if all(map(all, keys)):
            return how, numbered
    fewest, most = min(parts, key=len), max(parts, key=len)
    if len(fewest) < len(most):
        counts = f"the first of {len(fewest)} rows, and {most[0].where} of {len(most)}"
        raise InputError(f"{fewest[0].where}: {counts}, without `id` or English text to join them by; {APART}")
    return "position", [list(range(len(part))) for part in parts]


def _numbered(keys: list[str]) -> list[tuple[str, int]]:
    """Each key, and how many like it came before.

    >>> _numbered(["a", "b", "a"])
    [('a', 0), ('b', 0), ('a', 1)]
    """
    times = defaultdict(count)
    return [(key, next(times[key])) for key in keys]


def _check_labels(groups: list[list[Row]], how: str) -> None:
    """Raise InputError if rows that were put together differ in a field that all rows have, such as a category: once is
    enough if only their order joins them, more than half of them must if ids do. Only values that come in all languages
    count, for it may be translated."""
    for name in sorted(set.intersection(*(set(row.extra) for rows in groups for row in rows)) - {"id"}):
        labels = [[shown(row.extra[name]) for row in rows] for rows in groups]
        shared = set.intersection(*map(set, zip(*labels, strict=True)))
        odd = [i for i, own in enumerate(labels) if len(shared & {*own}) > 1]
        if len(odd) > (len(groups) // 2 if how == "id" else 0):
            both = f"field {name!r} is {' and '.join(dict.fromkeys(labels[odd[0]]))} in rows of the same {how}"
            raise InputError(f"{groups[odd[0]][0].where}: {both}; {APART}")


def _merged(rows: list[Row], how: str) -> Row:
    """One row of those of several files. Raises InputError if they contradict each other."""
    first, prompts = rows[0], {}
    for row in rows:
        for code, text in row.prompts.items():
            if prompts.setdefault(code, text).split() != text.split():
                both = f"{shown(text)} and {shown(prompts[code])}"
                raise InputError(f"{row.where}: the same {how} as {first.where}, but other text in {code}: {both}")
        if (row.system, row.extra.get("harmful")) != (first.system, first.extra.get("harmful")):
            raise InputError(f"{row.where}: the same {how} as {first.where}, but another `harmful` or `system`")
    return replace(first, prompts={code: prompts[code] for code in sorted(prompts, key=lambda code: code != "en")})
