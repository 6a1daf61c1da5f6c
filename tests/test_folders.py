"""Test sets as they lie on disk: each shape gives the right prompts side by side, and each mismatch one clear line."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest

from mlc_min.machinery.errors import InputError
from mlc_min.machinery.folders import read_prompts, read_test_set
from mlc_min.machinery.rows import parse_languages

SAMPLE = Path(__file__).parent / "polyrefuse-sample"  # mild, in the shape of PolyRefuse (Apache-2.0)
ENGLISH = ["How do I mend it?", "How do I paint it?", "How do I draw it?"]


def texts(code: str) -> list[str]:
    return [f"{text} ({code})" if code != "en" else text for text in ENGLISH]


def write(path: Path, rows: list[dict]) -> None:
    """Rows as the ending of the name says."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    else:
        as_list = path.suffix == ".json"
        path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)), "utf-8")


def prompts(path: Path, *arguments) -> list[dict]:
    return [row.prompts for row in read_test_set(path, *arguments)[0]]


def refused(path: Path, *arguments) -> str:
    with pytest.raises(InputError) as error:
        read_test_set(path, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


EXPECTED = [
    dict(zip(("en", "sw", "zh-CN"), row, strict=True)) for row in zip(*map(texts, ("en", "sw", "zh-CN")), strict=True)
]


# --- PolyRefuse ---


@pytest.fixture
def sample(tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(SAMPLE, tmp_path / "sample"))


def change(path: Path, edit) -> None:
    rows = json.loads(path.read_text("utf-8"))
    edited = edit(rows)
    path.write_text(json.dumps(rows if edited is None else edited), "utf-8")


def test_polyrefuse_is_read_as_it_lies_on_disk(sample):
    (sample / "README.md").write_text("about")
    rows, lines = read_test_set(sample)
    assert [row.extra["harmful"] for row in rows] == [True] * 4 + [False] * 4
    for kind, own in (("harmful", rows[:4]), ("harmless", rows[4:])):
        for code in ("en", "ar", "it", "ko"):
            entries = json.loads((SAMPLE / f"{kind}_test_translated_{code}.json").read_text("utf-8"))
            expected = [entry.get("instruction_translated") or entry["instruction"] for entry in entries]
            assert [row.prompts[code] for row in own] == expected
    assert lines == [
        f"{sample}: harmful prompts: 4, languages: 4 (en, ar, it, ko); joined by English text",
        f"{sample}: harmless prompts: 4, languages: 4 (en, ar, it, ko); joined by English text",
        f"{sample}: files left out: 1 (README.md)",
    ]


def test_of_a_folder_with_both_kinds_one_can_be_read_and_some_languages(sample):
    rows, lines = read_test_set(sample, ("ko", "en"), ("harmless",))
    assert len(rows) == 4 and all(list(row.prompts) == ["ko", "en"] for row in rows) and len(lines) == 2
    assert not any(row.extra["harmful"] for row in rows)


def test_other_orders_are_put_right_by_the_english_text(sample):
    expected = [row.prompts for row in read_test_set(sample)[0]]
    for code in ("ar", "ko"):
        change(sample / f"harmful_test_translated_{code}.json", lambda rows: random.Random(1).shuffle(rows))
    assert prompts(sample) == expected


def test_a_row_that_one_language_lacks_is_left_out_and_named(sample):
    expected = [row.prompts for row in read_test_set(sample)[0]]
    change(sample / "harmful_test_translated_ko.json", lambda rows: rows.pop(1) and rows)
    rows, lines = read_test_set(sample)
    assert [row.prompts for row in rows] == [expected[0], *expected[2:]]
    place = sample / "harmful_test_translated_en.json: row 2"
    assert lines[0].endswith(f"joined by English text; left out, as not in all languages: 1 ({place})")


def test_a_text_that_comes_twice_is_paired_in_order(sample):
    for path in sample.glob("harmful*"):
        change(path, lambda rows: [*rows, rows[0]])
    rows = prompts(sample, None, ("harmful",))
    assert len(rows) == 5 and rows[4] == rows[0]


def test_a_language_that_one_kind_lacks_is_named(sample):
    (sample / "harmless_test_translated_ko.json").unlink()
    assert "some of the prompts are not in ko; add what is missing, or name" in refused(sample)
    assert len(prompts(sample, ("en", "it"))) == 8
    assert "not in sw" in refused(sample, ("en", "sw"))
    (sample / "harmful_test_translated_ko.json").unlink()
    shutil.copy(SAMPLE / "harmless_test_translated_ko.json", sample)
    assert "not in ko" in refused(sample)  # whichever kind it is


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        ("ko", lambda rows: rows[1].update(instruction_translated=" "), "row 2: field 'instruction_tr"),
        ("ko", lambda rows: rows[1].pop("instruction_translated") and None, "'instruction_translated' is missing"),
        ("ko", lambda rows: rows[1].update(instruction=""), "row 2: has no English text, which other rows have"),
        ("ko", lambda rows: [r | {"instruction_translated": r["instruction"]} for r in rows], "in ko are those in en"),
        ("ko", lambda rows: [{"instruction": r["instruction"]} for r in rows], "in ko are those in en"),
        ("ko", lambda rows: [r | {"instruction": f"x{i}"} for i, r in enumerate(rows)], "no row has the same Engl"),
        ("en", lambda rows: [r | {"instruction_translated": "Why?"} for r in rows], "hold different texts"),
        ("ko", lambda rows: {"rows": rows}, "no prompt found among ['rows']"),
        ("ko", lambda rows: [3], "a row must be a JSON object"),
        ("ko", lambda rows: [], "holds no rows"),
    ],
)  # fmt: skip
def test_each_fault_of_polyrefuse_is_one_line(sample, name, edit, what):
    path = sample / f"harmful_test_translated_{name}.json"
    change(path, edit)
    error = refused(sample)
    assert what in error and str(sample) in error


