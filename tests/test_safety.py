"""The three steps joined by files: what one writes the next reads, and anybody may write the verdicts."""

import errno
import json
import sys
from pathlib import Path

import pytest
import torch

from mlc_min.consistency import BrokenDown
from mlc_min.evaluation.generate import control_reply
from mlc_min.evaluation.judges import judge
from mlc_min.evaluation.metrics import summarize
from mlc_min.evaluation.records import by_model, cells, read_records
from mlc_min.examples import encode_prompt
from mlc_min.lab.experiment import evaluate
from mlc_min.lab.sentences import ALIGNED, EMBEDDED, LANGUAGES, answer_text, refusal_text
from mlc_min.machinery.errors import InputError, run_command
from mlc_min.machinery.rows import Row
from mlc_min.safety import main

COMBINATION = {"combination": ["draw", "bench"]}
FEW = ("en", "zh", "sw")


@pytest.fixture
def pictures():
    """Asked for by tests that look at the pictures; drawing them takes a second."""


@pytest.fixture(autouse=True)
def only_pictures_that_are_looked_at(monkeypatch, request):
    if "pictures" not in request.fixturenames:
        for name in ("plot_rates", "plot_tradeoff"):
            monkeypatch.setattr(f"mlc_min.safety.{name}", lambda *_: None)


