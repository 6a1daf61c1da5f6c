"""Rows in files: every shape, layout and fault against hand-typed values. See test_formats.py for whole data sets."""

import csv
import gc
import io
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlc_min.machinery import rows as module
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.rows import Row, find_languages, parse_languages, read_rows

BOTH = ("chosen", "rejected")
LAYOUTS = {
    "jsonl": lambda rows: "\n".join(json.dumps(r) for r in rows),
    "jsonl, unescaped": lambda rows: "\n".join(json.dumps(r, ensure_ascii=False) for r in rows),
    "list on one line": json.dumps,
    "pretty list": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
}
SHAPES = {  # of a text and the names of its speaker
    "bare string": lambda text, who: text,
    "from/value": lambda text, who: {"from": who[0], "value": text},
    "role/content": lambda text, who: {"role": who[1], "content": text},
    "both, one of them null": lambda text, who: {"from": None, "value": None, "role": who[1], "content": text},
    "no role": lambda text, who: {"content": text},
    "list of from/value": lambda text, who: [{"from": who[0], "value": text}],
    "list of role/content": lambda text, who: [{"role": who[1].title(), "content": text}],
    "list of one string": lambda text, who: [text],
}
USER, REPLY = ("human", "user"), ("gpt", "assistant")


def write(folder, content: str | bytes, name: str = "rows.json") -> Path:
    path = Path(folder) / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*rows: dict) -> str:
    return "\n".join(map(json.dumps, rows))


def parts(rows: list[Row]) -> list[tuple]:
    return [(r.prompts, r.chosen, r.rejected, r.extra) for r in rows]


def message(path, *args, **named) -> str:
    """The message read_rows refuses `path` with."""
    with pytest.raises(InputError) as caught:
        read_rows(path, *args, **named)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- rows as they should be ---


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_shape_and_layout_of_the_native_format_reads_to_the_same_row(tmp_path, shape, layout):
    row = {
        "id": 7,
        "prompt": shape("how?", USER),
        "prompt_zh": shape("怎么\u2028办？", USER),
        "chosen": shape("no", REPLY),
        "rejected": shape("yes", REPLY),
    }
    rows = read_rows(write(tmp_path, layout([row, row])), ("en", "zh"), BOTH)
    assert parts(rows) == [({"en": "how?", "zh": "怎么\u2028办？"}, "no", "yes", {"id": 7})] * 2


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "context, prompt",
    [({"input": "b"}, "a\nb"), ({"input": ""}, "a"), ({"input": None}, "a"), ({}, "a")],
    ids=["context", "empty", "null", "absent"],
)
def test_sft_rows_join_instruction_and_input_and_take_output_as_chosen(tmp_path, layout, context, prompt):
    row = {"instruction": "a", "output": "c", "prompt_zh": "z", "history": []} | context
    rows = read_rows(write(tmp_path, layout([row])), ("en", "zh"), ("chosen",))
    assert parts(rows) == [({"en": prompt, "zh": "z"}, "c", None, {"history": []})]


def test_a_row_without_responses_is_a_test_row(tmp_path):
    assert parts(read_rows(write(tmp_path, '{"prompt": "a"}'))) == [({"en": "a"}, None, None, {})]
    path = write(tmp_path, jsonl({"prompt": "a", "output": "b", "harmful": " True\n"}))  # no SFT row
    assert parts(read_rows(path)) == [({"en": "a"}, None, None, {"output": "b", "harmful": True})]


@pytest.mark.parametrize(
    "content, places",
    [
        ('{"prompt": "a"}\n{"prompt": "b"}\n', [":1", ":2"]),
        ('\n{"prompt": "a"}\n \t\n\n{"prompt": "b"}', [":2", ":5"]),
        ('{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n', [":1", ":3"]),
        ('[{"prompt": "a"}, {"prompt": "b"}]', [": row 1", ": row 2"]),
        ('\n[\n  {\n    "prompt": "a"\n  },\n\n  {\n    "prompt": "b"\n  }\n]\n', [": row 1", ": row 2"]),
    ],
    ids=["jsonl", "blank lines", "crlf", "list on one line", "pretty list"],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_where_names_the_line_of_a_row_or_its_number_in_a_list(tmp_path, content, places, mark):
    path = write(tmp_path, mark + content.encode())
    assert [(r.where, r.prompts) for r in read_rows(path)] == [
        (f"{path}{place}", {"en": text}) for place, text in zip(places, "ab", strict=True)
    ]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.sampled_from(list(LAYOUTS)))
