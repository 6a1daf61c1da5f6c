"""The commands as a user starts them, with few steps."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlc_min.lab.ablations import main as ablations_main
from mlc_min.lab.experiment import SEEDLESS
from mlc_min.machinery.errors import InputError, run_command
from mlc_min.train import main as train_main

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    """`python -m mlc_min…` in the repository's root; the exit code must be `code`."""
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def refused(capsys, monkeypatch, *arguments) -> str:
    """The one line that `python -m mlc_min.train` prints on bad input, in this process (a new one takes seconds)."""
    monkeypatch.setattr(sys, "argv", ["mlc_min.train", *map(str, arguments)])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit_:
        run_command(train_main)
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C of another process")
def test_ctrl_c_stops_the_main_job_with_all_its_processes(tmp_path):
    command = [sys.executable, "-m", "mlc_min", "--output", str(tmp_path), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell lets what it runs in the background ignore Ctrl-C, and the tests may run there.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heeding, **pipes) as job:
        assert any("150 steps on" in line for line in job.stdout)  # a row is being trained
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=60)  # the pipes end with the last process that has them
    assert job.returncode == 130 and "stopped\n" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_the_main_job_writes_tables_verdicts_logs_and_pictures(tmp_path):
    printed = run("mlc_min", "--output", tmp_path, "--steps", 2, "--test_rows", 2).stdout
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == ["base", "DPO", "DPO+MLC", "control: shuffled", "no extractor"]
    for name, model in table.items():
        assert name in printed
        for counts in model["summary"]["counts"].values():
            for kind in ("harmful", "harmless"):
                cell = counts[kind]
                assert cell["prompts"] == 2 == cell["refusal"] + cell["compliance"] + cell["invalid"]
        folder = tmp_path / name.replace(": ", "-").replace(" ", "-")
        assert len((folder / "verdicts.jsonl").read_text("utf-8").splitlines()) == 4 * 12  # prompts x languages
        if name == "base":
            continue
        log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == [0, 1]
        assert all({"mlc_loss", "mlc_floor", "mlc_ceiling", "mlc_shuffled", "retrieval"} <= set(line) for line in log)
    for picture in ("rates.png", "spectra.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_training_and_evaluating_from_the_command_line(tmp_path):
    trained = tmp_path / "run" / "model"
    few_steps = ("--steps", 2, "--batch_size", 4, "--harmful_only", "true", "--reference_cache", tmp_path / "reference")
    run("mlc_min.train", "--output", tmp_path / "run", *few_steps, "--mlc_weight", 0.8)
    AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert {"model.safetensors", "extractor.safetensors", "train_config.json"} <= {p.name for p in trained.iterdir()}
    assert len((tmp_path / "run" / "train_log.jsonl").read_text().splitlines()) == 2
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join((ROOT / "data/embedded/test.jsonl").read_text("utf-8").splitlines()[::50]), "utf-8")
    output = ("--output", tmp_path / "run" / "safety")
    printed = run("mlc_min.safety", "--model", trained, "--test", few, *output, "--languages", "en,sw").stdout
    assert "over-ref" in printed
    report = json.loads((tmp_path / "run" / "safety" / "report.json").read_text())
    rates = report["models"]["run"]["strict"]
    assert set(rates) == {"en", "sw"}
    (of_hub,) = metadata_load(trained / "README.md")["model-index"]  # the evaluation lies beside the model
    of_hub = {metric["type"]: metric["value"] for metric in of_hub["results"][0]["metrics"]}
    assert of_hub["strict_sw"] == rates["sw"] and f"{trained / 'README.md'}: has the figures too" in printed