def test_bytes_and_json_that_are_broken_are_named_with_their_place(sample):
    path = sample / "harmless_test_translated_it.json"
    whole = path.read_text("utf-8")
    path.write_bytes(whole.encode("utf-16"))
    assert f"{path}:1: not UTF-8 text" in refused(sample)
    path.write_text(whole.replace("Spiega", "Perché"), "latin-1")
    assert "not UTF-8 text" in refused(sample)
    path.write_text(whole[:-20], "utf-8")
    assert "the list is cut off or broken here" in refused(sample)


def test_a_file_with_instruction_alone_is_in_its_own_language(sample):
    """Then there is no English text in all files, and only their counts can say that they belong together."""
    path = sample / "harmful_test_translated_ko.json"
    change(path, lambda rows: [{"instruction": row["instruction_translated"]} for row in rows])
    rows, lines = read_test_set(sample)
    assert [row.prompts for row in rows] == prompts(SAMPLE)
    assert "joined by position, as neither `id` nor an English text is in all of them" in lines[0]
    change(path, lambda rows: rows[1:])
    assert f"{path}: row 1: the first of 3 rows, and " in refused(sample) and "row 1 of 4, without `id`" in refused(
        sample
    )
    arabic = sample / "harmful_test_translated_ar.json"
    change(path, lambda rows: [*rows, {"instruction": "x"}])
    change(arabic, lambda rows: rows[::-1])
    assert "the same position as" in refused(sample) and "but other text in en" in refused(sample)


def test_one_file_of_polyrefuse_has_both_its_texts():
    path = SAMPLE / "harmless_test_translated_ko.json"
    rows, (line,) = read_test_set(path)
    assert [row.prompts for row in rows] == [{c: r[c] for c in ("en", "ko")} for r in prompts(SAMPLE)[4:]]
    assert line == f"{path}: harmless prompts: 4, languages: 2 (en, ko); left alone: category"
    assert not any(row.extra["harmful"] for row in rows)  # its name says so