def test_any_text_survives_writing_and_reading(texts, layout):
    texts = [f"{text}?" for text in texts]  # with something to see
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, LAYOUTS[layout]([{"prompt": text} for text in texts]))
        assert [r.prompts["en"] for r in read_rows(path)] == texts


@pytest.mark.parametrize("layout, calls", [("jsonl", 40), ("pretty list", 1)])
def test_the_parser_is_called_once_a_line_or_once_a_list(tmp_path, monkeypatch, layout, calls):
    lengths = []

    class Counted(json.JSONDecoder):
        def raw_decode(self, text, idx=0):
            lengths.append(len(text))
            return super().raw_decode(text, idx)

    monkeypatch.setattr(module, "_DECODER", Counted())
    path = write(tmp_path, LAYOUTS[layout]([{"prompt": "a", "id": i} for i in range(40)]))
    assert [row.extra["id"] for row in read_rows(path)] == list(range(40))
    assert len(lengths) == calls and sum(lengths) <= path.stat().st_size  # no text is looked at twice


# --- who needs which field ---

# As published: line 91 of the test file has one empty response, entry 187 of the SFT list one empty output.
PKU = [
    {
        "prompt": [{"from": "human", "value": "Where?"}],
        "prompt_zh": [{"from": "human", "value": "哪里？"}],
        "chosen": {"from": "gpt", "value": value},
        "rejected": {"from": "gpt", "value": "There."},
    }
    for value in ("I cannot say.", "")
]
SFT = [{"instruction": "Where?", "input": "", "output": value, "prompt_zh": "哪里？"} for value in ("Here.", "")]


@pytest.mark.parametrize("rows, layout", [(PKU, "jsonl, unescaped"), (SFT, "pretty list")], ids=["PKU", "SFT"])
def test_the_official_files_read_for_an_evaluation_and_training_names_the_empty_response(tmp_path, rows, layout):
    path = write(tmp_path, LAYOUTS[layout](rows))
    full, empty = read_rows(path, None)
    assert full.prompts == empty.prompts == {"en": "Where?", "zh": "哪里？"}
    assert full.chosen in ("I cannot say.", "Here.") and empty.chosen is None
    optional = read_rows(path, ("en", "zh"), optional_responses=("chosen",))
    assert [row.chosen for row in optional] == [full.chosen, None]
    name, place = ("chosen", ":2") if rows is PKU else ("output", ": row 2")
    assert message(path, None, ("chosen",)).startswith(f"{path}{place}: field '{name}' is empty; fill it")


NOTHING = [None, "", "   ", [], {"value": ""}, {"content": None}, [""], "NaN"]
NOTHING += [float("nan"), "None", " null\n", "<NA>", "N/A", "#N/A", "\u200b\u200d\ufeff", "\x01\x7f", "\u3164"]
NOTHING += ["\u0301"]
WRONG = [7, True, {"text": "a"}, ["a", "b"], {"from": "human", "value": "a"}, "\ud800", [["a"]]]


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_where_nothing_stands_an_optional_response_is_none_and_a_needed_one_is_refused(tmp_path, value):
    path = write(tmp_path, jsonl({"prompt": "a", "chosen": "b", "rejected": value}))
    for named in ({}, {"optional_responses": BOTH}, {"responses": ("chosen",), "optional_responses": ("rejected",)}):
        (row,) = read_rows(path, **named)
        assert (row.chosen, row.rejected, row.extra) == ("b", None, {})
    assert message(path, responses=BOTH).startswith(
        f"{path}:1: field 'rejected' is empty; fill it or remove the row (it"
    )


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_malformed_response_is_a_fault_only_where_responses_are_read(tmp_path, value):
    path = write(tmp_path, jsonl({"prompt": "a", "chosen": "b", "rejected": value}))
    (row,) = read_rows(path)
    assert (row.chosen, row.rejected, row.extra) == ("b", None, {})
    for named in ({"optional_responses": BOTH}, {"responses": BOTH}):
        assert message(path, **named).startswith(f"{path}:1: field 'rejected' ")


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_where_nothing_stands_a_prompt_that_is_not_required_is_left_out(tmp_path, value):
    path = write(tmp_path, jsonl({"prompt": "a", "prompt_zh": value}))
    (row,) = read_rows(path, ("en", "zh"), required=("en",))
    assert (row.prompts, row.extra) == ({"en": "a"}, {})
    assert f"{path}:1: field 'prompt_zh' is empty" in message(path, ("en", "zh"))


