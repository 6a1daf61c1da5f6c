"""The benchmark measures what it says: operations, the baseline's losses, jobs in turn. No test looks at a duration."""

import json
import sys
import weakref
from argparse import Namespace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlc_min.consistency import mlc_loss
from mlc_min.lab.random_model import make_config, make_model
from mlc_min.machinery.errors import InputError
from tests.benchmark import __main__ as command
from tests.benchmark import parts
from tests.benchmark.measure import alternate, measured, memory, ratios, spread
from tests.benchmark.workloads import (
    Workload,
    dpo_operations,
    forward_operations,
    make_examples,
    mlc_operations,
    official_loss,
)

CPU = torch.device("cpu")


@pytest.fixture
def work():
    return Workload(make_model("tiny", CPU, 500), make_examples(3, 500, languages=4))


# --- what is counted ---


def test_operations_by_hand():
    config = make_config("tiny")  # hidden 64, heads of 16, two of them for keys and values, MLP 96, vocabulary 4000
    weights = 64 * 64 * 2 + 64 * 16 * 2 * 2 + 3 * 64 * 96
    one_layer = 2 * weights * 8 + 2 * 64 * (3 * 3 + 5 * 5)
    assert forward_operations(config, [3, 5], layers=1) == one_layer
    assert forward_operations(config, [3, 5], layers=2, head_tokens=7) == 2 * one_layer + 2 * 64 * 4000 * 7


def test_operations_are_those_that_torch_counts_and_attention_which_it_does_not_count_on_a_cpu():
    model, length = make_model("tiny", CPU, 500), 12
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(3, 500, (1, length)))
    attention = 2 * 2 * 64 * length * length  # layers x 2 x hidden x length²
    assert forward_operations(model.config, [length], 2, length) == counter.get_total_flops() + attention


def test_a_step_is_three_forward_passes_and_mlc_needs_no_head(work):
    config, examples = work.model.config, work.examples
    lengths = [
        len(e.prompts["l0"]) + len(r) for r_of in ("chosen", "rejected") for e in examples for r in [getattr(e, r_of)]
    ]
    tokens = sum(len(e.chosen) + len(e.rejected) for e in examples)
    assert dpo_operations(config, examples) == 3 * forward_operations(config, lengths, 2, tokens)
    prompts = [len(ids) for e in examples for ids in e.prompts.values()]
    assert len(prompts) == 12
    assert mlc_operations(config, examples, 1) == 3 * forward_operations(config, prompts, 1)


# --- what is compared ---


def test_the_official_layout_has_our_loss_and_our_gradient(work):
    reference = make_model("tiny", CPU, 500)  # the same seed, so the same weights
    gradients = []
    for loss in (work.loss(uses_mlc=True), official_loss(work, reference)):
        loss.backward()
        parameters = [*work.model.parameters(), *work.extractor.parameters()]
        gradients.append((loss.item(), torch.cat([p.grad.flatten() for p in parameters])))
        work.optimizer.zero_grad()
    (ours, g), (theirs, h) = gradients
    assert ours == pytest.approx(theirs, abs=1e-5)
    torch.testing.assert_close(g, h, atol=1e-5 * g.abs().max().item(), rtol=0)


def test_every_way_to_the_singular_values_has_the_same_loss():
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    losses = [parts.loss_by(way, x).item() for way in parts.WAYS.values()]
    assert losses[0] == mlc_loss(x).item()  # the first is the package's
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


# --- how it is measured ---


def test_jobs_are_warmed_up_and_then_run_in_turn():
    seen = []
    seconds = alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, CPU)
    assert seen == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_taken_round_by_round():
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == [2.0, 3.0, 1.0]
    assert spread([2.0, 3.0, 1.0]) == "2.00 (1.00 to 3.00)"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_was_used_for_a_moment_is_seen():
    peak, added = memory(lambda: torch.ones(100_000_000).sum(), CPU)  # 0.4 GB
    assert 0.35 < added < 0.6 and peak > added


def test_what_one_job_alone_holds_does_not_count_against_the_next():
    held, seen = [torch.ones(3)], []
    alive = weakref.ref(held[0])
    jobs = {"first": partial(torch.Tensor.sum, held.pop()), "second": lambda: seen.append(alive() is None)}
    results = measured(jobs, Namespace(device=CPU, repeats=1))
    assert not jobs and all(set(result) == {"first", "second"} for result in results)
    assert seen == [False, False, True, True]  # a warm-up and a round in turn; then alone, for the memory


# --- the command ---


def run(monkeypatch, output, *arguments) -> dict:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--shape", "tiny", "--output", str(output), *arguments])
    command.main()
    return json.loads((output / "benchmark.json").read_text(encoding="utf-8"))


def test_the_command_adds_its_parts_to_the_results(monkeypatch, tmp_path, capsys):
    common = ("--rows", "1", "--repeats", "1", "--device", "cpu")
    results = run(monkeypatch, tmp_path, "--parts", "cost", *common)
    results = run(monkeypatch, tmp_path, "--parts", "official", *common)
    assert list(results) == ["cost, tiny", "official, tiny"]
    for result in results.values():
        assert all(len(row) == len(result["columns"]) for row in result["rows"])
        assert {"hardware", "versions", "commit", "command", "seconds", "title", "status"} <= set(result)
    places = ["layer 2 of 2, mlc_parts 4", "layer 2 of 2, mlc_parts 1", "layer 1 of 2, mlc_parts 4"]
    assert [row[0] for row in results["cost, tiny"]["rows"]] == places
    page = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "official / ours" in page and "official / ours" in capsys.readouterr().out
    assert "python -m tests.benchmark --parts official --shape tiny --rows 1 --repeats 1" in page


def test_senseless_settings_are_refused(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        run(monkeypatch, tmp_path, "--repeats", "0")
    (tmp_path / "benchmark.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        run(monkeypatch, tmp_path)