@pytest.mark.slow
def test_the_ablations_go_on_where_they_were(tmp_path, monkeypatch, capsys):
    def ablations(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["mlc_min.lab.ablations", *map(str, arguments)])
        ablations_main()
        return capsys.readouterr().out

    quick = ("--seeds", 0, 1, "--steps", 1, "--test_rows", 1, "--output", tmp_path / "runs", "--results", tmp_path)
    ablations(*quick, "--rows", "base", "harmful-only DPO", "always-refuse")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    assert len(done) == 1 + 2 + 1  # what has no training has no seeds
    rows = ["base", "DPO", "harmful-only DPO", "always-refuse"]
    printed = ablations(*quick, "--rows", *rows)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    result = json.loads((tmp_path / "ablations.json").read_text())
    assert list(result["rows"]) == rows and all(row in printed for row in rows)
    for name, seeds in result["rows"].items():
        assert [seed["seed"] for seed in seeds] == ([None] if name in SEEDLESS else [0, 1])
    assert [(a["first"], a["second"], a["figure"]) for a in result["answers"]] == [
        ("harmful-only DPO", "DPO", "over_refusal")
    ]
    assert "| harmful-only DPO − DPO | harmless refused |" in (tmp_path / "ablations.md").read_text("utf-8")
    for picture in ("rates.png", "tradeoff.png", "spectra.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="was run with other settings; delete it, or use another --output"):
        ablations(*quick, "--steps", 2, "--rows", "DPO")
    with pytest.raises(InputError, match="there is no such row"):
        ablations("--rows", "nonsense")


@pytest.mark.slow
def test_the_phrases_judge_is_measured_by_a_command(tmp_path):
    printed = run("mlc_min.evaluation.judges", "--output", tmp_path / "figures.json").stdout
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    committed = json.loads((ROOT / "data/results/phrases-judge.json").read_text("utf-8"))
    assert figures == committed and "precision" in printed
    broken = tmp_path / "labelled.jsonl"
    broken.write_text('{"language": "en"}\n')
    assert f"{broken}:1: needs language, reply" in run("mlc_min.evaluation.judges", "--labelled", broken, code=2).stderr


@pytest.mark.parametrize("method", ["sft", "simpo", "orpo"])
def test_every_other_method_trains_from_the_command_line(tmp_path, monkeypatch, method):
    arguments = ["--output", tmp_path, "--steps", 1, "--batch_size", 2, "--method", method]
    monkeypatch.setattr(sys, "argv", ["mlc_min.train", *map(str, arguments)])
    train_main()
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "module", ["__main__", "train", "safety", "lab.ablations", "evaluation.judges", "lab.toy_world", "lab.random_model"]
)
def test_help_shows_the_settings_with_their_defaults(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"mlc_min.{module}").main()
    assert exit_.value.code == 0 and "default" in capsys.readouterr().out


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (json.dumps(GOOD) + "\n{oops\n", 2, "not JSON"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"chosen": None}), 2, "field 'chosen'"),
        (json.dumps(GOOD) + "\n" + json.dumps({"prompt": "a"}), 2, "field 'chosen' is missing"),
        (json.dumps(GOOD | {"prompt": " "}), 1, "field 'prompt' is empty"),
        ("\n" + json.dumps(GOOD | {"prompt": "é"}, ensure_ascii=False), 2, "not UTF-8"),
    ],
)
def test_a_malformed_row_is_named_in_one_line(tmp_path, capsys, monkeypatch, content, line, what):
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="latin-1")
    output = tmp_path / "run"
    error = refused(capsys, monkeypatch, "--train", path, "--output", output, "--languages", "en", "--mlc_weight", 0)
    assert error.startswith(f"error: {path}:{line}: {what}")
    assert not output.exists()


def test_bad_input_ends_the_command_with_one_line_and_exit_code_2(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{oops")
    error = run("mlc_min.train", "--train", path, "--output", tmp_path / "run", code=2).stderr.strip()
    assert error.startswith(f"error: {path}:1: not JSON") and "\n" not in error


def test_a_missing_translation_is_named(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD))
    error = refused(capsys, monkeypatch, "--train", path, "--languages", "en,zh", "--mlc_weight", 1)
    assert f"{path}:1: field 'prompt_zh' is missing" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "ppo"),
        ("--model", "no/such/folder"),
        ("--device", "nonsense"),
        ("--steps", "0"),
        ("--mlc_layer", "9"),
        ("--freeze", "nonsense"),
        ("--max_length", "3"),
        ("--languages", ""),
    ],
)
def test_a_bad_setting_is_named_in_one_line(tmp_path, capsys, monkeypatch, arguments):
    assert arguments[0] in refused(capsys, monkeypatch, "--output", tmp_path / "run", *arguments)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("module", ["__main__", "lab.ablations"])
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--steps", "0"), "--steps 0: must be at least 1"),
        (("--test_rows", "0"), "--test_rows 0: must be at least 1"),
        (("--output", "README.md"), "--output README.md: cannot be written to"),
    ],
)
def test_the_jobs_on_the_embedded_world_refuse_bad_settings_before_any_work(module, arguments, what, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["mlc_min", *arguments])
    monkeypatch.setattr("mlc_min.lab.experiment.load_model", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(InputError, match=re.escape(what)):
        importlib.import_module(f"mlc_min.{module}").main()