def test_an_empty_prompt_that_looks_full_is_quoted(tmp_path):
    assert message(write(tmp_path, jsonl({"prompt": "NaN"}))).endswith("(it holds 'NaN')")
    assert message(write(tmp_path, jsonl({"prompt": "\u200b\n"}))).endswith(r"(it holds '\u200b\n')")


def test_rows_keep_the_translations_they_have_where_only_some_are_required(tmp_path):
    rows = [{"prompt": "a", "prompt_zh": "b", "prompt_ar": ""}, {"prompt": "a", "prompt_ar": "c", "prompt_zh": None}]
    path = write(tmp_path, jsonl(*rows))
    first, second = read_rows(path, ("en", "zh", "ar"), required=("en",))
    assert (set(first.prompts), set(second.prompts)) == ({"en", "zh"}, {"en", "ar"})
    with pytest.raises(InputError, match=r":1: field 'prompt_ar' is empty"):
        read_rows(path, ("en", "zh", "ar"))
    path = write(tmp_path, jsonl({"prompt": "a", "prompt_zh": 7}))
    assert "field 'prompt_zh' must be a string" in message(path, ("en", "zh"), required=("en",))


# --- LLaMA-Factory's columns ---

SYSTEM = {"role": "system", "content": "You are a pirate."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "prompt_zh": "b", "system": "You are a pirate."},
        {"prompt": [SYSTEM, {"role": "user", "content": "a"}], "prompt_zh": "b"},
        {"prompt": [SYSTEM, "a"], "prompt_zh": [{"from": "system", "value": "You are a pirate."}, "b"]},
        {"instruction": "a", "input": "", "prompt_zh": "b", "system": "You are a pirate.", "history": None},
    ],
    ids=["field", "turn", "turn in each language", "SFT"],
)
def test_a_system_text_is_kept_beside_the_prompts(tmp_path, row):
    (read,) = read_rows(write(tmp_path, jsonl(row)), ("en", "zh"))
    assert (read.prompts, read.system) == ({"en": "a", "zh": "b"}, "You are a pirate.")


@pytest.mark.parametrize("empty", [{}, {"system": ""}, {"system": None}, {"history": ""}, {"history": "[]"}], ids=str)
def test_without_a_system_text_there_is_none(tmp_path, empty):
    assert read_rows(write(tmp_path, jsonl({"prompt": "a"} | empty)))[0].system is None


TURNS = "only single-turn rows can be used"
REFUSED = {
    "history": ({"prompt": "a", "history": [["b", "c"]]}, f"field 'history' holds earlier turns; {TURNS}"),
    "history as text": ({"prompt": "a", "history": "b"}, f"field 'history' holds earlier turns; {TURNS}"),
    "two system texts": (
        {"prompt": [SYSTEM, "a"], "system": "Be kind."},
        "two different system texts; keep one of them",
    ),
    "a lone system turn": ({"prompt": [SYSTEM]}, "field 'prompt' has the role 'system'; it must be user or human"),
    "a reply as prompt": (
        {"prompt": {"from": "gpt", "value": "a"}},
        "field 'prompt' has the role 'gpt'; it must be user or human",
    ),
    "an unknown role": (
        {"prompt": {"role": "tool\n", "content": "a"}},
        r"field 'prompt' has the role 'tool\n'; it must be user or human",
    ),
    "system turn before a reply": (
        {"prompt": "a", "chosen": [SYSTEM, {"role": "assistant", "content": "b"}]},
        f"field 'chosen' has 2 turns; {TURNS}",
    ),
    "a user's reply": (
        {"prompt": "a", "chosen": [{"role": "user", "content": "b"}]},
        "field 'chosen' has the role 'user'; it must be assistant or gpt",
    ),
    "instruction beside prompt": (
        {"prompt": "a", "instruction": "b"},
        "fields 'prompt' and 'instruction' hold different texts; remove one of them",
    ),
    "language beside prompt": ({"prompt": "a", "en": "b"}, "fields 'prompt' and 'en' hold different texts; remove one"),
    "output beside chosen": (
        {"instruction": "a", "output": "b", "chosen": "c"},
        "fields 'chosen' and 'output' hold different texts; remove one of them",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a"}], "chosen": "b"},
        "field 'prompt' is missing; write what stands in 'conversations' as `prompt`, `chosen`, `rejected`",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}], "chosen": "b"},
        "field 'prompt' is missing; write what stands in 'messages' as `prompt`, `chosen`, `rejected`",
    ),
    "an object around the rows": (
        {"data": [{"prompt": "a", "chosen": "b"}]},
        "field 'prompt' is missing; write what stands in 'data' as `prompt`, `chosen`, `rejected`, or rows as a",
    ),
}