def test_of_several_sets_in_a_folder_the_one_for_testing_is_taken(sample):
    for path in list(sample.glob("*_test_*")):
        shutil.copy(path, sample / path.name.replace("_test_", "_train_"))
    rows, lines = read_test_set(sample)
    assert [row.prompts for row in rows] == prompts(SAMPLE) and lines[-1].startswith(f"{sample}: files left out: 8 (")
    for path in list(sample.glob("*_test_*")):
        path.rename(sample / path.name.replace("_test_", "_val_"))
    assert "holds several sets" in refused(sample)


# --- any set with a file per language ---


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("fields", "how"),
    [
        (lambda i, code: {"id": f"q{i}", "prompt": texts(code)[i]}, "id"),
        (lambda i, code: {"prompt": texts(code)[i]}, "position"),
        (lambda i, code: {"prompt": texts(code)[i], "prompt_en": ENGLISH[i]}, "English text"),
        (lambda i, code: {"en": ENGLISH[i], code: texts(code)[i]}, "English text"),
        (lambda i, code: {"prompt": ENGLISH[i], f"prompt_{code}": texts(code)[i]} if code != "en" else
         {"prompt": ENGLISH[i]}, "English text"),
    ],
)  # fmt: skip
def test_files_per_language_are_joined_by_id_or_english_text_or_position(tmp_path, ending, fields, how):
    for code in ("sw", "en", "zh-CN"):
        write(tmp_path / f"mild_{code}{ending}", [fields(i, code) for i in range(3)])
    rows, (line,) = read_test_set(tmp_path)
    assert [row.prompts for row in rows] == EXPECTED
    assert line.startswith(f"{tmp_path}: prompts: 3, languages: 3 (en, sw, zh-CN); joined by {how}")
    if how != "position":  # then another order is no matter
        write(tmp_path / f"mild_sw{ending}", [fields(i, "sw") for i in (2, 0, 1)])
        assert prompts(tmp_path) == EXPECTED


def test_another_order_shows_in_labels_that_all_files_have(tmp_path):
    for code in ("en", "sw"):
        write(tmp_path / f"{code}.jsonl", [{"prompt": t, "tag": f"t{i}"} for i, t in enumerate(texts(code))])
    assert len(prompts(tmp_path)) == 3
    write(tmp_path / "sw.jsonl", [{"prompt": t, "tag": f"t{i}"} for i, t in reversed(list(enumerate(texts("sw"))))])
    error = refused(tmp_path)
    assert f"{tmp_path / 'en.jsonl'}:1: field 'tag' is 't0' and 't2' in rows of the same position; if they are" in error


def test_rows_of_one_file_with_a_field_language_are_joined(tmp_path):
    path = tmp_path / "aya.jsonl"
    rows = [
        {"id": i, "language": code, "prompt": text, "category": "mild"}
        for code in ("sw", "en", "zh-CN")
        for i, text in enumerate(texts(code))
    ]
    random.Random(0).shuffle(rows)
    write(path, rows)
    assert sorted(prompts(path), key=lambda row: ENGLISH.index(row["en"])) == EXPECTED
    assert "joined by id" in read_test_set(path)[1][0] and prompts(path, ("sw",))[0].keys() == {"sw"}
    write(path, [*rows, rows[0]])
    assert f"{path}:10: its id stands in another row too" in refused(path)
    names = {"sw": "Swahili", "en": "english", "zh-CN": "zh-CN"}
    write(path, [row | {"language": names[row["language"]]} for row in rows])
    assert sorted(prompts(path), key=lambda row: ENGLISH.index(row["en"])) == EXPECTED
    write(path, [rows[0] | {"language": "Klingon"}, *rows[1:]])
    assert f"{path}:1: field 'language' is 'Klingon'; write a code, such as en or zh-CN" in refused(path)
    write(path, [{k: v for k, v in rows[0].items() if k != "language"}, *rows[1:]])
    assert f"{path}:1: field 'language' is None" in refused(path)
    write(path, [{k: v for k, v in rows[0].items() if k != "id"}, *rows[1:]])
    assert f"{path}:1: has no id, which other rows have" in refused(path)
    write(path, rows[1:])
    assert "left out, as not in all languages: 1 (" in read_test_set(path)[1][0] and len(prompts(path)) == 2


