"""Test sets as they lie on disk: each shape gives the right prompts side by side, and each mismatch one clear line."""

import json
import random
import shutil
from pathlib import Path

import pytest

from mlc_min.machinery.errors import InputError
from mlc_min.machinery.folders import read_test_set

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
        ("ko", lambda rows: rows[1].pop("instruction_translated") and None, "field 'instruction_translated' is empty"),
        ("ko", lambda rows: rows[1].update(instruction=""), "row 2: has no English text, which other rows have"),
        ("ko", lambda rows: [r | {"instruction_translated": r["instruction"]} for r in rows], "in ko are the English"),
        ("ko", lambda rows: [{"instruction": r["instruction"]} for r in rows], "in ko are the English"),
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
    assert "of different counts: 4 in " in refused(sample) and "3 in " in refused(sample)
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
    assert f"{tmp_path / 'sw.jsonl'}:1: in another order than {tmp_path / 'en.jsonl'}:1, by its field 'tag'" in error


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
    write(path, [rows[0] | {"language": "Swahili"}, *rows[1:]])
    assert f"{path}:1: field 'language' is 'Swahili'; write a code, such as en or zh-CN" in refused(path)
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
    assert lines[0].endswith("harmful prompts: 3, languages: 2 (en, sw); left alone: id")


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
    assert "harmless_en.csv and harmless_en.json hold the same; remove one of them" in refused(tmp_path)


def test_official_rows_are_read_though_a_response_is_empty(tmp_path):
    path = tmp_path / "pku_test.jsonl"
    turn = [{"from": "human", "value": "How?"}]
    row = {"prompt": turn, "prompt_zh": [{"from": "human", "value": "怎么"}], "rejected": {"from": "gpt", "value": "b"}}
    write(path, [row | {"chosen": {"from": "gpt", "value": value}} for value in ("a", "")])
    assert prompts(path) == [{"en": "How?", "zh": "怎么"}] * 2
    write(path, [{"instruction": "How?", "input": "", "output": out, "prompt_zh": "怎么"} for out in ("a", "")])
    assert prompts(path) == [{"en": "How?", "zh": "怎么"}] * 2