@pytest.mark.parametrize("row, reason", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("layout, place", [("jsonl", ":2"), ("pretty list", ": row 2")])
def test_what_a_row_cannot_say_here_is_refused_by_line(tmp_path, row, reason, layout, place):
    path = write(tmp_path, LAYOUTS[layout]([{"prompt": "a", "chosen": "b"}, row]))
    assert message(path, ("en",), ("chosen",)).startswith(f"{path}{place}: {reason}")


@pytest.mark.parametrize("other", [{"instruction": "a"}, {"instruction": ""}, {"en": "a"}, {"prompt_en": None}])
def test_the_same_text_or_none_under_a_second_name_is_fine(tmp_path, other):
    path = write(tmp_path, jsonl({"prompt": "a"} | other))
    assert parts(read_rows(path)) == parts(read_rows(path, None)) == [({"en": "a"}, None, None, {})]


# --- languages ---

TEXT = [
    "prompt",
    "prompt_zh",
    "prompt_pt_BR",
    "zh-CN",
    "zh_Hans",
    "sr-Latn",
    "fil",
    "yue",
    "ckb",
    "kmr",
    "hau",
    "es-419",
]


def test_columns_are_languages_by_their_code_and_their_first_value():
    left = {
        "id": "7",
        "no": " 12",  # row numbers
        "is": "True",
        "or": False,
        "hi": 3.5,
        "ta": "2026-11-25",
        "sk": "https://example.org/1",
        "it-IT": "",  # an empty prompt is found, and refused when it is read
        "prompt_id": "0123456789abcdef0123456789abcdef",
    }
    left |= dict.fromkeys(
        ["to", "tag", "src", "url", "raw", "text", "cat", "EN", "prompt_source", "prompt_raw"], "word"
    )
    found = find_languages(left | dict.fromkeys(TEXT, "word"), "rows.csv:2")
    codes = ["en", "zh", "pt_BR", "zh-CN", "zh_Hans", "sr-Latn", "fil", "yue", "ckb", "kmr", "hau", "es-419"]
    assert found == {"it-IT": "it-IT"} | dict(zip(TEXT, codes, strict=True))


def test_a_column_of_norwegian_is_norwegian():
    found = find_languages({"en": "Hello", "no": "Hei", "is": "Halló", "prompt_id": "Halo", "prompt_xx": "?"}, "")
    assert found == {"en": "en", "no": "no", "is": "is", "prompt_id": "id", "prompt_xx": "xx"}


def test_the_codes_stay_as_they_are_written_and_apart(tmp_path):
    row = {"prompt": "a", "zh": "b", "zh-CN": "c", "zh_Hans": "d", "prompt_pt_BR": "e", "no": 3, "source": "f"}
    (read,) = read_rows(write(tmp_path, jsonl(row)), None)
    assert read.prompts == {"en": "a", "zh": "b", "zh-CN": "c", "zh_Hans": "d", "pt_BR": "e"}
    assert read.extra == {"no": 3, "source": "f"}


def test_a_column_of_numbers_beside_a_full_name_is_no_prompt(tmp_path):
    path = write(tmp_path, "no,prompt,prompt_no\n1,a,b\n", "rows.csv")
    assert parts(read_rows(path, ("en", "no"))) == [({"en": "a", "no": "b"}, None, None, {"no": "1"})]


def test_the_languages_are_those_of_the_first_row(tmp_path):
    path = write(tmp_path, jsonl({"en": "a"}, {"en": "b", "zh": "c"}))
    assert [row.prompts for row in read_rows(path, None)] == [{"en": "a"}, {"en": "b"}]
    path = write(tmp_path, jsonl({"en": "a", "zh": "c"}, {"en": "b"}))
    assert message(path, None).startswith(f"{path}:2: field 'prompt_zh' is missing")


def test_a_row_without_a_prompt_is_told_what_it_has(tmp_path):
    path = write(tmp_path, jsonl({"id": 1, "question": "a"}))
    assert message(path, None) == (
        f"{path}:1: no prompt found among ['id', 'question']; name the fields `prompt`, `prompt_zh`, … or `en`, `zh`, …"
    )
    path = write(tmp_path, jsonl({"conversations": [{"from": "human", "value": "a"}]}))
    assert message(path, None).startswith(f"{path}:1: no prompt found among ['conversations']; write what stands in")


@pytest.mark.parametrize("codes", ["", ",", "en,en", "en,pt BR", "en/zh", "en;zh", "en,zh\n-", "-en", "en__zh"])
def test_codes_that_are_none_are_refused_in_one_line(codes):
    with pytest.raises(InputError) as caught:
        parse_languages(codes, "--aligned")
    assert str(caught.value) == f"--aligned {codes!r}: give different codes, such as en,zh-CN,sw"


def test_codes_are_stripped_and_kept_as_written():
    assert parse_languages(" en, zh-CN ,zh,pt_BR,") == ("en", "zh-CN", "zh", "pt_BR")


# --- rows as they should not be ---


def row_text(**changes) -> str:
    """A good row with some fields changed; None removes one."""
    fields = {"prompt": "a", "prompt_zh": "b", "chosen": "c", "rejected": "d"} | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None})


