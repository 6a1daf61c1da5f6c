"""Every part of `python -m tests.gpu`, rehearsed in tiny sizes, with an oracle for what it compares: so none is run for
the first time on somebody's GPU. No test looks at a duration."""

import importlib.util
import json
import re
import shutil
import sys
import warnings
from argparse import Namespace
from types import SimpleNamespace
from unittest.mock import create_autospec

import gpu
import numpy as np
import pytest
import torch

from mlc_min.machinery.errors import InputError
from tests.benchmark import __main__ as runner
from tests.benchmark import measure, parts
from tests.benchmark.workloads import Workload, dpo_operations, mlc_operations

CUDA = SimpleNamespace(type="cuda")  # for code that asks for nothing but the type
VERDICTS = ("ok", "goal", "found", "columns", "rows")


@pytest.fixture
def at() -> Namespace:
    """The flags of a rehearsal on a CPU."""
    device = torch.device("cpu")
    return Namespace(device=device, shape="tiny", rows=1, repeats=1, small=True, for_gpu=True, mlc_parts=1)


def rehearsed(part, at) -> dict:
    """The part's result, whose table has a cell for each column."""
    result = part(at)
    assert set(VERDICTS) <= set(result) and part.__doc__.strip()
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    assert all(isinstance(cell, str) for row in result["rows"] for cell in row)
    json.dumps(result)
    return result


# --- does it agree with a CPU? ---


def test_each_arithmetic_is_as_far_from_float64_as_it_should_be(at):
    result = rehearsed(gpu.agreement, at)
    assert result["ok"]
    names = ["dpo, float32", "dpo, bfloat16", "dpo, gradient checkpointing", "dpo, LoRA, bfloat16"]
    assert [row[0] for row in result["rows"]] == names
    single, half, checkpointed, adapters = result["rows"]
    assert all(float(error) < 1e-5 for error in (*single[2:5], *checkpointed[2:5]))
    assert all(1e-6 < float(error) < 0.05 for error in half[2:5])
    assert {row[-1] for row in result["rows"][:3]} == {"float32"}  # the weights, whatever the arithmetic is
    if importlib.util.find_spec("peft") is None:
        assert "pip install peft" in adapters[-1]
    else:
        assert adapters[3:] == ["", "", "float32"] and float(adapters[2]) < 0.05


@pytest.mark.parametrize(("factor", "fits"), [(1.00001, True), (1.001, False)])
def test_an_error_in_one_gradient_is_seen(at, monkeypatch, factor, fits):
    def trained(model, examples, recipe):
        return [1.0, 1.0], torch.ones(3) * (1.0 if model.dtype == torch.float64 else factor)

    monkeypatch.setattr(gpu, "trained", trained)
    assert gpu.agreement(at)["ok"] is fits


def test_the_gradient_is_that_before_clipping():
    model, examples = gpu.embedded()
    recipe = gpu.replace(gpu.RECIPE, steps=1, max_grad_norm=0.01)
    with pytest.MonkeyPatch.context() as patch:
        norms = []
        clip = torch.nn.utils.clip_grad_norm_
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a)) or norms[-1])
        losses, gradient = gpu.trained(model, examples, recipe)
    assert len(losses) == 1 and norms[0] > 0.01
    assert gradient.norm().item() == pytest.approx(norms[0].item(), rel=1e-5)


def test_counts_are_compared_by_language_kind_and_verdict():
    cell = {"prompts": 100, "refusal": 40, "compliance": 50, "invalid": 10, "cut_off": 7}
    ours = {"en": {"harmful": cell}, "zh": {"harmful": cell | {"refusal": 39, "compliance": 51}}}
    theirs = {"zh": {"harmful": cell | {"cut_off": 0}}, "en": {"harmful": cell | {"refusal": 45, "invalid": 5}}}
    assert gpu.counts_apart(ours, theirs) == [5, 0, 5, 1, 1, 0]


@pytest.mark.parametrize("names", [("base",), pytest.param(("base", "DPO"), marks=pytest.mark.slow)])
def test_the_main_job_is_compared_with_the_committed_counts(at, monkeypatch, names):
    monkeypatch.setattr(gpu, "MAIN", names)
    result = rehearsed(gpu.main_job, at)
    assert tuple(row[0] for row in result["rows"]) == names and not result["ok"]  # of one prompt, and not of 100
    assert result["rows"][0][2] == "38.0" and result["rows"][0][3].endswith(" of 72")