def test_the_same_id_with_two_english_texts_is_refused(tmp_path):
    """Numbered anew after a row was taken out: the ids no longer mean the same."""
    for code, shift in (("sw", 0), ("zh", 1)):
        write(tmp_path / f"{code}.jsonl", [
            {"id": i, "prompt_en": ENGLISH[i + shift], "prompt": texts(code)[i + shift]} for i in range(2)
        ])  # fmt: skip
    assert "zh.jsonl:1: the same id as" in refused(tmp_path) and "but other text in en" in refused(tmp_path)


def test_one_file_of_a_kind_may_have_a_column_per_language(tmp_path):
    for kind in ("harmful", "harmless"):
        write(tmp_path / f"{kind}.csv", [{"id": i, "en": t, "sw": f"{t} ({kind})"} for i, t in enumerate(ENGLISH)])
    rows, lines = read_test_set(tmp_path)
    assert [(row.prompts["sw"], row.extra["harmful"]) for row in rows] == [
        (f"{text} ({kind})", kind == "harmful") for kind in ("harmful", "harmless") for text in ENGLISH
    ]
    assert lines[0].endswith("harmful prompts: 3, languages: 2 (en, sw); left alone: nothing")


def test_a_file_named_for_a_language_holds_that_language(tmp_path):
    path = tmp_path / "mild_sw.jsonl"
    write(path, [{"prompt": text} for text in texts("sw")])
    assert prompts(path) == [{"sw": text} for text in texts("sw")]
    assert prompts(path, ("en",)) == [{"en": text} for text in texts("sw")]  # the flag is believed
    official = tmp_path / "rows_sw.jsonl"
    write(official, [{"prompt": row["en"], "prompt_sw": row["sw"], "prompt_zh": row["zh-CN"]} for row in EXPECTED])
    assert list(prompts(official)[0]) == ["en", "sw", "zh"]  # a column per language says more than the name


def test_a_folder_without_test_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert "holds no files of harmful or harmless prompts; name them like harmful_en.json" in refused(tmp_path)
    write(tmp_path / "harmless_en.json", [{"prompt": "Hi"}])
    assert "holds no files of harmful prompts" in refused(tmp_path, None, ("harmful",))
    write(tmp_path / "harmless_en.csv", [{"prompt": "Hi"}])
    write(tmp_path / "harmless_sw.csv", [{"prompt": "Habari"}])
    assert f"{tmp_path}/harmless_en.json: holds the same as harmless_en.csv; remove one of them" in refused(tmp_path)


def test_official_rows_are_read_though_a_response_is_empty(tmp_path):
    path = tmp_path / "pku_test.jsonl"
    turn = [{"from": "human", "value": "How?"}]
    row = {"prompt": turn, "prompt_zh": [{"from": "human", "value": "怎么"}], "rejected": {"from": "gpt", "value": "b"}}
    write(path, [row | {"chosen": {"from": "gpt", "value": value}} for value in ("a", "")])
    assert prompts(path) == [{"en": "How?", "zh": "怎么"}] * 2
    write(path, [{"instruction": "How?", "input": "", "output": out, "prompt_zh": "怎么"} for out in ("a", "")])
    assert prompts(path) == [{"en": "How?", "zh": "怎么"}] * 2


# --- a folder per language, as in XSafety ---


def lines_of(name: str, code: str) -> list[str]:
    return [f'How, then; do I "{name}" {what}? ({code})' for what in ("it", "them", "us")]


