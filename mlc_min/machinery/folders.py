"""Test sets as they lie on disk: one file, or a folder of files, with a column, a file or a row for each language.

A file's language is what its name ends in (`harmful_test_translated_ko.json`, `zh-CN.csv`), or what each row says in a
field `language`. Its prompts stand in `prompt` or `instruction`; or, as in PolyRefuse, in `instruction_translated`, and
the English text in `instruction` beside it. Any other file is read as `rows.py` reads it. A file whose name has the
word `harmful` or `harmless` holds prompts of that kind. Files of one kind are joined by the rows' `id`, else by their
English text, else by position, and that only if their counts agree.
"""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from reprlib import repr as shown

from mlc_min.examples import Row
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.files import shipped
from mlc_min.machinery.rows import find_languages, is_code, make_row, parse_languages, read_rows, row_values

ENDINGS = (".json", ".jsonl", ".csv", ".tsv")
KINDS = {"harmful": True, "harmless": False}
TRANSLATED = "instruction_translated"


def read_test_set(
    path: str | Path, languages: tuple[str, ...] | None = None, kinds: tuple[str, ...] = tuple(KINDS)
) -> tuple[list[Row], list[str]]:
    """The rows of a file or a folder, each with a prompt in every language; and lines that say how many were found in
    which languages, what was joined how, and what was left out.

    languages: codes; None: all that are found. kinds: which files of a folder are read, where names tell the kinds
    apart. Rows of a file whose name tells its kind get the field `harmful`, unless they have it. Raises InputError for
    what cannot be read, for a language that is missing, and where it is not certain which rows belong together.
    """
    path, rows, lines = shipped(path), [], []
    sets, unread = _sets(path, kinds) if path.is_dir() else ({_kind_in(path.stem): [path]}, [])
    for kind, files in sets.items():
        parts = [part for file in files for part in _parts(file, languages, alone=len(files) == 1)]
        own, how = _joined(parts) if len(parts) > 1 else (parts[0] if parts else [], "")
        wanted = languages or tuple((rows or own)[0].prompts)
        odd = {code for row in own for code in set(wanted) - set(row.prompts)} if own else set(wanted)
        odd |= set() if languages else set(own[0].prompts) - set(wanted)
        if odd:
            advice = "add what is missing, or name with --languages those that all prompts are in"
            raise InputError(f"{path}: some of the prompts are not in {', '.join(sorted(odd))}; {advice}")
        own = [replace(row, prompts={code: row.prompts[code] for code in wanted}) for row in own]
        rows += [replace(row, extra={"harmful": KINDS[kind]} | row.extra) if kind else row for row in own]
        left_alone = f"; left alone: {', '.join(own[0].extra) or 'nothing'}" if len(parts) == 1 else ""
        found = f"{kind or ''} prompts: {len(own)}, languages: {len(wanted)} ({', '.join(wanted)})".strip()
        lines.append(f"{path}: {found}{how}{left_alone}")
    return rows, lines + ([f"{path}: files left out: {_some(unread)}"] if unread else [])


def read_prompts(
    test: str | Path, harmless: str | Path | None = None, languages: str = "auto"
) -> tuple[list[Row], tuple[str, ...]]:
    """What an evaluation asks: the rows of `test`, and those of `harmless` marked as such; and their languages, those
    given as "en,zh", or all that are found ("auto"). Prints what was found. Raises InputError as `read_test_set`."""
    wanted = None if languages == "auto" else parse_languages(languages)
    rows, lines = read_test_set(test, wanted, ("harmful",) if harmless else tuple(KINDS))
    wanted = wanted or tuple(rows[0].prompts)
    if harmless:
        more, told = read_test_set(harmless, wanted, ("harmless",))
        rows += [replace(row, extra=row.extra | {"harmful": False}) for row in more]
        lines += told
    print("\n".join(lines))
    if not any("harmful" in row.extra for row in rows):
        print(f"{test}: no field 'harmful', so all prompts count as harmful; --harmless adds others")
    return rows, wanted