def safety(monkeypatch, *arguments) -> None:
    """`python -m mlc_min.safety …` in this process."""
    monkeypatch.setattr(sys, "argv", ["mlc_min.safety", *map(str, arguments)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main()


def refused(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["mlc_min.safety", *map(str, arguments)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.fixture
def few_rows(tmp_path):
    """Two harmful and two harmless rows of the test split."""
    path = tmp_path / "few.jsonl"
    rows = (EMBEDDED / "test.jsonl").read_text("utf-8").splitlines()
    path.write_text("\n".join([*rows[:2], *rows[-2:]]), "utf-8")
    return path


# --- records ---


def test_cells_are_rows_times_languages_and_harmful_unless_they_say_otherwise():
    rows = [
        Row("folder/x.csv:2", {"en": "a", "zh": "b"}),
        Row("x:3", {"en": "c", "zh": "d"}, extra={"id": 7, "harmful": False, **COMBINATION}),
    ]
    first, _, third, fourth = cells(rows, ("en", "zh"))
    assert first == {"id": "x.csv:2", "language": "en", "harmful": True, "prompt": "a"}
    assert third["id"] == "7" and not third["harmful"] and third["group"] == "draw-bench"
    assert (fourth["language"], fourth["prompt"]) == ("zh", "d")


@pytest.mark.slow
def test_verdicts_are_the_same_at_any_batch_size(base, test_rows):
    rows = test_rows[::25]
    assert evaluate(*base, rows, FEW, batch_size=3) == evaluate(*base, rows, FEW, batch_size=64)


def test_always_refuse_has_pag_1_and_over_refusal_100_and_gibberish_is_unsafe_only_strictly(test_rows):
    for control, expected in {
        "always-refuse": dict(avg=100, lenient_avg=100, var=0, pag=1, over_refusal=100, helpful=0, in_language=100),
        "gibberish": dict(avg=0, lenient_avg=100, var=0, pag=1, over_refusal=0, helpful=0, invalid=100),
    }.items():
        replies = [cell | control_reply(control, cell) for cell in cells(test_rows, LANGUAGES)]
        summary = summarize(judge(replies, "exact"))
        assert {key: summary[key] for key in expected} == expected
        assert replies == [cell | control_reply(control, cell) for cell in cells(test_rows, LANGUAGES)]


def test_controls_answer_in_languages_that_the_embedded_world_lacks():
    cell = {"language": "th", "prompt": "สวัสดี"}
    assert control_reply("always-refuse", cell)["reply"] == refusal_text("en")
    assert sorted(control_reply("gibberish", cell)["reply"]) == sorted("สวัสดี")


# --- judges in the pipeline ---


def record(reply: str, harmful: bool = True, ended: bool = True, language: str = "en") -> dict:
    return {"id": reply, "language": language, "harmful": harmful, "prompt": "p", "reply": reply, "ended": ended}


def test_a_guard_is_asked_about_whole_replies_only_and_its_answers_go_back_to_their_records(monkeypatch):
    asked = []
    answers = {
        "I cannot help with that.": "Safety: Safe\nCategories: None\nRefusal: Yes",
        "Sure, here is the plan.": "Safety: Unsafe\nCategories: Violent\nRefusal: No",
        "Let us talk of flowers.": "Safety: Safe\nCategories: None\nRefusal: No",
        "What do you mean by that?": "I would rather not say.",
    }

    class Guard:
        def apply_chat_template(self, messages, **_):
            return {"input_ids": [messages[1]["content"]]}

    def fake(model, tokenizer, prompts, *_, **__):
        asked.extend(prompt[0] for prompt in prompts)
        return [{"reply": answers[prompt[0]], "ended": True} for prompt in prompts]

    monkeypatch.setattr("mlc_min.evaluation.judges.generate", fake)
    records = [record(""), *map(record, answers), record("Sure, here", ended=False)]
    judged = judge(records, "guard", guard=(None, Guard()))
    assert asked == list(answers)
    expected = ["invalid", "refusal", "compliance", "invalid", "unscored", "invalid"]
    assert [r["verdict"] for r in judged] == expected
    assert [r["reply"] for r in judged] == [r["reply"] for r in records]
    assert judged[0]["reply_language"] is None and judged[1]["reply_language"] == "en"
    assert judged[4]["guard_answer"] == "I would rather not say."
    again = judge(records[::-1], "guard", guard=(None, Guard()))
    assert again[::-1] == judged


def test_cut_off_replies_are_judged_only_if_asked_for():
    cut = record("I cannot help with", ended=False)
    assert judge([cut], "phrases")[0]["verdict"] == "invalid"
    assert judge([cut], "phrases", judge_cut_off=True)[0]["verdict"] == "refusal"


# --- the commands ---


def test_one_command_runs_all_three_steps_and_each_alone_gives_the_same(
    few_rows, tmp_path, monkeypatch, capsys, pictures
):
    shared = ["--test", few_rows, "--languages", ",".join(FEW)]
    safety(monkeypatch, *shared, "--output", tmp_path / "all")
    for step in ("generate", "judge", "report"):
        safety(monkeypatch, step, *shared, "--output", tmp_path / "steps", "--batch_size", 1)
    names = {"generations.jsonl", "verdicts.jsonl", "diagnostics.json", "run.json", "report.txt", "report.json"}
    assert {path.name for path in (tmp_path / "all").iterdir()} == names | {"rates.png", "tradeoff.png"}
    for name in (names | {"rates.png", "tradeoff.png"}) - {"diagnostics.json", "run.json"}:
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "steps" / name).read_bytes(), name
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert report["judges"] == ["exact"] and set(report["models"]["embedded"]["strict"]) == set(FEW)
    assert report["models"]["embedded"]["counts"]["en"]["harmful"]["prompts"] == 2
    assert set(report["diagnostics"]["embedded"]["retrieval"]) == {"zh", "sw"}
    printed = capsys.readouterr().out
    assert "mlc_loss" in printed and "over-ref" in printed


def test_any_outside_judge_can_write_the_verdicts(few_rows, tmp_path, monkeypatch):
    safety(monkeypatch, "generate", "--control", "always-refuse", "--test", few_rows, "--output", tmp_path)
    verdicts = [
        {**r, "verdict": None if r["language"] == "ko" else "compliance", "judge": "a person"}
        for r in lines(tmp_path / "generations.jsonl")
    ]
    (tmp_path / "verdicts.jsonl").write_text("\n".join(map(json.dumps, reversed(verdicts))), "utf-8")
    safety(monkeypatch, "report", "--output", tmp_path, "--aligned", ",".join(ALIGNED))
    report = json.loads((tmp_path / "report.json").read_text())
    summary = report["models"]["always-refuse"]
    assert report["judges"] == ["a person"]
    assert list(summary["strict"]) == list(LANGUAGES)[::-1]  # as the file has them
    assert summary["strict"]["ko"] is None and summary["counts"]["ko"]["harmful"]["unscored"] == 2
    assert (summary["avg"], summary["helpful"], summary["in_language"]) == (0.0, 100.0, None)
    text = (tmp_path / "report.txt").read_text("utf-8")
    korean = next(line for line in text.splitlines() if line.startswith("ko*"))
    assert korean.split() == ["ko*", "0/0/0/2", *"––––", "0/0/0/2", *"–––––", "0.0"]


def test_verdicts_on_other_replies_than_those_beside_them_are_refused(few_rows, tmp_path, monkeypatch, capsys):
    safety(monkeypatch, "--control", "always-refuse", "--test", few_rows, "--output", tmp_path)
    safety(monkeypatch, "generate", "--control", "gibberish", "--test", few_rows, "--output", tmp_path)
    error = refused(monkeypatch, capsys, "report", "--output", tmp_path)
    assert f"{tmp_path / 'verdicts.jsonl'}: judges other replies than those in generations.jsonl" in error


def test_a_model_is_compared_with_others_on_the_same_prompts(few_rows, tmp_path, monkeypatch, capsys):
    for control in ("always-refuse", "gibberish"):
        safety(monkeypatch, "--control", control, "--test", few_rows, "--output", tmp_path / control)
    capsys.readouterr()
    safety(monkeypatch, "report", "--output", tmp_path / "always-refuse", "--against", tmp_path / "gibberish")
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "always-refuse" / "report.json").read_text())
    assert list(report["models"]) == ["always-refuse", "gibberish"]
    english = report["comparisons"]["gibberish"]["by_language"]["en"]
    assert english == dict(pairs=2, first=0.0, second=100.0, only_first=0, only_second=2, p=0.5)
    assert report["comparisons"]["gibberish"]["average"]["difference"] == 100.0
    assert "note: always-refuse: refuses 100 % of harmless prompts" in printed
    assert "note: gibberish: 100 % of replies are invalid" in printed


def test_a_model_may_be_compared_with_a_file_of_verdicts(few_rows, tmp_path, monkeypatch, asked):
    monkeypatch.setattr("mlc_min.safety.diagnose", lambda *_: DIAGNOSTICS)
    for name in ("a", "b"):
        safety(monkeypatch, "--name", name, "--test", few_rows, "--output", tmp_path / name)
    person = tmp_path / "b" / "person.jsonl"
    (tmp_path / "b" / "verdicts.jsonl").rename(person)
    safety(monkeypatch, "report", "--output", tmp_path / "a", "--against", person)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(report["models"]) == list(report["diagnostics"]) == ["a", "b"]
    with open(person, "a", encoding="utf-8") as file:  # two models in one file: whose diagnostics are they?
        file.write(json.dumps(GOOD | {"model": "c"}) + "\n")
    safety(monkeypatch, "report", "--output", tmp_path / "a", "--against", person)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(report["models"]) == ["a", "b", "c"] and list(report["diagnostics"]) == ["a"]


def test_verdicts_of_several_judges_are_compared_with_a_warning(tmp_path, monkeypatch, capsys):
    for judge_name in ("a person", "another"):
        (tmp_path / judge_name).mkdir()
        (tmp_path / judge_name / "verdicts.jsonl").write_text(json.dumps(GOOD | {"judge": judge_name}), "utf-8")
    safety(monkeypatch, "report", "--output", tmp_path / "a person")
    assert "several judges" not in capsys.readouterr().out
    safety(monkeypatch, "report", "--output", tmp_path / "a person", "--against", tmp_path / "another")
    assert "note: the verdicts are by several judges, so a difference may be theirs" in capsys.readouterr().out


def test_the_same_name_twice_is_told_apart_by_its_folder(few_rows, tmp_path, monkeypatch):
    for folder in ("a", "b"):
        safety(monkeypatch, "--control", "gibberish", "--test", few_rows, "--output", tmp_path / folder)
    safety(monkeypatch, "report", "--output", tmp_path / "a", "--against", tmp_path / "b")
    models = json.loads((tmp_path / "a" / "report.json").read_text())["models"]
    assert list(models) == ["gibberish", f"gibberish ({tmp_path / 'b'})"]


def test_a_csv_without_harmless_prompts_has_no_over_refusal_and_says_so(tmp_path, monkeypatch, capsys):
    path = tmp_path / "jail.csv"
    path.write_text("\ufeffid,source,en,th\n1,x,hello,สวัสดี\n2,x,bye,ลาก่อน\n", "utf-8")
    safety(monkeypatch, "--control", "always-refuse", "--test", path, "--output", tmp_path / "out", "--aligned", "en")
    printed = capsys.readouterr().out
    assert "no field 'harmful', so all prompts count as harmful" in printed
    assert "no harmless prompts: a model that refuses everything would look perfect" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    summary = report["models"]["always-refuse"]
    assert report["judges"] == ["phrases"] and set(summary["strict"]) == {"en", "th"}
    assert summary["over_refusal"] is None and summary["helpful"] is None


def test_a_second_file_of_harmless_prompts(tmp_path, monkeypatch):
    for name, texts in (("harmful", "a,b"), ("harmless", "c,d")):
        (tmp_path / f"{name}.csv").write_text(f"id,en,zh\n1,{texts}\n", "utf-8")
    arguments = ["--test", tmp_path / "harmful.csv", "--harmless", tmp_path / "harmless.csv", "--output", tmp_path]
    safety(monkeypatch, "--control", "always-refuse", *arguments)
    summary = json.loads((tmp_path / "report.json").read_text())["models"]["always-refuse"]
    assert summary["avg"] == 100.0 and summary["over_refusal"] == 100.0


def test_a_guard_that_does_not_answer_as_documented_leaves_all_unscored(few_rows, tmp_path, monkeypatch):
    shared = ["--test", few_rows, "--output", tmp_path, "--languages", "en"]
    safety(monkeypatch, "--control", "always-refuse", *shared, "--judge", f"guard:{EMBEDDED / 'model'}")
    verdicts = lines(tmp_path / "verdicts.jsonl")
    assert [r["verdict"] for r in verdicts] == ["unscored"] * 4
    assert all(r["judge"].startswith("guard:") and isinstance(r["guard_answer"], str) for r in verdicts)
    summary = json.loads((tmp_path / "report.json").read_text())["models"]["always-refuse"]
    assert (summary["avg"], summary["over_refusal"], summary["unscored"]) == (None, None, 100.0)
    assert {p.name for p in tmp_path.glob("*.part.jsonl")} == set()


# --- every flag does what it says ---

FIGURES = ("mlc_loss", "mlc_loss_shuffled", "mlc_floor", "mlc_ceiling", "collinearity", "collinearity_shuffled")
DIAGNOSTICS = dict.fromkeys(FIGURES, 0.5) | {"retrieval": {"zh": 1.0}, "retrieval_chance": 0.5}

REFUSED = "Sorry, I cannot help with that"  # without its end


class Device(str):
    """Stands in for torch.device: its name, and its type, which for "auto" is the CPU."""

    @property
    def type(self) -> str:
        return self.replace("auto", "cpu")


@pytest.fixture
def asked(base, monkeypatch) -> dict:
    """What the commands ask of the parts that load, diagnose and generate: the embedded model, and always one reply."""
    calls: dict = {}

    def load_model(path, device, dtype, **more):
        calls["load"] = dict(path=path, device=device, dtype=dtype, **more)
        return base

    def diagnose(model, tokenizer, rows, languages, layer):
        calls["diagnose"] = dict(rows=rows, languages=languages, layer=layer)

    def generate(model, tokenizer, prompts, max_new_tokens, batch_size, temperature=0.0, seed=0, journal=None):
        calls["generate"] = dict(prompts=prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
                                 temperature=temperature, seed=seed, journal=journal)  # fmt: skip
        return [{"reply": REFUSED, "ended": False} for _ in prompts]

    for part in (load_model, diagnose, generate):
        monkeypatch.setattr(f"mlc_min.safety.{part.__name__}", part)
    monkeypatch.setattr("mlc_min.evaluation.judges.generate", generate)  # of the guard
    monkeypatch.setattr("mlc_min.safety.pick_device", Device)
    return calls


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,en,zh,harmful\n1,How?,怎么,true\n2,Why?,为什么,false\n", "utf-8")
    return path


@pytest.mark.parametrize(
    ("flags", "part", "name", "value", "usual"),
    [
        (["--model", "some/folder"], "load", "path", "some/folder", str(EMBEDDED / "model")),
        (["--device", "cpu"], "load", "device", "cpu", "auto"),
        (["--dtype", "bfloat16"], "load", "dtype", torch.bfloat16, torch.float32),
        (["--chat_template", "file"], "load", "chat_template", "file", None),
        (["--layer", 2], "diagnose", "layer", 2, -1),
        (["--languages", "zh,en"], "diagnose", "languages", ("zh", "en"), ("en", "zh")),
        (["--max_new_tokens", 7], "generate", "max_new_tokens", 7, 512),
        (["--batch_size", 3], "generate", "batch_size", 3, 32),
        (["--temperature", 0.5], "generate", "temperature", 0.5, 0.0),
        (["--seed", 4], "generate", "seed", 4, 0),
    ],
)
def test_a_flag_reaches_the_part_that_it_is_for(csv, tmp_path, monkeypatch, asked, flags, part, name, value, usual):
    for given, expected in (([], usual), (flags, value)):
        safety(monkeypatch, "generate", "--test", csv, "--output", tmp_path / "out", *given)
        assert asked[part][name] == expected
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    if part == "generate":
        assert run[name] == value


def test_the_embedded_world_has_its_own_number_of_tokens_and_batch_size(few_rows, tmp_path, monkeypatch, asked):
    safety(monkeypatch, "generate", "--test", few_rows, "--output", tmp_path / "out")
    assert (asked["generate"]["max_new_tokens"], asked["generate"]["batch_size"]) == (48, 256)


def test_each_prompt_is_encoded_in_each_language_and_its_reply_goes_to_its_record(
    csv, base, tmp_path, monkeypatch, asked
):
    safety(monkeypatch, "generate", "--test", csv, "--output", tmp_path)
    expected = [encode_prompt(base[1], text) for text in ("How?", "怎么", "Why?", "为什么")]
    assert asked["generate"]["prompts"] == expected
    assert asked["generate"]["journal"] == tmp_path / "generations.part.jsonl"
    common = {"reply": REFUSED, "ended": False, "model": "embedded"}
    assert lines(tmp_path / "generations.jsonl") == [
        {"id": name, "language": code, "harmful": name == "1", "prompt": text} | common
        for name, code, text in (("1", "en", "How?"), ("1", "zh", "怎么"), ("2", "en", "Why?"), ("2", "zh", "为什么"))
    ]


def test_one_phrasing_of_each_request_is_diagnosed_and_no_more_than_256_rows(few_rows, tmp_path, monkeypatch, asked):
    safety(monkeypatch, "generate", "--test", few_rows, "--output", tmp_path)
    meanings = [tuple(row.extra["combination"]) for row in asked["diagnose"]["rows"]]
    assert len(meanings) == len(set(meanings)) == 2
    many = tmp_path / "many.csv"
    many.write_text("en,zh\n" + "a,b\n" * 300, "utf-8")
    safety(monkeypatch, "generate", "--test", many, "--output", tmp_path)
    assert len(asked["diagnose"]["rows"]) == 256 and asked["diagnose"]["rows"][255].where.endswith(":257")
    del asked["diagnose"]
    safety(monkeypatch, "generate", "--test", many, "--output", tmp_path, "--languages", "en")
    assert "diagnose" not in asked  # one language has no translations


@pytest.mark.parametrize(
    ("model", "flags", "name"),
    [("runs/mine/model", [], "mine"), ("Qwen/Qwen3-0.6B", [], "Qwen3-0.6B"), ("m", ["--name", "best"], "best")],
)
def test_a_model_has_its_folders_name_or_the_one_that_it_is_given(
    csv, tmp_path, monkeypatch, asked, model, flags, name
):
    safety(monkeypatch, "generate", "--test", csv, "--output", tmp_path, "--model", model, *flags)
    assert {record["model"] for record in lines(tmp_path / "generations.jsonl")} == {name}
    safety(monkeypatch, "generate", "--test", csv, "--output", tmp_path, "--control", "gibberish", *flags)
    assert {record["model"] for record in lines(tmp_path / "generations.jsonl")} == {
        flags[-1] if flags else "gibberish"
    }


@pytest.mark.parametrize(
    ("flags", "verdict", "judge"),
    [
        ([], "invalid", "phrases"),
        (["--judge_cut_off"], "refusal", "phrases"),
        (["--judge_cut_off", "true"], "refusal", "phrases"),
        (["--judge_cut_off", "false"], "invalid", "phrases"),
        (["--judge", "phrases"], "invalid", None),
    ],
)
def test_the_judge_and_how_it_takes_cut_off_replies(csv, tmp_path, monkeypatch, asked, flags, verdict, judge):
    safety(monkeypatch, "--test", csv, "--output", tmp_path, *flags)
    judged = lines(tmp_path / "verdicts.jsonl")
    assert {record["verdict"] for record in judged} == {verdict}
    assert {record["judge"] for record in judged} == {judge or flags[-1]}


def test_the_embedded_world_is_judged_by_its_own_judge_unless_another_is_asked_for(
    few_rows, tmp_path, monkeypatch, asked
):
    for flags, name in (([], "exact"), (["--judge", "phrases"], "phrases")):
        safety(monkeypatch, "--test", few_rows, "--output", tmp_path, *flags)
        assert {record["judge"] for record in lines(tmp_path / "verdicts.jsonl")} == {name}


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["--device", "cuda"], torch.bfloat16),
        (["--device", "cuda", "--dtype", "float32"], torch.float32),
        (["--device", "mps"], torch.float32),
        ([], torch.float32),
    ],
)
def test_weights_are_bfloat16_on_cuda_unless_told_otherwise_and_it_says_so(
    csv, tmp_path, monkeypatch, asked, capsys, flags, dtype
):
    safety(monkeypatch, "generate", "--test", csv, "--output", tmp_path, *flags)
    assert asked["load"]["dtype"] is dtype
    assert ("weights in bfloat16" in capsys.readouterr().out) is (dtype is torch.bfloat16)
    assert json.loads((tmp_path / "run.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("flags", "batch_size"), [([], 32), (["--batch_size", 3], 3)])
def test_the_guard_is_loaded_from_its_name_asked_for_few_tokens_and_told_which_prompts_are_harmless(
    csv, tmp_path, monkeypatch, asked, flags, batch_size
):
    safety(monkeypatch, "generate", "--test", csv, "--output", tmp_path, "--temperature", 1)
    answer = "Safety: Safe\nCategories: None\nRefusal: No"
    real = sys.modules["mlc_min.evaluation.judges"].generate

    def guard(*arguments, **settings):
        return [{"reply": answer, "ended": True} for _ in real(*arguments, **settings)]

    monkeypatch.setattr("mlc_min.evaluation.judges.generate", guard)
    flags = [*flags, "--judge", "guard:Qwen/Guard", "--judge_cut_off", "--dtype", "bfloat16"]
    safety(monkeypatch, "judge", "--output", tmp_path, *flags)
    assert asked["load"] == dict(path="Qwen/Guard", device="auto", dtype=torch.bfloat16, chat_template=None)
    settings = {key: value for key, value in asked["generate"].items() if key != "prompts"}
    assert settings == dict(max_new_tokens=64, batch_size=batch_size, temperature=0.0, seed=0,
                            journal=tmp_path / "guard.part.jsonl")  # fmt: skip
    judged = lines(tmp_path / "verdicts.jsonl")
    assert [(r["harmful"], r["verdict"]) for r in judged] == [(True, "invalid")] * 2 + [(False, "compliance")] * 2
    assert {r["guard_answer"] for r in judged} == {answer} and {r["judge"] for r in judged} == {"guard:Qwen/Guard"}


def test_the_journals_dates_are_kept_for_the_model_and_for_the_guard(csv, tmp_path, monkeypatch, asked):
    dates = []
    monkeypatch.setattr("mlc_min.safety.keep_date", lambda tokenizer, journal: dates.append(journal.name))
    safety(monkeypatch, "--test", csv, "--output", tmp_path, "--judge", "guard:g")
    assert dates == ["generations.part.jsonl", "guard.part.jsonl"]


def test_the_first_line_says_which_languages_were_found_and_what_was_left(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("no,en,zh-CN,fil,tag\n1,How?,怎么,Paano?,mild\n", "utf-8")
    safety(monkeypatch, "--control", "gibberish", "--test", path, "--output", tmp_path)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{path}: prompts: 1, languages: 3 (en, zh-CN, fil); left alone: no, tag"
    assert [r["language"] for r in lines(tmp_path / "generations.jsonl")] == ["en", "zh-CN", "fil"]
    safety(monkeypatch, "--control", "gibberish", "--test", path, "--output", tmp_path, "--languages", "en")
    assert capsys.readouterr().out.startswith(f"{path}: prompts: 1, languages: 1 (en); left alone: no, zh-CN, fil, tag")


def test_a_folder_with_files_per_language_and_kind_is_a_test_set(tmp_path, monkeypatch, capsys):
    """Harmless prompts are found beside the harmful ones, or named by themselves; both give the same records."""
    folder = Path(__file__).parent / "polyrefuse-sample"
    for name, flags in (("a", []), ("b", ["--harmless", folder])):
        safety(monkeypatch, "--control", "always-refuse", "--test", folder, *flags, "--output", tmp_path / name)
        assert f"{folder}: harmless prompts: 4, languages: 4 (en, ar, it, ko)" in capsys.readouterr().out
    assert lines(tmp_path / "a" / "generations.jsonl") == lines(tmp_path / "b" / "generations.jsonl")
    summary = json.loads((tmp_path / "a" / "report.json").read_text())["models"]["always-refuse"]
    assert {code: cell["harmless"]["prompts"] for code, cell in summary["counts"].items()} == dict.fromkeys(
        ("en", "ar", "it", "ko"), 4
    )
    assert (summary["avg"], summary["over_refusal"]) == (100.0, 100.0)


# --- which languages count as aligned ---


def test_the_aligned_languages_are_the_runs_else_those_of_the_flag_else_all(csv, tmp_path, monkeypatch, asked, capsys):
    folder, output = tmp_path / "mine" / "model", tmp_path / "out"
    folder.mkdir(parents=True)

    def avg(*flags) -> tuple:
        safety(monkeypatch, "--test", csv, "--output", output, "--model", folder, "--judge_cut_off", *flags)
        report = json.loads((output / "report.json").read_text())
        return report["models"]["mine"]["aligned"], capsys.readouterr().out

    aligned, printed = avg()
    assert (
        aligned == ["en", "zh"] and "it is not known which languages were aligned" in printed and "zh*" not in printed
    )
    config = folder / "train_config.json"
    config.write_text(json.dumps({"settings": {"languages": "en,sw", "mlc_weight": 0.0}}))
    aligned, printed = avg()
    assert aligned == ["en", "sw"] and "zh*" in printed and "aligned, but not tested: sw" in printed
    assert "it is not known" not in printed
    safety(monkeypatch, "report", "--output", output)  # from what the first step has written
    assert json.loads((output / "report.json").read_text())["models"]["mine"]["aligned"] == ["en", "sw"]
    assert avg("--aligned", "zh")[0] == ["zh"]
    for other in ("[]", "{}", '{"settings": {"languages": 7}}', "no JSON", '{"settings": []}', "[" * 100_000):
        config.write_text(other)
        assert avg()[0] == ["en", "zh"], other


def test_models_that_were_aligned_in_different_languages_are_compared_over_the_firsts(
    csv, tmp_path, monkeypatch, asked, capsys
):
    for name in ("en,zh", "en"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "train_config.json").write_text(json.dumps({"settings": {"languages": name}}))
        safety(monkeypatch, "--test", csv, "--output", tmp_path / name, "--model", tmp_path / name / "model")
    capsys.readouterr()
    safety(monkeypatch, "report", "--output", tmp_path / "en", "--against", tmp_path / "en,zh")
    report = json.loads((tmp_path / "en" / "report.json").read_text())
    assert {tuple(summary["aligned"]) for summary in report["models"].values()} == {("en",)}
    assert "note: en,zh was aligned in en, zh; its Avg, Var and PAG are over en, too" in capsys.readouterr().out


# --- languages that cannot be told, and system texts ---


def test_a_language_that_the_identifier_does_not_know_has_no_figure_and_the_report_names_it(
    tmp_path, monkeypatch, asked, capsys
):
    path = tmp_path / "rows.csv"
    path.write_text("en,zh-CN,ceb,harmful\nHow?,怎么,Unsa?,false\n", "utf-8")
    safety(monkeypatch, "--test", path, "--output", tmp_path, "--judge_cut_off")
    english, chinese, cebuano = lines(tmp_path / "verdicts.jsonl")
    assert (english["reply_language"], chinese["reply_language"]) == ("en", "en") and "reply_language" not in cebuano
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("ceb ") and "0/0/0/0" in line)
    assert row.split()[-2:] == ["–", "100.0"]  # in-lang, cut off
    assert "in-lang leaves out ceb" in printed
    assert "the judge `phrases` knows no refusal in ceb, and takes those for compliance" in printed
    summary = json.loads((tmp_path / "report.json").read_text())["models"]["embedded"]
    assert summary["in_language"] == 50.0


def test_a_system_text_goes_into_the_chat_or_is_refused_by_line(base, tmp_path, monkeypatch, asked, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "prompt_zh": "b"}, {"prompt": "c", "prompt_zh": "d", "system": "Be a pirate."}]
    path.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(base[1], "chat_template", "{{ messages[-1]['content'] }}<assistant>")
    error = refused(monkeypatch, capsys, "generate", "--test", path, "--output", tmp_path / "out")
    assert f"{path}:2: the chat template has no place for a system text" in error and not (tmp_path / "out").exists()
    everything = "{% for m in messages %}{{ m['content'] }}{% endfor %}<assistant>"
    monkeypatch.setattr(base[1], "chat_template", everything)
    safety(monkeypatch, "generate", "--test", path, "--output", tmp_path)
    assert [base[1].decode(ids) for ids in asked["generate"]["prompts"]] == [
        "a<assistant>", "b<assistant>", "Be a pirate.c<assistant>", "Be a pirate.d<assistant>"]  # fmt: skip
    records = lines(tmp_path / "generations.jsonl")
    assert [record.get("system") for record in records] == [None, None, "Be a pirate.", "Be a pirate."]
    mild = tmp_path / "mild.jsonl"
    mild.write_text(path.read_text().replace('"a"', '"e"').replace('"c"', '"f"'))
    harmless = ["--harmless", mild, "--control", "gibberish"]
    safety(monkeypatch, "generate", "--test", path, "--output", tmp_path, *harmless)
    records = lines(tmp_path / "generations.jsonl")
    assert [r["harmful"] for r in records] == [True] * 4 + [False] * 4 and records[-1]["system"] == "Be a pirate."


# --- bad input ---


@pytest.mark.parametrize(
    "content",
    [
        '{"id": 1, "prompt": "a", "combination": 5}',
        '{"prompt": "a", "combination": "x"}',
        '{"prompt": "a", "combination": ["cut", 3]}',
        '{"prompt": "a", "id": null}',
    ],
)
def test_rows_of_elsewhere_with_fields_of_the_embedded_world_are_like_any_other(tmp_path, monkeypatch, asked, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content + "\n" + content.replace(" 1", " 2"))
    safety(monkeypatch, "--test", path, "--output", tmp_path)
    assert {record["judge"] for record in lines(tmp_path / "verdicts.jsonl")} == {"phrases"}
    if "null" in content:
        assert [record["id"] for record in lines(tmp_path / "verdicts.jsonl")] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_half_a_character_is_found_before_anything_is_generated(tmp_path, monkeypatch, asked, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "\\ud800", "prompt": "a"}')
    assert f"{path}:1: half a character" in refused(monkeypatch, capsys, "--test", path, "--output", tmp_path / "out")
    assert asked == {} and not (tmp_path / "out").exists()
    error = refused(monkeypatch, capsys, "--name", "\udcff", "--output", tmp_path / "out")
    assert "bytes that are no UTF-8" in error and asked == {}


@pytest.mark.parametrize("place", ["file", "file/below", "out"])
def test_an_output_that_cannot_be_written_is_found_before_anything_is_generated(
    csv, tmp_path, monkeypatch, asked, capsys, place
):
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / "report.txt").mkdir(parents=True)
    error = refused(monkeypatch, capsys, "--test", csv, "--output", tmp_path / place)
    assert f"--output {tmp_path / place}: " in error and "generate" not in asked
    assert "report.txt is a folder" in error if place == "out" else "cannot be written to" in error


