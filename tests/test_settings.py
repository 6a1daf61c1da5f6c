"""Settings: defaults, preset, file, flags, in this order; every bad one is one line and exit code 2."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlc_min.machinery.errors import InputError, run_command
from mlc_min.machinery.settings import PAPER, TrainConfig, parse_settings, read_settings
from mlc_min.train import main

SAMPLES = {int: "3", float: "0.25", bool: "true", str: "text"}


def parse(*arguments) -> TrainConfig:
    return parse_settings("", [str(argument) for argument in arguments])


def test_without_anything_the_small_models_settings_hold():
    assert parse() == TrainConfig(preset="embedded", mlc_weight=6.0, mlc_tau=0.5, mlc_layer=3)


@pytest.mark.parametrize("flag", ["--model", "--train"])
def test_another_model_or_other_rows_get_the_papers_settings_unless_asked_otherwise(flag, tmp_path):
    config = parse(flag, "mine")
    assert (config.preset, config.mlc_weight, config.freeze, config.learning_rate) == ("paper", 0.8, "", 6e-7)
    assert parse(flag, "mine", "--preset", "embedded").learning_rate == 1e-4
    (tmp_path / "a.yaml").write_text(f"{flag[2:]}: mine\n")
    assert parse("--config", tmp_path / "a.yaml").preset == "paper"


def test_steps_that_are_asked_for_are_not_overridden_by_the_presets_epochs_or_the_files(tmp_path):
    assert (parse("--model", "mine").epochs, parse("--model", "mine", "--steps", 7).epochs) == (3.0, 0.0)
    (tmp_path / "a.yaml").write_text("epochs: 2\n")
    assert parse("--config", tmp_path / "a.yaml", "--steps", 7).epochs == 0.0
    assert parse("--preset", "paper", "--steps", 7, "--epochs", 1).epochs == 1.0


def test_the_first_line_says_which_preset_and_what_differs_from_it():
    config = parse("--model", "mine", "--mlc_tau", 0.5, "--seed", 3)
    line = "preset paper: DPO, MLC λ 0.8; what differs from the preset: mlc_tau 0.5 (not 0.2); seed 3 (not 0)"
    assert config.described() == line
    assert "no MLC (--mlc_weight 0)" in parse("--mlc_weight", 0).described()


@pytest.mark.parametrize(
    "item", [f for f in fields(TrainConfig) if type(f.default) in (int, float)], ids=lambda f: f.name
)
def test_every_number_has_bounds_that_are_named_with_their_unit(item):
    left, low, most, unit = re.fullmatch(r"([(\[])(\S+), (\S+)\] (.+)", item.metadata["bounds"]).groups()
    low, most, kind = float(low), float(most), type(item.default)
    outside = [most * 2 + 1, low - 1, *([low] if left == "(" else [])]
    for value in [*outside, *([float("nan"), float("inf")] if kind is float else [])]:
        assert refused(f"--{item.name}={kind(value)}").endswith(f"({unit})")
    for value in [most, *([low] if left == "[" else [])]:
        assert getattr(parse(f"--{item.name}={kind(value)}"), item.name) == value


def test_the_preset_is_the_papers_and_flags_override_it():
    config = parse("--preset", "paper", "--mlc_tau", 0.5)
    assert {name: getattr(config, name) for name in PAPER} == PAPER | {"mlc_tau": 0.5}
    # The official runs, as published: λ, τ, β, every second step, learning rate, epochs, 32 rows a step.
    assert (config.mlc_weight, config.beta, config.mlc_every, config.learning_rate) == (0.8, 0.1, 2, 6e-7)
    assert (config.epochs, config.batch_size * config.accumulation, config.sft_weight) == (3.0, 32, 0.0)


@pytest.mark.parametrize("name", ["settings.yaml", "settings.json"])
def test_a_file_overrides_the_preset_and_flags_override_the_file(tmp_path, name):
    values = {"preset": "paper", "learning_rate": 1e-5, "mlc_weight": 2, "harmful_only": True, "output": "x"}
    path = tmp_path / name
    path.write_text(json.dumps(values) if name.endswith("json") else "".join(f"{k}: {v}\n" for k, v in values.items()))
    config = parse("--config", path, "--output", "y")
    assert (config.learning_rate, config.mlc_weight, config.harmful_only, config.output) == (1e-5, 2.0, True, "y")
    assert config.mlc_every == 2 and config.preset == "paper"


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("learning_rate: 6e-7\nmlc_weight: 1\n")
    assert read_settings(path) == {"learning_rate": 6e-7, "mlc_weight": 1.0}


@pytest.mark.parametrize("name, content", [("a.json", '{"steps": 7}'), ("a.yaml", "steps: 7\r\n")])
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_part_of_a_settings_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_settings(tmp_path / name) == {"steps": 7}


@pytest.mark.parametrize("field", fields(TrainConfig), ids=lambda field: field.name)
def test_every_flag_is_read_and_shown_with_its_default(field, capsys, tmp_path):
    value = (get_args(field.type) or [SAMPLES[type(field.default)]])[-1]
    if field.name == "languages":
        value = "en,zh"
    if field.name == "config":
        (tmp_path / "a.json").write_text("{}")
        value = tmp_path / "a.json"
    parsed = getattr(parse(f"--{field.name}", value), field.name)
    assert type(parsed) is type(field.default) and str(parsed).lower() == str(value)
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0 and f"--{field.name} " in capsys.readouterr().out


def refused(*arguments) -> str:
    with pytest.raises(InputError) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.yaml", "steps: [1", ":1: not YAML"),
        ("a.yaml", "steps: 3\n\tx: 4\n", ":2: not YAML"),
        ("a.json", '{"steps": 3,\n}', ":2: not JSON"),
        ("a.yaml", "- 1\n", ": must be a mapping of settings"),
        ("a.yaml", "", ": must be a mapping of settings"),
        ("a.yaml", "stepz: 3\n", ": there is no setting 'stepz'"),
        ("a.yaml", "1: 3\n", ": there is no setting 1"),
        ("a.yaml", "config: b.yaml\n", ": there is no setting 'config'"),
        ("a.yaml", "steps: three\n", ": steps must be a whole number, not 'three'"),
        ("a.yaml", "steps: 3.5\n", ": steps must be a whole number, not 3.5"),
        ("a.yaml", "steps: true\n", ": steps must be a whole number, not True"),
        ("a.yaml", "learning_rate: fast\n", ": learning_rate must be a number, not 'fast'"),
        ("a.yaml", "resume: 1\n", ": resume must be true or false, not 1"),
        ("a.yaml", "output: 7\n", ": output must be text, not 7"),
        ("a.yaml", "steps: 7\nsteps: 8\n", ": the key 'steps' comes twice"),
        ("a.json", '{"steps": 7, "steps": 8}', ": the key 'steps' comes twice"),
        ("a.yaml", "output: !!python/object/apply:os.getcwd []\n", ":1: not YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name, content, what):
    path = tmp_path / name
    path.write_text(content)
    assert refused("--config", path).startswith(f"{path}{what}")


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    assert "--config no/such.yaml" in refused("--config", "no/such.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused("--config", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--preset", "mine"),
        ("--mlc_weight", "nan"),
        ("--learning_rate", "inf"),
        ("--learning_rate", "0"),
        ("--steps", "0"),
        ("--missing", "perhaps"),
        ("--lora", "-1"),
        ("--languages", "en", "--mlc_weight", "1"),
    ],
)
def test_a_senseless_value_is_named(arguments):
    assert refused(*arguments).startswith(f"{arguments[0]} ")


def test_an_unknown_flag_ends_with_exit_code_2_and_no_traceback():
    command = [sys.executable, "-m", "mlc_min.train", "--nonsense", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--nonsense" in result.stderr and "Traceback" not in result.stderr


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.deferred(lambda: scalars | st.lists(values, max_size=2) | st.dictionaries(keys, values, max_size=3))
keys = st.text(max_size=3)
names = st.sampled_from([field.name for field in fields(TrainConfig)]) | st.text(max_size=8)
settings_files = st.dictionaries(names, values, max_size=3).map(json.dumps) | st.text(max_size=40)


@settings(max_examples=300)
@given(settings_files, st.sampled_from([".json", ".yaml"]))
def test_any_settings_file_gives_settings_or_one_line(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("settings") / f"a{suffix}"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        config = parse("--config", path)
    except InputError as error:
        assert "\n" not in str(error)
    except SystemExit:
        pytest.fail(f"argparse refused {content!r} in its own way")
    else:
        assert all(type(getattr(config, field.name)) is type(field.default) for field in fields(TrainConfig))


def test_settings_are_checked_before_anything_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.yaml").write_text(f"output: {tmp_path / 'out'}\nsteps: -1\n")
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(tmp_path / "a.yaml")])
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2 and "--steps -1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