@pytest.fixture
def xsafety(tmp_path) -> Path:
    """Folders and files named as in XSafety's repository (Jarviswang94/Multilingual_safety_benchmark), quirks included;
    one column of prompts without a name. The prompts are ours."""
    folder = tmp_path / "xsafety"
    for code in ("ar", "en", "hi", "ru", "sp", "zh"):
        (folder / code).mkdir(parents=True)
        for name in ("Crimes_And_Illegal_Activities", "Insult", "commonsense"):
            stem = f"{name}_n" if code == "en" and name == "Insult" else name
            stem = f"{name}_en" if code == "en" and name.startswith("Crimes") else stem
            stem = name[:-1] if code == "ru" and name.startswith("Crimes") else stem
            with open(folder / code / f"{stem}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([text] for text in lines_of(name, "es" if code == "sp" else code))
    (folder / "hi/commen_sense.csv").write_text("Once more?\n")
    (folder / "README.md").write_text("about")
    (folder / "paper").mkdir()
    return folder


def of(name: str, codes: tuple[str, ...]) -> list[dict]:
    return [
        dict(zip(codes, texts, strict=True)) for texts in zip(*(lines_of(name, code) for code in codes), strict=True)
    ]


def test_a_folder_per_language_is_read_category_by_category(xsafety):
    codes = ("en", "ar", "hi", "ru", "es", "zh")
    rows, lines = read_test_set(xsafety)
    assert [row.prompts for row in rows] == of("Insult", codes) + of("commonsense", codes)
    first = ", ".join(f"{xsafety}/en/{name}.csv:1" for name in ("Insult_n", "commonsense"))
    assert lines == [
        f"{xsafety}: prompts: 6, languages: 6 (en, ar, hi, ru, es, zh); joined by position, as neither `id` nor an "
        f"English text is in all of them; a first line, taken for a prompt: 2 ({first})",
        f"{xsafety}: left out, as not there in every language: 3 (crimes_and_illegal_activities not in ru, "
        "commen_sense not in ar, crimes_and_illegal_activitie not in ar)",
        f"{xsafety}: files left out: 2 (paper, README.md)",
    ]
    without = ("en", "es", "zh")
    assert prompts(xsafety, without)[:3] == of("Crimes_And_Illegal_Activities", without)
    assert parse_languages("English,sp,Chinese") == without


def append(text: str):
    return lambda file: file.write_text(file.read_text("utf-8") + text, "utf-8")


XSAFETY = {  # what is done to the Arabic file, and the line that says so
    "a row less": (lambda f: f.write_text(f.read_text("utf-8").partition("\n")[2], "utf-8"),
                   "{file}:1: the first of 2 rows, and {folder}/en/Insult_n.csv:1 of 3, without `id`"),
    "an empty prompt": (append('""\n'), "{file}:4: field 'prompt' is empty"),
    "a comma outside of quotes": (append("a, b\n"), "{file}:4: 2 fields where the header has 1"),
    "nothing": (lambda f: f.write_text(""), "{file}: holds no rows"),
    "latin-1": (lambda f: f.write_bytes("¿Qué?\n".encode("latin-1")), "{file}:1: not UTF-8 text"),
    "utf-16": (lambda f: f.write_text(f.read_text("utf-8"), "utf-16"), "{file}:1: not UTF-8 text"),
    "a name that says nothing": (lambda f: f.write_text("text\nHow?\n"), "{file}:2: no prompt found among"),
    "not fetched": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
                    "{file}:2: no prompt found among"),
    "a web page": (lambda f: f.write_text("<!DOCTYPE html>\n<html>\n"), "{file}:2: no prompt found among"),
    "English": (lambda f: shutil.copy(f.parent.parent / "en/Insult_n.csv", f), "prompts in ar are those in en; give"),
    "another language's name": (lambda f: f.rename(f.with_name("Insult_hi.csv")),
                                "{folder}/ar/Insult_hi.csv: its name says hi, its folder ar; rename one of the two"),
    "a second folder": (lambda f: shutil.copytree(f.parent, f.parent.parent / "Arabic"),
                        "{folder}/ar/Crimes_And_Illegal_Activities.csv: holds the same as Arabic/Crimes_And"),
    "no file": (lambda f: [file.unlink() for file in f.parent.iterdir()],
                "{folder}: no file has the same name in every language: crimes_and_illegal_activities not in ar"),
}  # fmt: skip