GOOD = row_text()
NOT_TEXT = "must be a string, or an object with a string 'value' or 'content'"
BAD_ROWS = {
    "not an object": ('["a"]', "a row must be a JSON object, this is a list"),
    "no prompt": (row_text(prompt=None), "field 'prompt' is missing; add it, or leave 'en' out of --languages"),
    "no translation": (
        row_text(prompt_zh=None),
        "field 'prompt_zh' is missing; add it, or leave 'zh' out of --languages",
    ),
    "no response": (row_text(rejected=None), "field 'rejected' is missing; each training row needs it"),
    "empty prompt": (row_text(prompt=""), "field 'prompt' is empty; fill it or remove the row"),
    "blank prompt": (row_text(prompt=[{"from": "human", "value": " \n\u3000"}]), "field 'prompt' is empty; fill it"),
    "empty translation": (row_text(prompt_zh=""), "field 'prompt_zh' is empty; fill it or remove the row"),
    "empty response": (row_text(chosen={"from": "gpt", "value": ""}), "field 'chosen' is empty; fill it"),
    "number for text": (row_text(prompt=7), f"field 'prompt' {NOT_TEXT}"),
    "object without text": (row_text(chosen={"from": "gpt"}), f"field 'chosen' {NOT_TEXT}"),
    "null inside": (row_text(prompt={"value": None}), "field 'prompt' is empty; fill it or remove the row"),
    "list in a list": (row_text(prompt=[["a"]]), f"field 'prompt' {NOT_TEXT}"),
    "two turns": (row_text(prompt=["a", "b"]), "field 'prompt' has 2 turns; only single-turn rows can be used"),
    "no turn": (row_text(prompt=[]), "field 'prompt' is empty; fill it or remove the row"),
    "lone surrogate": (
        row_text(rejected="\ud83d"),
        "field 'rejected' holds half a character (a lone surrogate); repair it",
    ),
    "lone surrogate in an id": (
        row_text(id="\ud83d"),
        r"""half a character (a lone surrogate) in '{"id": "\ud83d"}'; repair it""",
    ),
    "lone surrogate in a combination": (
        row_text(combination=["cut", {"a": "\ud83d"}]),
        "half a character (a lone surrogate) in ",
    ),
    "lone surrogate in a name": (row_text(**{"\ud83d": 1}), "half a character (a lone surrogate) in "),
    "wrong input": ('{"instruction": "a", "input": 3}', "field 'input' must be a string; write \"\" for none"),
    "empty instruction": ('{"instruction": ""}', "field 'instruction' is empty; fill it or remove the row"),
    "no instruction for the input": (
        '{"instruction": "", "input": "a"}',
        "field 'instruction' is empty; fill it or remove the row",
    ),
    "perhaps harmful": (row_text(harmful="perhaps"), "field 'harmful' must be true or false"),
    "harmful list": (row_text(harmful=[True]), "field 'harmful' must be true or false"),
}
NOT_JSON = {
    "bad JSON": ('{"prompt": a}', "not JSON ("),
    "cut off": ('{"prompt": "a', "not JSON ("),
    "no object": ("prompt", "not JSON ("),
}
NO_ROW = {  # the parser does not say where in a list
    "deep nesting": ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON (too deeply nested); "),
    "long number": ('{"prompt": "a", "n": ' + "1" * 5000 + "}", "not JSON (Exceeds the limit (4300 digits)"),
    "a key that comes twice": (
        '{"prompt": "a", "prompt": "b"}',
        "not JSON (the key 'prompt' comes twice in {'prompt': 'b'}); ",
    ),
    "a key that comes twice inside": (
        '{"prompt": {"value": "a", "role": "user", "value": "b"}}',
        "not JSON (the key 'value' comes twice in {'role': 'user', 'value': 'b'}); ",
    ),
}
PRETTY = json.dumps(json.loads(GOOD), indent=1)