@pytest.mark.slow
def test_on_this_cpu_the_base_model_has_the_committed_counts(at, monkeypatch):
    monkeypatch.setattr(gpu, "MAIN", ("base",))
    at.small = False
    result = rehearsed(gpu.main_job, at)
    assert result["ok"] and result["rows"][0][:5] == ["base", "38.0", "38.0", "0 of 72", "0"]


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_is_the_whole_run(at):
    result = rehearsed(gpu.resume, at)
    assert result["ok"] and [row[1] for row in result["rows"]] == ["0.0e+00", "0.0e+00"]
    assert re.fullmatch("Killed after step [24] of 6.", result["note"])


def test_replies_in_bfloat16_hardly_depend_on_their_batch(at):
    result = rehearsed(parts.evaluation, at)
    assert result["ok"] and result["found"] == "0 of 12 replies are others one by one"


@pytest.mark.slow  # a minute, in which a compiler for C++ is called
@pytest.mark.filterwarnings("ignore")  # torch warns of itself there
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_layers_are_trained_as_well(at):
    result = rehearsed(gpu.compiled, at)
    assert [row[0] for row in result["rows"]] == ["eager", "compiled"] and not result["ok"]  # no card, no peak


# --- who waits? ---


def in_the_package(code: str) -> object:
    """A function `wait` of a file that would lie in the package."""
    names = {"warn": warnings.warn, "helper": lambda text: warnings.warn(text, stacklevel=1)}
    exec(compile(code, f"{gpu.PACKAGE}file.py", "exec"), names)
    return names["wait"]


@pytest.mark.parametrize(("times", "fits"), [(1, True), (2, False)])
def test_waits_are_told_by_the_line_of_ours_and_by_who_waits(at, monkeypatch, times, fits):
    text = "called a synchronizing CUDA operation"
    lines = ["def wait():", f"    [warn('{text}') for _ in range({times})]", f"    helper('{text}')"]
    wait = in_the_package("\n".join([*lines, "    warn('does not yet detect all synchronizing operations')"]))
    clip = torch.nn.utils.clip_grad_norm_
    count = iter(range(9))  # the first step, which is not looked at, warns too

    def clip_and_wait(*arguments):
        next(count)
        wait()
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_wait)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = rehearsed(gpu.waits, at)
    assert result["found"] == f"{times} of ours, 1 of others" and result["ok"] is fits
    rows = {(place, who): number for place, _, who, number in result["rows"]}
    assert rows == {("file.py:2", "ours"): str(times), ("file.py:3", "test_gpu.py, called here"): "1"}


# --- how fast, how much memory? ---


@pytest.mark.parametrize("size", [(3, 4, 8), (2, 10, 512), (2, 6, 3), (1, 1, 5)])
def test_constant_vectors_give_the_singular_values_and_their_gradient(size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    unit = x.detach().numpy() / np.linalg.norm(x.detach().numpy(), axis=-1, keepdims=True)
    sigma = parts.sigma_by_constant_vectors(x)
    np.testing.assert_allclose(sigma.detach().numpy(), np.linalg.svd(unit, compute_uv=False), rtol=1e-12)
    weights = torch.arange(1.0, sigma.shape[1] + 1, dtype=torch.float64)
    (ours,) = torch.autograd.grad((weights * sigma).sum(), x)
    (right,) = torch.autograd.grad((weights * parts.singular_values(x)).sum(), x)
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)


def test_ways_to_the_singular_values_are_told_apart_by_their_errors_near_rank_1(at):
    rows = {row[0]: row[-4:] for row in rehearsed(parts.loss, at)["rows"]}
    assert set(rows) == set(parts.WAYS)
    assert float(rows["Gram matrix, float32"][2]) > 0.5 and rows["Gram matrix, float64"][3] == "NaN"
    for name in (parts.OURS, "QR, SVD of m × m, constant vectors"):
        assert float(rows[name][2]) < 2e-3 and rows[name][3] == "finite", name


