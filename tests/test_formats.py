"""Data sets read as they come: the official PKU rows, MultiJail's CSV, any CSV or JSONL with a column per language."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlc_min.machinery.errors import InputError
from mlc_min.machinery.rows import only_harmful, read_rows

# As published: a UTF-8 byte-order mark, quotes doubled inside quotes, a newline inside a prompt, CRLF line ends.
MULTIJAIL = (
    "\ufeffid,source,tags,en,zh,it,vi,ar,ko,th,bn,sw,jv\r\n"
    '1,made up,"[\'mild\']","Say ""no"", please","说""不""",it1,vi1,ar1,ko1,th1,bn1,sw1,jv1\r\n'
    '2,made up,[],"First line\nsecond line",zh2,it2,vi2,ar2,ko2,th2,bn2,sw2,jv2\r\n'
)
# As published: a JSON list, turns as lists of {"from", "value"}, responses as one such object.
PKU = [
    {
        "prompt": [{"from": "human", "value": "How do I do it?"}],
        "prompt_zh": [{"from": "human", "value": "怎么做？"}],
        "prompt_sw": [{"from": "human", "value": "Nifanyeje?"}],
        "chosen": {"from": "gpt", "value": "I cannot help."},
        "rejected": {"from": "gpt", "value": "Sure."},
    }
]


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, *arguments) -> str:
    with pytest.raises(InputError) as error:
        read_rows(path, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_multijail_reads_as_it_comes(tmp_path):
    first, second = read_rows(write(tmp_path, "MultiJail.csv", MULTIJAIL), None)
    assert list(first.prompts) == ["en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv"]
    assert first.prompts["en"] == 'Say "no", please' and first.prompts["zh"] == '说"不"'
    assert first.extra == {"id": "1", "source": "made up", "tags": "['mild']"}
    assert second.prompts["en"] == "First line\nsecond line" and second.prompts["jv"] == "jv2"
    assert first.where.endswith("MultiJail.csv:2") and second.where.endswith("MultiJail.csv:3")


def test_official_pku_rows_read_as_they_come_with_the_languages_they_have(tmp_path):
    (row,) = read_rows(write(tmp_path, "test.json", json.dumps(PKU)), None)
    assert row.prompts == {"en": "How do I do it?", "zh": "怎么做？", "sw": "Nifanyeje?"}
    assert (row.chosen, row.rejected) == ("I cannot help.", "Sure.")


@pytest.mark.parametrize("names", [("en", "sw"), ("prompt", "prompt_sw"), ("prompt", "sw")])
@pytest.mark.parametrize("kind", ["csv", "CSV", "jsonl"])
def test_a_column_per_language_under_either_name(tmp_path, names, kind):
    if kind == "jsonl":
        content = json.dumps(dict(zip(names, ("hello", "habari"), strict=True)))
    else:
        content = ",".join(names) + "\nhello,habari\n"
    (row,) = read_rows(write(tmp_path, f"rows.{kind}", content), None)
    assert row.prompts == {"en": "hello", "sw": "habari"}
    (row,) = read_rows(write(tmp_path, f"rows.{kind}", content), ("sw",))
    assert row.prompts == {"sw": "habari"}


def test_the_column_id_is_a_name_and_not_indonesian(tmp_path):
    path = write(tmp_path, "rows.csv", "id,en,prompt_id\n7,hello,halo\n")
    (row,) = read_rows(path, None)
    assert row.prompts == {"en": "hello", "id": "halo"} and row.extra == {"id": "7"}
    path = write(tmp_path, "rows.csv", "id,en\n7,hello\n")
    assert "field 'prompt_id' is missing" in refusal(path, ("en", "id"))


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
texts = st.tuples(anything, anything).map("b".join)  # with something to read


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_any_text_survives_csv(tmp_path_factory, pairs):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("en", "ar"), *pairs])
    path = write(tmp_path_factory.mktemp("csv"), "rows.csv", "\ufeff" + out.getvalue())
    assert [(row.prompts["en"], row.prompts["ar"]) for row in read_rows(path, None)] == pairs


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ("en,zh\nhello\n", 2, "1 fields where the header has 2"),
        ("en,zh\nhello, you,zh\n", 2, "3 fields where the header has 2"),
        ("en,en\nhello,you\n", 1, "two columns have the same name"),
        ('en,zh\n"a\nb",c\n"open,d\n', 4, "not CSV"),
        ("en,zh\nhello,\n", 2, "field 'zh' is empty"),
        ("source,tags\nx,y\n", 2, "no prompt found"),
        ("en,harmful\nhello,perhaps\n", 2, "field 'harmful' must be true or false"),
    ],
)
def test_a_malformed_csv_is_refused_with_its_line(tmp_path, content, line, what):
    path = write(tmp_path, "rows.csv", content)
    assert refusal(path, None).startswith(f"{path}:{line}: {what}")


@pytest.mark.parametrize("content", ["", "en,zh\n", "\n\n"])
def test_a_csv_without_rows_is_refused(tmp_path, content):
    path = write(tmp_path, "rows.csv", content)
    assert refusal(path, None).startswith(f"{path}: holds no rows")


@pytest.mark.parametrize("content", ["en,zh\nä,b\n".encode("latin-1")])
def test_a_csv_that_is_not_utf8_is_refused(tmp_path, content):
    path = write(tmp_path, "rows.csv", content)
    assert refusal(path, None).startswith(f"{path}:2: not UTF-8")


@given(st.binary(max_size=80))
def test_any_csv_gives_rows_or_a_one_line_input_error(tmp_path_factory, content):
    path = write(tmp_path_factory.mktemp("csv"), "rows.csv", b"en,zh\n" + content)
    try:
        rows = read_rows(path, None)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(set(row.prompts) == {"en", "zh"} for row in rows)


@pytest.mark.parametrize(("written", "read"), [("true", True), ("1", True), ("False", False), ("0", False)])
def test_harmful_is_read_from_text_and_from_json(tmp_path, written, read):
    (row,) = read_rows(write(tmp_path, "rows.csv", f"en,harmful\nhello,{written}\n"), None)
    assert row.extra["harmful"] is read
    (row,) = read_rows(write(tmp_path, "rows.jsonl", json.dumps({"prompt": "hello", "harmful": read})))
    assert row.extra["harmful"] is read


def test_only_the_harmful_rows_are_kept(tmp_path):
    path = write(tmp_path, "rows.csv", "en,harmful\na,1\nb,0\nc,1\n")
    assert [row.prompts["en"] for row in only_harmful(read_rows(path), path)] == ["a", "c"]
    path = write(tmp_path, "rows.csv", "en\na\n")
    with pytest.raises(InputError, match="no row has 'harmful': true"):
        only_harmful(read_rows(path), path)