@pytest.mark.parametrize("bad, reason", (BAD_ROWS | NOT_JSON | NO_ROW).values(), ids=BAD_ROWS | NOT_JSON | NO_ROW)
def test_a_malformed_row_is_refused_with_its_line_and_a_remedy(tmp_path, bad, reason):
    path = write(tmp_path, f"{GOOD}\n\n{bad}\n{GOOD}")
    told = message(path, ("en", "zh"), BOTH)
    assert told.startswith(f"{path}:3: {reason}") and len(told) < len(str(path)) + 200
    if reason.startswith("not JSON"):
        assert "each row must be one JSON object" in told


@pytest.mark.parametrize("bad, reason", (BAD_ROWS | NOT_JSON | NO_ROW).values(), ids=BAD_ROWS | NOT_JSON | NO_ROW)
def test_a_malformed_row_of_a_list_is_refused_with_its_number_if_that_is_known(tmp_path, bad, reason):
    path = write(tmp_path, f"[\n{PRETTY},\n{bad},\n{GOOD}\n]")
    kinds = {": row 2": BAD_ROWS, ":8": NOT_JSON, "": NO_ROW}
    (place,) = (place for place, kind in kinds.items() if (bad, reason) in kind.values())
    assert message(path, ("en", "zh"), BOTH).startswith(f"{path}{place}: {reason}")


ONE_LINE = "each row must be one JSON object on one line, or all of them one list"
BROKEN = "the list is cut off or broken here"


@pytest.mark.parametrize(
    "content, line, advice",
    [
        (f"{GOOD}\n{GOOD} {GOOD}", 2, ONE_LINE),
        (f"{GOOD}\n{GOOD},\n{GOOD}", 2, ONE_LINE),
        (PRETTY, 1, ONE_LINE),
        (json.dumps({"data": [json.loads(GOOD)]}, indent=1), 1, ONE_LINE),
        (f"[\n{GOOD}\n", 3, BROKEN),
        (f"[\n{GOOD},\n{GOOD[:-9]}", 3, BROKEN),
        (f"\n\n[\n{GOOD},\n", 5, BROKEN),
        ("[", 1, BROKEN),
        (f"[\n{GOOD}\n{GOOD}\n]", 3, BROKEN),
        (f"[\n{GOOD},\n,{GOOD}\n]", 3, BROKEN),
        (f"[{GOOD},]", 1, BROKEN),
        (f"[{GOOD}] x", 1, BROKEN),
        (f"[{GOOD}] [{GOOD}]", 1, BROKEN),
    ],
    ids=[
        "two objects on a line",
        "commas in jsonl",
        "a pretty object",
        "a pretty object around the rows",
        "list without end",
        "list cut in a row",
        "list cut after a comma",
        "list cut at once",
        "list without comma",
        "list with two commas",
        "list with a last comma",
        "text after the list",
        "list after the list",
    ],
)
def test_text_between_rows_that_does_not_belong_is_refused_with_its_line(tmp_path, content, line, advice):
    path = write(tmp_path, content)
    told = message(path)
    assert told.startswith(f"{path}:{line}: not JSON (") and told.endswith(f"); {advice}")