@pytest.mark.parametrize("best", ["Gram matrix, float32", "QR, SVD of m × m, constant vectors"])
def test_a_way_that_is_faster_counts_only_if_it_is_as_exact(at, monkeypatch, best):
    times = {name: [1.0] for name in parts.WAYS} | {best: [0.25]}
    monkeypatch.setattr(parts, "alternate", lambda *_: times)
    result = parts.loss(at)
    exact = best != "Gram matrix, float32"
    assert result["ok"] is not exact and (f"{best} takes 0.25" in result["found"]) is exact


def test_the_cost_has_a_counted_ratio_and_a_step_that_does_not_fit_ends_nothing(at, monkeypatch):
    real = Workload.make

    def make(shape, rows, device, layer, parts, lora):
        if lora and parts == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return real(shape, rows, device, layer, parts, lora)

    monkeypatch.setattr(Workload, "make", make)
    rows = rehearsed(parts.cost, at)["rows"]
    work = real("tiny", 1, at.device)
    counted = dpo_operations(work.model.config, work.examples), mlc_operations(work.model.config, work.examples, 2)
    places = [f"tiny, 1 rows, layer 2 of 2, mlc_parts {n}" for n in (4, 2, 1)]
    places += [*(f"tiny, 1 rows, LoRA, layer 2 of 2, mlc_parts {n}" for n in (4, 1)), places[0]]
    assert [row[0] for row in rows] == places
    ratio = f"{1 + counted[1] / counted[0]:.2f}"
    with_lora = ratio if importlib.util.find_spec("peft") else ""
    assert [row[4] for row in rows] == [ratio, ratio, ratio, "", with_lora, ratio]
    assert rows[3][1] == "CUDA out of memory. Tried to allocate 2 "


def test_adapters_are_trained_and_nothing_else(at):
    pytest.importorskip("peft")
    work = Workload.make("tiny", 1, at.device, lora=4)
    work.step(work.loss())
    names = [name for name, p in work.model.named_parameters() if p.requires_grad]
    assert names and all("lora" in name for name in names)


def test_the_share_of_the_peak_by_hand(monkeypatch):
    assert measure.utilisation(3e12, [2.0, 4.0, 3.0], torch.device("cpu")) == ("1", 0.0)
    for card, peak in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=card: name)
        text, part = measure.utilisation(1e15, [4.0], CUDA)
        assert part == pytest.approx(250 / peak) and text == f"2.5e+02 ({100 * 250 / peak:.0f} %)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another card")
    assert measure.utilisation(1e15, [4.0], CUDA) == ("2.5e+02", 0.0)