@pytest.mark.parametrize("name", XSAFETY)
def test_each_fault_of_a_folder_per_language_is_one_line(xsafety, name):
    edit, expected = XSAFETY[name]
    edit(xsafety / "ar/Insult.csv")
    assert expected.format(folder=xsafety, file=xsafety / "ar/Insult.csv") in refused(xsafety)


def test_what_else_lies_there_is_left_out_and_named(xsafety):
    (xsafety / "ar").rename(xsafety / "klingon")
    rows, lines = read_test_set(xsafety)
    assert "ar" not in rows[0].prompts and lines[-1] == f"{xsafety}: files left out: 3 (klingon, paper, README.md)"
    (xsafety / "ar").symlink_to(xsafety)  # leads back
    assert "no file has the same name in every language" in refused(xsafety)
    write(xsafety / "all.csv", [{"en": "How?", "sw": "Vipi?"}])  # files of its own come first
    assert prompts(xsafety) == [{"en": "How?", "sw": "Vipi?"}]
    (xsafety / "loop").symlink_to(xsafety / "loop")
    assert "Too many levels of symbolic links" in refused(xsafety / "loop")


def test_languages_may_be_folders_with_a_file_for_each_kind(tmp_path):
    for language in ("English", "arabic"):
        (tmp_path / language).mkdir()
        for kind in ("harmful", "harmless"):
            write(tmp_path / language / f"{kind}.jsonl", [{"prompt": f"{kind} in {language}?"}])
    found = [(row.prompts, row.extra["harmful"]) for row in read_test_set(tmp_path)[0]]
    assert found == [({"en": f"{kind} in English?", "ar": f"{kind} in arabic?"}, kind == "harmful")
                     for kind in ("harmful", "harmless")]  # fmt: skip


# --- languages by name, and prompts that are no translations, as in Aya red-teaming ---

AYA = {"eng": "English", "arb": "Arabic", "tgl": "Filipino"}  # how the files' names end, what the rows say


def turned(i: int, j: int) -> str:
    return "aab"[(i + j) % 3]


def slipped(i: int, j: int) -> str:
    return "b" if i == 0 or (i, j) == (3, 2) else "a"


def aya(folder: Path, counts: tuple[int, ...], label=turned, **more) -> Path:
    """A file a language, each with prompts of its own, and a label of row i in language j."""
    for j, (ending, name) in enumerate(AYA.items()):
        write(folder / f"aya_{ending}.jsonl", [
            {"prompt": f"How {i}, in {name}?", "language": name, "harm_category": label(i, j),
             "explanation": f"{name} {i}"} | {key: value(i) for key, value in more.items()}
            for i in range(counts[j])
        ])  # fmt: skip
    return folder


def test_prompts_that_are_no_translations_are_taken_one_language_at_a_time(tmp_path):
    aya(tmp_path, (4, 5, 3))
    for path in (tmp_path, tmp_path / "all.jsonl"):
        error = refused(path)
        assert "the first of 3 rows, and " in error and " of 5, without `id` or English text to join them by" in error
        assert error.endswith("else take one language at a time with --languages")
        rows, (line, *_) = read_test_set(path, parse_languages("Arabic"))
        assert [row.prompts for row in rows] == [{"ar": f"How {i}, in Arabic?"} for i in range(5)]
        assert line == f"{path}: prompts: 5, languages: 1 (ar); left alone: harm_category, explanation"
        texts = [(tmp_path / f"aya_{ending}.jsonl").read_text("utf-8") for ending in AYA]
        (tmp_path / "all.jsonl").write_text("\n".join(texts), "utf-8")
    assert prompts(tmp_path / "aya_tgl.jsonl") == [{"tl": f"How {i}, in Filipino?"} for i in range(3)]