@pytest.mark.parametrize(
    "content, line",
    [
        ('{"prompt": "a"}\n{"prompt": "é"}'.encode("latin-1"), 2),
        ('[\n {\n  "prompt": "a",\n  "prompt_zh": "é"\n }\n]'.encode("latin-1"), 4),
        ('{"prompt": "a"}'.encode("utf-16"), 1),
        ('{"prompt": "a"}'.encode("utf-16-le"), 1),
        (b'{"prompt": "a"}\n{"prompt": "\0"}', 2),
        (b'\xef\xbb\xbf{"prompt": "a"}\n\n\xff', 3),
    ],
    ids=["latin-1 jsonl", "latin-1 list", "utf-16", "utf-16 without a mark", "NUL", "after a byte-order mark"],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, content, line, name):
    if name.endswith("csv"):
        content = b"prompt\n" * line + "é\0".encode("utf-16")
        line += 1
    path = write(tmp_path, content, name)
    assert message(path) == f"{path}:{line}: not UTF-8 text; save the file as UTF-8"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b"[\n]\n"])
def test_a_file_without_rows_is_refused_by_name(tmp_path, content):
    path = write(tmp_path, content)
    assert message(path) == f"{path}: holds no rows; give a file of rows: JSON, JSONL or CSV"


def test_a_path_that_is_no_file_is_refused_by_name(tmp_path):
    missing = tmp_path / "missing.json"
    for path in (missing, tmp_path):  # between the two stands the system's own reason
        told = message(path)
        assert told.startswith(f"{path}: ") and "; give a file of rows: JSON" in told


# --- CSV ---


def test_a_csv_row_is_named_by_the_line_where_it_starts(tmp_path):
    path = write(tmp_path, '\ufeffid,"en"\r\n1,"a\r\nb\nc"\r\n\r\n2,d\r\n3,"e\nf"\r\n4,\r\n', "rows.csv")
    assert message(path).startswith(f"{path}:9: field 'en' is empty")
    path.write_bytes(path.read_bytes().replace(b"4,\r\n", b""))
    rows = read_rows(path, None)
    assert [(row.where, row.prompts["en"]) for row in rows] == [
        (f"{path}:2", "a\r\nb\nc"),
        (f"{path}:6", "d"),
        (f"{path}:7", "e\nf"),
    ]


def test_lines_may_end_in_carriage_returns_alone(tmp_path):
    path = write(tmp_path, 'id,en\r1,"a\rb"\r2,c\r', "rows.csv")
    assert [row.prompts["en"] for row in read_rows(path)] == ["a\rb", "c"]


def test_a_long_field_is_read(tmp_path):
    path = write(tmp_path, f"en,zh\n{'a' * 200_000},b\n", "rows.csv")
    assert len(read_rows(path)[0].prompts["en"]) == 200_000


@pytest.mark.parametrize("name", ["rows.tsv", "rows.TSV"])
def test_tab_separated_values_are_read(tmp_path, name):
    path = write(tmp_path, 'en\t zh\tharmful \nHello, you\t"a\tb"\t1\n', name)
    assert parts(read_rows(path, None)) == [({"en": "Hello, you", "zh": "a\tb"}, None, None, {"harmful": True})]


@pytest.mark.parametrize(
    "content, name, reason",
    [
        ("en;zh\na;b, c\n", "rows.csv", "columns separated by ';'; save them separated by ','"),
        ("en\tzh\na\tb\n", "rows.csv", r"columns separated by '\t'; save them separated by ','"),
        ("en,zh\na,b\n", "rows.tsv", r"columns separated by ','; save them separated by '\t'"),
    ],
)
def test_another_separator_is_named(tmp_path, content, name, reason):
    path = write(tmp_path, content, name)
    assert message(path, None) == f"{path}:1: {reason}"