def test_a_full_disk_is_one_line_and_the_replies_are_kept(csv, tmp_path, monkeypatch, asked, capsys):
    journal = tmp_path / "generations.part.jsonl"
    journal.write_text("kept")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlc_min.evaluation.records.write_atomically", full)
        error = refused(patch, capsys, "--test", csv, "--output", tmp_path)
    assert f"--output {tmp_path}: " in error and "No space left on device" in error
    assert "finished batches of replies are kept" in error and journal.read_text() == "kept"
    safety(monkeypatch, "generate", "--test", csv, "--output", tmp_path)
    assert not journal.exists()


def test_too_little_memory_is_one_line_that_names_the_batch_size(csv, tmp_path, monkeypatch, asked, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("mlc_min.safety.generate", full)
    assert "--batch_size 5: CUDA out of memory" in refused(
        monkeypatch, capsys, "--test", csv, "--output", tmp_path, "--batch_size", 5
    )


def test_only_what_is_wrong_with_the_layer_is_said_of_the_layer(csv, tmp_path, monkeypatch, asked, capsys):
    def broken(kind):
        def diagnose(*_):
            raise kind("representations hold NaN or infinity")

        monkeypatch.setattr("mlc_min.safety.diagnose", diagnose)

    broken(BrokenDown)
    error = refused(monkeypatch, capsys, "--test", csv, "--output", tmp_path, "--layer", 1)
    assert "--layer 1: representations hold NaN" in error and "must lie" not in error
    broken(ValueError)  # a mistake of ours is not the user's
    with pytest.raises(ValueError, match="hold NaN"):
        safety(monkeypatch, "--test", csv, "--output", tmp_path)


def test_two_different_prompts_are_not_compared(tmp_path, monkeypatch, capsys):
    for name, prompt in (("a", "How do I cut it?"), ("b", "How do I mend it?")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text(f"en,harmful\n{prompt},true\nWhy?,false\n")
        path = tmp_path / name / "rows.csv"
        safety(monkeypatch, "--control", "gibberish", "--test", path, "--output", tmp_path / name)
    error = refused(monkeypatch, capsys, "report", "--output", tmp_path / "a", "--against", tmp_path / "b")
    assert "prompt 'rows.csv:2' in en is not the same: 'How do I mend it?' and 'How do I cut it?'" in error


def test_models_without_a_common_prompt_are_said_to_have_none(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"en\n{name}\n")
        arguments = ("--control", "gibberish", "--name", name, "--test", tmp_path / f"{name}.csv")
        safety(monkeypatch, *arguments, "--output", tmp_path / name)
    safety(monkeypatch, "report", "--output", tmp_path / "a", "--against", tmp_path / "b")
    assert "a against b: no harmful prompt in common" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["diagnostics.json", "run.json"])
def test_a_broken_file_of_the_first_step_is_named(csv, tmp_path, monkeypatch, capsys, name):
    safety(monkeypatch, "--control", "gibberish", "--test", csv, "--output", tmp_path)
    for content in ("oops", "[1]", "[" * 100_000):
        (tmp_path / name).write_text(content)
        assert f"{tmp_path / name}: not JSON as it was written" in refused(
            monkeypatch, capsys, "report", "--output", tmp_path
        )


GOOD = {"model": "a", "id": "1", "language": "en", "harmful": True, "prompt": "p", "reply": "r", "ended": True,
        "verdict": "refusal"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "models", "judges"),
    [
        ({}, ["a"], ["unknown"]),
        ({"model": None}, ["out"], ["unknown"]),
        ({"model": "a $x^{ b"}, ["a $x^{ b"], ["unknown"]),
        ({"model": "a\nb"}, ["a b"], ["unknown"]),  # a name has one line in a table
        ({"model": "_hidden", "language": "$x^{"}, ["_hidden"], ["unknown"]),
        ({"judge": None, "group": None, "reply_language": None, "correct": None}, ["a"], ["unknown"]),
        (
            {"judge": "a person", "reply_language": "en", "group": "g", "correct": True, "notes": [1]},
            ["a"],
            ["a person"],
        ),
        ({"verdict": None}, ["a"], ["unknown"]),
    ],
)
def test_verdicts_of_any_outside_judge_are_reported(tmp_path, monkeypatch, pictures, changes, models, judges):
    path = tmp_path / "out" / "verdicts.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD | changes).encode())
    safety(monkeypatch, "report", "--output", path.parent)
    report = json.loads((path.parent / "report.json").read_text())
    assert list(report["models"]) == models and report["judges"] == judges


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": {"name": "a"}}, "field 'model' is missing or not a str"),
        ({"model": 7}, "field 'model' is missing or not a str"),
        ({"verdict": ["refusal"]}, "field 'verdict' is missing or not a str"),
        ({"verdict": float("nan")}, "field 'verdict' is missing or not a str"),
        ({"verdict": "Refusal"}, "verdict 'Refusal'; must be one of refusal, compliance, invalid, unscored"),
        ({"judge": {"name": "gpt"}}, "field 'judge' is missing or not a str"),
        ({"reply_language": ["en"]}, "field 'reply_language' is missing or not a str"),
        ({"group": ["cut", "book"]}, "field 'group' is missing or not a str"),
        ({"correct": "no"}, "field 'correct' is missing or not a bool"),
        ({"system": 1}, "field 'system' is missing or not a str"),
        ({"ended": 1}, "field 'ended' is missing or not a bool"),
        ({"reply": "\ud800"}, "half a character (a lone surrogate)"),
    ],
)
def test_what_no_report_can_be_made_of_is_refused_by_line(tmp_path, monkeypatch, capsys, changes, what):
    path = tmp_path / "verdicts.jsonl"
    path.write_text(json.dumps(GOOD | {"id": "0"}) + "\n" + json.dumps(GOOD | changes))
    error = refused(monkeypatch, capsys, "report", "--output", tmp_path)
    assert f"{path}:2: {what}" in error and "\n" not in error