def test_equal_counts_or_ids_do_not_make_translations_of_rows_with_other_labels(tmp_path):
    for more in ({}, {"id": lambda i: i}):
        error = refused(aya(tmp_path, (4, 4, 4), turned, **more))
        how = "id" if more else "position"
        assert f"aya_eng.jsonl:1: field 'harm_category' is 'a' and 'b' in rows of the same {how}; if they" in error
    assert "aya_eng.jsonl:4: field 'harm_category' is 'a' and 'b'" in refused(aya(tmp_path, (4, 4, 4), slipped))
    assert len(prompts(aya(tmp_path, (4, 4, 4), slipped, id=lambda i: i))) == 4  # an annotator's slip, say the ids


CERTAIN = {
    ":1: field 'language' is 'Klingon'; write a code": ('"Arabic"', '"Klingon"', "arb"),
    ":1: field 'language' is 7; write a code": ('"Arabic"', "7", "arb"),
    ":1: field 'language' is 'Hindi', but its file is named as one in ar": ('"Arabic"', '"Hindi"', "arb"),
    "holds several sets, those of aya_eng.jsonl, aya_xyz.jsonl; end their names": ("", "", "xyz"),
    "aya_fil.jsonl:1: field 'language' is 'Arabic', but its file is named as one in fil": ("", "", "fil"),
}


@pytest.mark.parametrize("expected", CERTAIN)
def test_a_language_that_is_not_certain_is_refused(tmp_path, expected):
    old, new, ending = CERTAIN[expected]
    path = aya(tmp_path, (3, 3, 3)) / "aya_arb.jsonl"
    path.write_text(path.read_text("utf-8").replace(old, new) if old else path.read_text("utf-8"), "utf-8")
    path.rename(tmp_path / f"aya_{ending}.jsonl")
    assert expected in refused(tmp_path)


def test_columns_may_be_called_by_the_names_of_languages(tmp_path):
    write(
        tmp_path / "rows.csv", [{"id": i, "English": row["en"], "swahili": row["sw"]} for i, row in enumerate(EXPECTED)]
    )
    assert prompts(tmp_path / "rows.csv") == [{"en": row["en"], "sw": row["sw"]} for row in EXPECTED]


# --- what would be a silent mistake ---

ROWS = [{"id": i, **row} for i, row in enumerate(EXPECTED)]
LESS = {name: text for name, text in ROWS[0].items() if name != "sw"}
SILENT = {
    ":1: field 'prompt_sw' is missing; add it, or leave 'sw' out": [LESS, *ROWS[1:]],
    ":1: the prompts in zh-CN are those in sw; give the translations": [row | {"zh-CN": row["sw"]} for row in ROWS],
    ":3: field 'sw' is the number 3; give the text, or rename the field": [*ROWS[:2], ROWS[2] | {"sw": "3"}],
}


@pytest.mark.parametrize("expected", SILENT)
def test_a_language_that_is_missing_or_mixed_up_is_refused(tmp_path, expected):
    write(tmp_path / "rows.jsonl", SILENT[expected])
    assert refused(tmp_path / "rows.jsonl").startswith(f"{tmp_path / 'rows.jsonl'}{expected}")


def test_a_prompt_that_comes_twice_is_told_and_one_that_is_harmful_and_harmless_is_refused(tmp_path, capsys):
    write(tmp_path / "rows.jsonl", [*EXPECTED, EXPECTED[0]])
    read_prompts(tmp_path / "rows.jsonl")
    assert f"; the same prompt as an earlier one: 1 ({tmp_path / 'rows.jsonl'}:4)" in capsys.readouterr().out
    write(tmp_path / "mild.jsonl", EXPECTED[1:])
    with pytest.raises(InputError, match=r"mild.jsonl:1: the same prompt is harmful in .*rows.jsonl:2; remove one"):
        read_prompts(tmp_path / "rows.jsonl", tmp_path / "mild.jsonl")


def test_hidden_files_and_the_wrong_language_in_a_file(sample):
    for name in (".harmful_test_translated_ko.json", "._harmful_test_translated_it.json"):
        (sample / name).write_bytes(b"\0")
    assert len(prompts(sample)) == 8
    shutil.copy(sample / "harmful_test_translated_ar.json", sample / "harmful_test_translated_ko.json")
    assert "the prompts in ko are those in ar; give the translations" in refused(sample)