def test_a_column_without_a_name_is_a_list_of_prompts(tmp_path):
    path = write(tmp_path, '"Why, then; and how?"\n"two\nlines"\nthree\n', "rows.csv")
    assert [(row.where, row.prompts["en"]) for row in read_rows(path)] == [
        (f"{path}:1", "Why, then; and how?"), (f"{path}:2", "two\nlines"), (f"{path}:4", "three")]  # fmt: skip
    for first in ("text", "Prompt_1", '"{""a"": 1}"', "<html>", "version https://git-lfs.github.com/spec/v1"):
        assert ":2: no prompt found among" in message(write(tmp_path, f"{first}\nHow?\n", "rows.csv"), None)


def test_a_header_that_comes_again_is_refused(tmp_path):
    """Two files were put one after the other."""
    path = write(tmp_path, "en,zh\na,b\nen, zh\nc,d\n", "rows.csv")
    assert message(path, None) == f"{path}:3: the header comes a second time; remove it"


def test_missing_values_as_pandas_writes_them_are_empty(tmp_path):
    path = write(tmp_path, "en,zh,chosen\na,b,c\nd,nan,<NA>\n", "rows.csv")
    first, second = read_rows(path, ("en", "zh"), (), ("en",), ("chosen",))
    assert (second.prompts, second.chosen, first.chosen) == ({"en": "d"}, None, "c")
    assert message(path, None).startswith(f"{path}:3: field 'zh' is empty; fill it or remove the row (it holds 'nan')")


# --- anything ---

FIELDS = st.sampled_from(
    "prompt prompt_zh zh en chosen rejected instruction input output value content from role system history x".split()
)
SCALARS = st.none() | st.booleans() | st.floats() | st.integers()
SCALARS |= st.sampled_from(["", " ", "a", "\n", "\ud800", "nan", "user", "gpt", "system", "\u200b"]) | st.text()
NESTED = st.deferred(lambda: st.lists(VALUES, max_size=3) | st.dictionaries(FIELDS, VALUES, max_size=4))
VALUES = SCALARS | NESTED
NEARLY_JSON = st.builds(
    lambda values, layout, cut: LAYOUTS[layout](values)[: cut or None].encode("utf-8", "surrogatepass"),
    st.lists(st.dictionaries(FIELDS, VALUES, max_size=4) | VALUES, max_size=4),
    st.sampled_from(list(LAYOUTS)),
    st.integers(-5, 60),
)


def nearly_csv(table: list[list[str]]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(table)
    return out.getvalue().encode("utf-8", "surrogatepass")


NEARLY_CSV = st.lists(st.lists(FIELDS | st.text(max_size=5), max_size=4), max_size=4).map(nearly_csv)


@settings(max_examples=300)
@given(
    st.one_of(st.binary(), st.text().map(str.encode), NEARLY_JSON, NEARLY_CSV), st.sampled_from(["json", "csv", "tsv"])
)
@example(b'{"prompt": "a", "number": ' + b"1" * 5000 + b"}", "json")  # Python turns no longer numeral into an int
@example(b'{"prompt": "a", "prompt_\\n": 1}', "json")
@example(b'{"prompt": "a", "prompt_\\n": 1, "harmful": ' + b"[" * 900 + b"]" * 900 + b"}", "json")
@example(b'{"prompt": "a", "x": ' + b"[" * 985 + b"]" * 985 + b"}", "json")
def test_any_file_gives_rows_or_a_one_line_input_error(content, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, content, f"rows.{kind}")
        for named in ({"responses": ("chosen",)}, {"languages": None}, {"optional_responses": BOTH}):
            try:
                rows = read_rows(path, **named)
            except InputError as error:
                assert re.fullmatch(re.escape(str(path)) + r"(:[0-9]+|: row [0-9]+)?: .+", str(error))
                assert len(str(error).splitlines()) == 1 and len(str(error)) < len(str(path)) + 400
            else:
                assert rows and all(text.strip() for row in rows for text in row.prompts.values())
                json.dumps([vars(row) for row in rows], ensure_ascii=False).encode()


def test_the_collector_runs_again_after_reading_and_after_a_refusal(tmp_path):
    read_rows(write(tmp_path, GOOD))
    assert gc.isenabled()
    message(tmp_path / "missing.json")
    assert gc.isenabled()
    gc.disable()  # as somebody may have done
    try:
        read_rows(write(tmp_path, GOOD))
        assert not gc.isenabled()
    finally:
        gc.enable()