def _some(names: list[str]) -> str:
    """How many they are, and the first three."""
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _code_in(stem: str) -> str | None:
    """The language code that a file's name, without its ending, ends in.

    >>> _code_in("harmful_test_zh-CN"), _code_in("sw"), _code_in("harmful_test")
    ('zh-CN', 'sw', None)
    """
    starts = [0, *(separator.end() for separator in re.finditer("[-_. ]", stem))]
    return next((stem[start:] for start in starts if is_code(stem[start:])), None)


def _kind_in(stem: str) -> str | None:
    """ "harmful" or "harmless" if that is one of the words of a file's name, else None."""
    return next((kind for kind in KINDS if kind in re.split("[-_. ]", stem.lower())), None)


def _sets(folder: Path, kinds: tuple[str, ...]) -> tuple[dict[str | None, list[Path]], list[str]]:
    """{kind, or None where no name tells: its files}, and the names of the files that belong to none of them."""
    found: dict[str | None, dict[str, list[Path]]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in ENDINGS and file.is_file():
            rest = file.stem.removesuffix(_code_in(file.stem) or "").lower()
            found.setdefault(_kind_in(rest), {}).setdefault(rest, []).append(file)
    if found.keys() - {None}:  # where some names tell the kind, the other files are something else
        found = {kind: found[kind] for kind in kinds if kind in found}
    if not found:
        advice = f"name them like {kinds[0]}_en{ENDINGS[0]}, with one of the endings {', '.join(ENDINGS)}"
        raise InputError(f"{folder}: holds no files of {' or '.join(kinds)} prompts; {advice}")
    sets = {}
    for kind, own in found.items():
        tests = [rest for rest in own if "test" in re.split("[-_. ]", rest)] if len(own) > 1 else list(own)
        if len(tests) != 1:
            names = ", ".join(files[0].name for files in own.values())
            raise InputError(f"{folder}: holds several sets, those of {names}; keep each in a folder of its own")
        sets[kind] = own[tests[0]]
        for one, other in pairwise(sorted(sets[kind], key=lambda file: file.stem)):
            if one.stem == other.stem:
                raise InputError(f"{folder}: {one.name} and {other.name} hold the same; remove one of them")
    used = {file for files in sets.values() for file in files}
    return sets, [file.name for file in sorted(folder.iterdir()) if file not in used]


def _parts(path: Path, languages: tuple[str, ...] | None, alone: bool) -> list[list[Row]]:
    """The file's rows, apart by language where each row has one language; only `languages`, if there are any."""
    try:
        values = list(row_values(path))
    except (OSError, RecursionError):
        values = []
    if not values:
        return [read_rows(path, languages)]  # which says what is wrong
    fields = {name: value for fields, _ in reversed(values) for name, value in fields.items()}
    if TRANSLATED in fields:
        fields.setdefault("instruction", fields[TRANSLATED])
    try:
        columns = set(find_languages(fields, values[0][1]).values())
    except InputError:
        if not alone:
            raise
        return [read_rows(path, languages)]
    by_row, code = "language" in fields and columns == {"en"}, _code_in(path.stem)
    if not by_row and code and languages and code not in languages and not alone:
        return []
    if not by_row and (code is None or columns - {"en", code} or (languages and code not in languages)):
        return [read_rows(path, languages)]
    parts: dict[str, list[Row]] = {}
    beside = columns == {"en"} and code != "en" and {"prompt_en", "en"} & fields.keys()
    source = TRANSLATED if TRANSLATED in fields else "prompt" if beside else None
    for row, where in values:
        own = row.pop("language", None) if by_row else code
        if not isinstance(own, str) or not is_code(own):
            raise InputError(f"{where}: field 'language' is {shown(own)}; write a code, such as en or zh-CN")
        parts.setdefault(own, []).append(_row(row, where, own, source or (own if own in columns else None)))
    return [part for own, part in parts.items() if languages is None or own in languages]


def _row(fields: dict, where: str, code: str, source: str | None) -> Row:
    """The row of a file in one language, with the English text where it stands beside the prompt. source: the field of
    the prompt; None: where else an English one stands."""
    if source in (TRANSLATED, "prompt"):
        fields[f"prompt_{code}"] = fields.pop(source, None)
    own = code if source else "en"
    try:
        row = make_row(fields, where, tuple(dict.fromkeys(("en", own))), (own,), {})
    except InputError as error:
        raise InputError(f"{where}: {str(error).replace(f'prompt_{code}', source or code)}") from None
    return row if source else replace(row, prompts={code: row.prompts["en"]})


def _joined(parts: list[list[Row]]) -> tuple[list[Row], str]:
    """The rows that all parts have, each with the prompts of all; and how they were joined, in words."""
    parts = sorted(parts, key=lambda part: part[0].prompts.keys() != {"en"})  # the English file first, if there is one
    how, keys = _keys(parts)
    groups: dict[object, list[Row]] = {}
    for part, own in zip(parts, keys, strict=True):
        for row, key in zip(part, own, strict=True):
            groups.setdefault(key, []).append(row)
    whole = [_merged(rows, how) for rows in groups.values() if len(rows) == len(parts)]
    apart = [rows[0].where for rows in groups.values() if len(rows) < len(parts)]
    if not whole:
        raise InputError(f"{parts[0][0].where}: no row has the same {how} in all files, so none can be joined")
    told = f"; joined by {how}"
    if how == "position":
        told += ", as neither `id` nor an English text is in all of them"
    if apart:
        told += f"; left out, as not in all languages: {_some(apart)}"
    for code in whole[0].prompts.keys() - {"en"}:
        same = sum(row.prompts[code] == row.prompts.get("en") for row in whole)
        if same == len(whole) > 1:
            raise InputError(f"{whole[0].where}: the prompts in {code} are the English ones; give the translations")
        told += f"; in {code} as in English: {same}" if same else ""
    return whole, told


def _keys(parts: list[list[Row]]) -> tuple[str, list[list]]:
    """What rows are joined by, and the key of each row of each part, no two in one part the same."""
    ids = [["" if row.extra.get("id") is None else str(row.extra["id"]) for row in part] for part in parts]
    texts = [[" ".join(row.prompts.get("en", "").split()) for row in part] for part in parts]
    for how, keys in (("id", ids), ("English text", texts)):
        for part, own in zip(parts, keys, strict=True):
            lacking = [row.where for row, key in zip(part, own, strict=True) if not key]
            if 0 < len(lacking) < len(part):
                raise InputError(f"{lacking[0]}: has no {how}, which other rows have; add it")
            twice = [row.where for row, (_, time) in zip(part, _numbered(own), strict=True) if time]
            if how == "id" and twice and not lacking:
                raise InputError(f"{twice[0]}: its id stands in another row too; give each row its own")
        if all(map(all, keys)):
            return how, [_numbered(own) for own in keys]
    if len({len(part) for part in parts}) > 1:
        counts = ", ".join(f"{len(part)} in {part[0].where.rsplit(':', 1)[0]}" for part in parts)
        raise InputError(f"rows without `id` or English text, of different counts: {counts}; add an `id` to each")
    for name in set.intersection(*(set(row.extra) for part in parts for row in part)):
        first, *others = ([shown(row.extra[name]) for row in part] for part in parts)
        for own, part in zip(others, parts[1:], strict=True):
            if own != first and sorted(own) == sorted(first):
                i = [a == b for a, b in zip(own, first, strict=True)].index(False)
                raise InputError(f"{part[i].where}: in another order than {parts[0][i].where}, by its field {name!r}")
    return "position", [list(range(len(part))) for part in parts]


def _numbered(keys: list[str]) -> list[tuple[str, int]]:
    """Each key, and how many like it came before.

    >>> _numbered(["a", "b", "a"])
    [('a', 0), ('b', 0), ('a', 1)]
    """
    times: Counter = Counter()
    numbered = []
    for key in keys:
        numbered.append((key, times[key]))
        times[key] += 1
    return numbered


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
