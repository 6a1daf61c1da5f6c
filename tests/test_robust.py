"""A run that is killed, stopped, starved of disk or fed nonsense: nothing saved is lost, and resumed it ends alike."""

import copy
import dataclasses
import datetime
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mlc_min import loop
from mlc_min.examples import Example, encode_rows
from mlc_min.lab.sentences import EMBEDDED
from mlc_min.machinery import checkpoint, files
from mlc_min.machinery.errors import InputError, run_command
from mlc_min.machinery.models import load_model
from mlc_min.machinery.reference_cache import with_cached_reference
from mlc_min.machinery.rows import read_rows
from mlc_min.machinery.settings import TrainConfig
from mlc_min.train import fit, main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same bits need the same number of threads, here and in the processes that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join((EMBEDDED / "train.jsonl").read_text("utf-8").splitlines()[::100]), "utf-8")
    return path


def arguments(few: Path, output: Path, *more) -> list[str]:
    # fmt: off
    return [str(a) for a in (
        "--train", few, "--output", output, "--languages", "en,zh,sw", "--mlc_weight", 1, "--batch_size", 2,
        "--accumulation", 2, "--steps", 24, "--log_every", 1, "--save_every", 1, "--device", "cpu",
        "--reference_cache", output.parent / "reference", "--extractor_dim", 16, *more,
    )]
    # fmt: on


def in_process(monkeypatch, few: Path, output: Path, *more) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments(few, output, *more)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main()


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, few, output)
    return output


def same_result(first: Path, second: Path) -> None:
    for name in ("model.safetensors", "extractor.safetensors"):
        a, b = load_file(first / "model" / name), load_file(second / "model" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    logs = [(folder / "train_log.jsonl").read_text().splitlines() for folder in (first, second)]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1] == list(range(24))


def wait_for(path: Path, change: float, is_running: Callable[[], bool]) -> None:
    """Until the file at `path` is newer than `change`, or the process has ended."""
    for _ in range(6000):
        if not is_running() or (path.exists() and path.stat().st_mtime > change):
            return
        time.sleep(0.01)


def run_trainer(words: list[str], errors: Path) -> None:
    sys.argv = ["train", *words]
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w")
    main()