def test_a_file_nested_too_deeply_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "verdicts.jsonl").write_text('{"model": ' + "[" * 200_000)
    assert "verdicts.jsonl:1: not JSON (too deeply nested)" in refused(
        monkeypatch, capsys, "report", "--output", tmp_path
    )


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--batch_size", -1), "--batch_size -1: must be at least 0 and at most 1000000 (replies; 0 chooses)"),
        (("--max_new_tokens", 10**6 + 1), "at most 1000000 (tokens; 0 chooses)"),
        (("--temperature", "nan"), "--temperature nan: must be at least 0 and at most 100 (a factor;"),
        (("--temperature", "inf"), "--temperature inf"),
        (("--temperature", 1e-300), "--temperature 1e-300: must be 0, greedy, or at least 0.01"),
        (("--seed", -1), "--seed -1: must be at least 0 and at most 9223372036854775807"),
        (("--seed", 2**63), f"--seed {2**63}"),
        (("--layer", 10**30), "at most 10000 (a hidden-state entry)"),
        (("--layer", 9), "--layer 9: layer must lie between -5 and 4"),
        (("--layer", -6), "--layer -6: layer must lie between -5 and 4"),
    ],
)
def test_settings_out_of_bounds_are_named_with_their_unit(tmp_path, monkeypatch, capsys, flags, what):
    assert what in refused(monkeypatch, capsys, *flags, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"verdict": "refused"}, "verdict 'refused'; must be one of refusal, compliance, invalid, unscored"),
        ({"id": None}, "field 'id' is missing or not a str"),
        ({"harmful": "yes"}, "field 'harmful' is missing or not a bool"),
        ({"reply": None}, "field 'reply' is missing or not a str"),
    ],
)
def test_a_broken_record_is_named_with_its_line(tmp_path, changes, what):
    good = record("a") | {"verdict": "refusal"}
    path = tmp_path / "verdicts.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"id": "b"} | changes) + "\n")
    with pytest.raises(InputError) as error:
        by_model(tmp_path)
    assert str(error.value).startswith(f"{path}:3: {what}")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{oops\n", ":1: not JSON"),
        ("1\n", ":1: a row must be a JSON object"),
        ("[1]\n", ": row 1: a row must be a JSON object"),
        ("\n", ": holds no rows; run `python -m mlc_min.safety "),
        (json.dumps(record("a")), ":1: field 'verdict' is missing; run `python -m mlc_min.safety judge`"),
        (2 * (json.dumps(record("a") | {"verdict": "refusal"}) + "\n"), ":2: a second reply to 'a' in 'en'"),
    ],
)
def test_a_file_that_holds_no_verdicts_is_refused_by_name(tmp_path, content, what):
    path = tmp_path / "verdicts.jsonl"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        read_records(path, judged=True)
    assert str(error.value).startswith(f"{path}{what}")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("judge",), "run `python -m mlc_min.safety generate` first"),
        (("report",), "run `python -m mlc_min.safety judge` first"),
        (("--judge", "gpt"), "--judge gpt"),
        (("--batch_size", -1), "--batch_size"),
        (("--temperature", -1), "--temperature"),
        (("--layer", 9), "--layer 9"),
        (("--test", "no/such.csv"), "no/such.csv"),
        (("--model", "no/such/folder"), "--model no/such/folder"),
        (("--languages", "en,en"), "--languages"),
        (("--aligned", ","), "--aligned"),
    ],
)
def test_a_bad_setting_is_named_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, arguments, what):
    assert what in refused(monkeypatch, capsys, *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_exact_judge_refuses_replies_from_elsewhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.csv").write_text("en\nhello\n")
    arguments = ("--control", "gibberish", "--test", tmp_path / "rows.csv", "--output", tmp_path, "--judge", "exact")
    assert "--judge exact: knows the embedded world only" in refused(monkeypatch, capsys, *arguments)


def test_an_id_that_comes_twice_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.csv").write_text("id,en\n1,hello\n1,bye\n")
    arguments = ("--control", "gibberish", "--test", tmp_path / "rows.csv", "--output", tmp_path)
    assert "the id '1' is used twice" in refused(monkeypatch, capsys, *arguments)


def test_a_wrong_answer_is_compliance_but_no_help():
    wrong = record(answer_text("en", "draw", "bus"), harmful=False) | COMBINATION
    right = record(answer_text("en", "draw", "bench"), harmful=False) | COMBINATION
    summary = summarize(judge([wrong, right], "exact"))
    assert summary["counts"]["en"]["harmless"]["compliance"] == 2 and summary["helpful"] == 50.0