def test_on_cuda_memory_is_what_torch_says_and_is_limited_to_the_card_that_is_asked_about(monkeypatch):
    """With stand-ins of the same signatures, as no test has a GPU."""
    said = {"mem_get_info": (1, 160e9), "memory_allocated": 3e9, "max_memory_allocated": 5e9}
    said |= dict.fromkeys(("reset_peak_memory_stats", "empty_cache", "synchronize", "set_per_process_memory_fraction"))
    fakes = {name: create_autospec(getattr(torch.cuda, name), return_value=value) for name, value in said.items()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert measure.memory(lambda: None, CUDA) == (5.0, 2.0)
    measure.fresh(CUDA, 80)
    measure.fresh(CUDA)
    assert [call.args for call in fakes["set_per_process_memory_fraction"].call_args_list] == [(0.5,), (1.0,)]
    assert set(measure.alternate({"a": lambda: None}, 1, CUDA)) == {"a"} and fakes["synchronize"].call_count == 2


def test_the_official_layout_is_compared_in_time_and_memory(at):
    result = rehearsed(parts.official, at)
    assert [row[0] for row in result["rows"]] == ["ours", "official layout", "official / ours"]


@pytest.mark.filterwarnings("ignore")
def test_trls_trainer_takes_the_same_step(at):
    pytest.importorskip("trl", reason="TRL is not installed; run `pip install -r requirements-trl.txt`")
    result = rehearsed(parts.trl, at)
    assert [row[0] for row in result["rows"]] == ["DPO", "DPO, live reference", "DPO+MLC, our port"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_port_under_accelerate_launch_has_the_losses_of_our_loop(at):
    pytest.importorskip("trl", reason="TRL is not installed; run `pip install -r requirements-trl.txt`")
    result = rehearsed(gpu.port, at)
    assert result["ok"] and len(result["rows"]) == 4
    assert float(result["rows"][0][1]) != float(result["rows"][3][1])  # it was trained


# --- the command ---


def good(at) -> dict:
    """A part that goes well"""
    return {"columns": ["figure"], "rows": [["1"]], "found": "1", "goal": "1", "ok": True}


def poor(at) -> dict:
    """A part that does not find what was hoped for"""
    return good(at) | {"found": "2", "ok": False, "note": "why"}


def broken(at) -> dict:
    """A part that fails"""
    raise torch.OutOfMemoryError("CUDA out of memory.\nmore")


def lacking(at) -> dict:
    """A part that needs a package"""
    import no_such_package  # noqa: F401


def endless(at) -> dict:
    """A part that is not done in time"""
    while True:
        pass


def start(monkeypatch, output, known, *flags) -> dict:
    """Run the command over these parts; what the file of a rehearsal holds, or that of results."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(output), *map(str, flags)])
    try:
        runner.run_parts(known, "python -m tests.gpu", gpu.__doc__, needs_gpu=True)
    finally:
        files = sorted(path.name for path in output.glob("*.json")) if output.exists() else []
    (name,) = files
    return json.loads((output / name).read_text(encoding="utf-8"))


def test_a_part_that_fails_does_not_stop_the_others_and_makes_the_exit_code_1(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, tmp_path, (good, broken, lacking, poor), "--small", "--device", "cpu")
    assert ended.value.code == 1
    results = json.loads((tmp_path / "rehearsal.json").read_text(encoding="utf-8"))
    expected = {"good": "ok", "broken": "failed", "lacking": "skipped", "poor": "not as hoped"}
    assert {name: result["status"] for name, result in results.items()} == expected
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "good: ok: 1 (hoped for: 1)", "broken: failed: OutOfMemoryError: CUDA out of memory.",
        "lacking: skipped: ModuleNotFoundError: No module named 'no_such_package'",
        "poor: not as hoped: 2 (hoped for: 1)", f"saved in {tmp_path}/: rehearsal.json, rehearsal.md",
    ]  # fmt: skip


def test_what_is_not_as_hoped_or_lacks_a_package_is_no_failure(monkeypatch, tmp_path):
    assert len(start(monkeypatch, tmp_path, (good, lacking, poor), "--small")) == 3


def test_after_the_minutes_are_over_the_running_part_is_stopped_and_the_others_are_skipped(monkeypatch, tmp_path):
    results = start(monkeypatch, tmp_path, (good, endless, poor), "--small", "--minutes", 0.05)
    assert [result["status"] for result in results.values()] == ["ok", "skipped", "skipped"]
    assert results["endless"]["found"] == results["poor"]["found"] == "SystemExit: out of time"


def test_a_rehearsal_is_never_written_as_a_result(monkeypatch, tmp_path):
    results = start(monkeypatch, tmp_path, (good,), "--small", "--device", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rehearsal.json", "rehearsal.md"]
    assert results["good"]["title"] == "REHEARSAL, no result: A part that goes well"
    assert "REHEARSAL, no result" in (tmp_path / "rehearsal.md").read_text(encoding="utf-8")
    assert results["good"]["command"].endswith("--small")


def test_results_have_hardware_versions_and_commit_and_a_part_that_is_run_again_replaces_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "pick_device", lambda name: CUDA)
    monkeypatch.setattr(runner, "fresh", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    start(monkeypatch, tmp_path, (good, poor))
    results = start(monkeypatch, tmp_path, (good, poor), "--parts", "poor")
    assert list(results) == ["good", "poor"]
    for result in results.values():
        assert result["hardware"] == "NVIDIA H100" and {"versions", "commit", "seconds"} <= set(result)
    assert results["good"]["command"] == ("python -m tests.gpu --parts good --shape qwen2.5-0.5b --rows 4 --repeats 5")
    page = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "**not as hoped: 2 (hoped for: 1)**" in page and "| figure |\n|---|\n| 1 |" in page


def test_without_a_gpu_it_is_one_line_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path / "out")])
    with pytest.raises(InputError, match="no GPU with CUDA here; --small rehearses") as error:
        gpu.main()
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