@pytest.fixture
def start(few, tmp_path, monkeypatch):
    """Starts a trainer as a process of its own: a fork of a server that has imported everything, which saves the
    seconds of imports."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["mlc_min.train", "pytest", "hypothesis"])

    def start(output: Path, *more):
        process = server.Process(target=run_trainer, args=(arguments(few, output, *more), tmp_path / "errors"))
        process.start()
        return process

    return start


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_resumed_each_time_it_ends_with_the_same_bits(undisturbed, tmp_path, start):
    output, draw = tmp_path / "run", random.Random(0)
    for kills in range(10):
        process = start(output, "--resume", "true")
        if kills % 2:  # while training: a random while after the next checkpoint
            before = (output / "checkpoint.pt").stat().st_mtime if (output / "checkpoint.pt").exists() else 0.0
            wait_for(output / "checkpoint.pt", before, process.is_alive)
            time.sleep(draw.uniform(0, 0.3))
        else:  # at any moment of the start
            time.sleep(draw.uniform(0, 1))
        assert process.is_alive(), process.exitcode
        process.kill()
        process.join()
    process = start(output, "--resume", "true")
    process.join(240)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    same_result(undisturbed, output)
    assert not list(output.glob(".*.new.new"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_says_so_and_can_be_resumed(few, undisturbed, tmp_path, start, monkeypatch, number):
    output = tmp_path / "run"
    process = start(output, "--save_every", 0)
    wait_for(output / "train_log.jsonl", 0, process.is_alive)
    while process.is_alive() and len((output / "train_log.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == 128 + number
    assert "--resume true continues from it" in (tmp_path / "errors").read_text()
    assert (output / "checkpoint.pt").exists() and not (output / "model").exists()
    in_process(monkeypatch, few, output, "--resume", "true")
    same_result(undisturbed, output)


def test_a_save_that_fails_half_way_leaves_the_checkpoint_before_it_whole(few, undisturbed, tmp_path, monkeypatch):
    output, real, saves = tmp_path / "run", torch.save, []

    def full_disk(state, path):
        saves.append(path)
        real(state, path)
        if len(saves) == 4:
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full_disk)
        with pytest.raises(InputError, match=r"step 4 cannot be saved .*No space left.*the one before it is whole"):
            in_process(patch, few, output)
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == 3
    assert [path.name for path in output.glob(".*")] == []
    in_process(monkeypatch, few, output, "--resume", "true")
    same_result(undisturbed, output)


def test_a_loss_that_is_not_finite_names_the_step_the_rows_and_the_last_good_checkpoint(few, tmp_path, monkeypatch):
    calls = []
    real = loop.sequence_logps

    def broken(states, *more):
        calls.append(1)
        return real(states * float("nan") if len(calls) == 9 else states, *more)

    monkeypatch.setattr(loop, "sequence_logps", broken)
    with pytest.raises(InputError) as error:
        in_process(monkeypatch, few, tmp_path / "run", "--reference_cache", "", "--batch_size", 2)
    message = str(error.value)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert message.startswith(f"step {saved}: loss is nan") and f"{few}:" in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint.pt'}, step {saved}" in message


def test_a_planted_pickle_is_refused_and_not_run(few, tmp_path, monkeypatch):
    output = tmp_path / "run"
    output.mkdir()

    class Planted:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was run"),))

    torch.save({"step": 1, "settings": Planted()}, output / "checkpoint.pt")
    with pytest.raises(InputError, match="not a whole checkpoint"):
        in_process(monkeypatch, few, output, "--resume", "true")
    assert not (tmp_path / "was run").exists()


def test_no_part_of_the_package_can_load_a_pickle():
    for path in (ROOT / "mlc_min").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text and "numpy.load" not in text and "np.load" not in text
        assert text.count("torch.load(") == text.count("weights_only=True"), path.name


def test_a_half_written_last_line_of_the_log_does_not_stop_a_resume(few, tmp_path, monkeypatch):
    output = tmp_path / "run"
    in_process(monkeypatch, few, output, "--steps", 4)
    log = output / "train_log.jsonl"
    log.write_bytes(log.read_bytes()[:-60])
    in_process(monkeypatch, few, output, "--steps", 4, "--resume", "true")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2]
    log.write_text("nonsense\n" + log.read_text())
    with pytest.raises(InputError, match=r"train_log.jsonl:1: not a line of the log"):
        in_process(monkeypatch, few, output, "--steps", 4, "--resume", "true")


def test_a_run_goes_on_with_its_own_model_and_rows_only(few, tmp_path, monkeypatch):
    output, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(EMBEDDED / "model", model)
    embedded = ("--preset", "embedded", "--steps", 3, "--model", model)
    rows = Path(shutil.copy(few, tmp_path))
    in_process(monkeypatch, rows, output, *embedded)
    content = rows.read_text("utf-8")
    rows.write_text(content.split("\n", 1)[1], "utf-8")
    with pytest.raises(InputError, match="was made with other rows than"):
        in_process(monkeypatch, rows, output, *embedded, "--resume", "true")
    rows.write_text(content, "utf-8")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][5, 7] += 1e-3  # frozen, so it is in no checkpoint
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="was made with another model than"):
        in_process(monkeypatch, rows, output, *embedded, "--resume", "true")


def test_a_model_that_cannot_be_saved_leaves_a_checkpoint_that_saves_it_later(few, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "run"

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
        in_process(patch, few, output, "--save_every", 0)
    assert "No space left on device" in str(error.value)
    assert f"{output}/checkpoint.pt has the weights" in str(error.value) and "--resume true" in str(error.value)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint.pt", "run.json", "train_log.jsonl"]
    in_process(monkeypatch, few, output, "--save_every", 0, "--resume", "true")
    same_result(undisturbed, output)
    assert not (output / "checkpoint.pt").exists()  # nobody asked for one


def test_outputs_are_tried_before_the_first_step_and_a_cache_that_cannot_be_written_is_done_without(
    few, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=r"--output .*cannot be written to"):
            patch.setattr("mlc_min.train.with_cached_reference", lambda *_: pytest.fail("work was begun"))
            in_process(patch, few, output)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"0\.0 GB are free and 0.0 needed"):
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**7, 10**7 - 10**6, 10**6))
        in_process(patch, few, tmp_path / "run")
    in_process(monkeypatch, few, tmp_path / "run", "--steps", 1, "--reference_cache", tmp_path / "file")
    assert "nothing kept" in capsys.readouterr().err and (tmp_path / "run/model").exists()


def test_a_run_that_goes_on_the_next_day_keeps_the_date_in_its_prompts(few, undisturbed, tmp_path, monkeypatch):
    output, template = tmp_path / "run", tmp_path / "template"
    text = (EMBEDDED / "model/chat_template.jinja").read_text("utf-8")
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + text, "utf-8")
    more = ("--steps", 2, "--chat_template", template)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(2031, 2, 3)

    in_process(monkeypatch, few, output, *more)
    monkeypatch.setattr(datetime, "date", Tomorrow)
    in_process(monkeypatch, few, output, *more, "--resume", "true")
    with pytest.raises(InputError, match="other rows"):  # what would happen without
        monkeypatch.setattr("mlc_min.train.config_date", lambda _: Tomorrow.today())
        in_process(monkeypatch, few, output, *more, "--resume", "true")


def test_files_and_their_folder_are_on_the_disk_before_and_after_the_swap(tmp_path, monkeypatch):
    done = []
    real_sync, real_replace, real_rename = files.sync, os.replace, os.rename
    monkeypatch.setattr(files, "sync", lambda path: done.append(f"sync {path.name}") or real_sync(path))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(f"swap {a.name} {b.name}") or real_replace(a, b))
    files.write_atomically(tmp_path / "a", "text")
    assert done == ["sync .a.new", "swap .a.new a", f"sync {tmp_path.name}"]
    done.clear()
    monkeypatch.setattr(os, "rename", lambda a, b: done.append(f"swap {a.name} {b.name}") or real_rename(a, b))
    files.save_folder(tmp_path / "f", lambda folder: (folder / "b").write_text("text"))
    files.save_folder(tmp_path / "f", lambda folder: (folder / "b").write_text("new"))
    once = ["sync b", "sync .f.new"]
    assert done == [
        *once,
        "swap .f.new f",
        f"sync {tmp_path.name}",
        *once,
        "swap f .f.old",
        "swap .f.new f",
        f"sync {tmp_path.name}",
    ]
    assert (tmp_path / "f/b").read_text() == "new" and not (tmp_path / ".f.old").exists()


def test_dpo_that_does_not_start_at_log_2_is_stopped(tiny_model):
    examples = [Example(f"f:{i}", {"en": [5, 6 + i]}, [7, 2], [8, 2], reference=(-3.0, -30.0)) for i in range(4)]
    config = TrainConfig(languages="en", steps=1, batch_size=2, freeze="", device="cpu")
    with pytest.raises(InputError, match=r"step 0: the DPO loss is \d.*not log 2 = 0.6931"):
        fit(config, copy.deepcopy(tiny_model), examples, quiet=True)


def test_the_loop_leaves_signals_alone(tiny_model):
    seen = []
    before = signal.getsignal(signal.SIGTERM)
    model = copy.deepcopy(tiny_model)
    model.register_forward_pre_hook(lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    model.model.register_forward_pre_hook(lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    examples = [Example(f"f:{i}", {"en": [5, 6 + i]}, [7, 2], [8, 2]) for i in range(4)]
    fit(TrainConfig(languages="en", steps=1, batch_size=2, freeze="", device="cpu"), model, examples, quiet=True)
    assert seen and set(seen) == {before}


# --- the reference's cache ---


def test_reference_log_probs_are_kept_and_made_again_when_model_data_or_template_change(few, tmp_path, capsys):
    model, tokenizer = load_model(EMBEDDED / "model")
    rows = read_rows(few, ("en",), ("chosen", "rejected"))

    def cached(model, rows, tokenizer, dtype="float32"):
        examples, _ = encode_rows(rows, tokenizer, ("en",), 1024)
        config = TrainConfig(batch_size=1, dtype=dtype)
        scored = with_cached_reference(str(tmp_path / "cache"), model, examples, config)
        assert scored == loop.with_reference(model, examples, config) and scored[0].reference is not None
        return "reference log-probs from" in capsys.readouterr().out

    assert [cached(model, rows, tokenizer) for _ in range(2)] == [False, True]
    assert not cached(model, rows[:-1], tokenizer)
    assert not cached(model, rows, tokenizer, "bfloat16")
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("{{", " {{", 1)
    assert not cached(model, rows, tokenizer)
    tokenizer.chat_template = template
    with torch.no_grad():
        model.model.norm.weight += 0.01
    assert not cached(model, rows, tokenizer)
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    assert not cached(model, rows, tokenizer)
    for name in ("chosen", "rejected"):
        assert not cached(model, [dataclasses.replace(rows[0], **{name: "No."}), *rows[1:]], tokenizer)
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 8 and {path.suffix for path in files} == {".safetensors"}
    for path in files:
        path.write_bytes(path.read_bytes()[:50])  # damaged: computed again
    assert [cached(model, rows, tokenizer) for _ in range(2)] == [False, True]


# --- nonsense ---

fields = st.sampled_from(["prompt", "prompt_zh", "chosen", "rejected", "harmful", "id"])
texts = st.text(max_size=6) | st.sampled_from(["hello", "你好", "", " "])
parts = st.none() | st.booleans() | st.integers() | texts | st.lists(texts, max_size=2)
parts |= st.dictionaries(st.sampled_from(["from", "value", "role", "content"]), texts, max_size=3)
rows = st.dictionaries(fields, parts, max_size=6).map(json.dumps) | st.text(max_size=30)


@settings(max_examples=1000)
@given(st.lists(rows, max_size=3).map("\n".join), st.sampled_from([".jsonl", ".json", ".csv"]))
@example('{"prompt": "a", "prompt_zh": "b", "chosen": "c", "rejected": "d"}', ".jsonl")
def test_any_file_of_rows_trains_or_ends_in_one_line_with_nothing_written(tmp_path_factory, content, suffix):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / f"rows{suffix}"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlc_min.machinery.models.load_model", lambda *_, **__: (MODEL, TOKENIZER))
        patch.setattr("mlc_min.train.fit", lambda *_, **__: (_ for _ in ()).throw(Trains))
        patch.setattr(
            sys, "argv", ["train", *arguments(path, folder / "run", "--languages", "en,zh", "--method", "sft")]
        )
        outcome = ended(main)
    assert outcome == "trains" or (outcome == 2 and not (folder / "run").exists())


class Trains(Exception):
    """The rows were good enough to begin."""


def ended(command):
    """2 for one clear line and exit code 2; "trains" if training would have begun."""
    import contextlib
    import io

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_command(command)
        except Trains:
            return "trains"
        except SystemExit as exit_:
            lines = errors.getvalue().splitlines()
            assert len(lines) == 1 and lines[0].startswith("error: "), errors.getvalue()
            return exit_.code


MODEL, TOKENIZER = load_model(EMBEDDED / "model")
