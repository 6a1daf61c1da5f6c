"""The training loop: what must hold whatever the data, on a tiny random model."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from mlc_min.consistency import make_extractor
from mlc_min.examples import Example, shuffle_translations
from mlc_min.loop import alignment_loss, consistency_loss, row_order, with_reference
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.log import MetricsLog, log_line
from mlc_min.train import TrainConfig, fit, settle_arithmetic

LANGUAGES = "en,zh,sw"
METHODS = ("sft", "dpo", "simpo", "orpo")
TIMES = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_gb")  # differ from run to run


@pytest.fixture
def examples() -> list[Example]:
    draw = torch.Generator().manual_seed(3)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(3, 64, (int(torch.randint(low, high, (1,), generator=draw)),), generator=draw).tolist()

    return [
        Example(f"rows:{i + 1}", {code: ids(2, 9) for code in LANGUAGES.split(",")}, [*ids(1, 6), 2], [*ids(1, 6), 2])
        for i in range(8)
    ]


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


def settings(**changes) -> TrainConfig:
    defaults = dict(
        languages=LANGUAGES, steps=3, batch_size=4, extractor_dim=16, freeze="", learning_rate=1e-3, device="cpu"
    )
    return TrainConfig(**(defaults | changes))


def references(examples: list[Example], model, config: TrainConfig) -> torch.Tensor:
    """(N, 2), what `with_reference` hands to the examples."""
    return torch.tensor([example.reference for example in with_reference(model, examples, config)])


def gradient(model, examples, batch_size: int, config: TrainConfig) -> torch.Tensor:
    """Gradient of the mean over micro-batches of the whole loss, as one vector."""
    torch.manual_seed(0)
    extractor = make_extractor("learned", 32, 16)
    if config.method == "dpo":
        examples = [
            dataclasses.replace(e, reference=tuple(r - 0.3 for r in e.reference))
            for e in with_reference(model, examples, config)
        ]
    model.zero_grad()
    micro_batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    for batch in micro_batches:
        aligned, _ = alignment_loss(model, batch, config)
        consistent = consistency_loss(model, extractor, batch, config)
        ((aligned + config.mlc_weight * consistent) / len(micro_batches)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_dpo_starts_at_log_2_with_margin_0(model, examples):
    _, history = fit(settings(steps=1, sft_weight=0.0), model, examples, quiet=True)
    assert history[0]["align_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[0]["margin"] == pytest.approx(0, abs=1e-5)


def test_dpo_starts_at_log_2_in_bfloat16_arithmetic_too(model, examples):
    config = settings(steps=1, dtype="bfloat16", batch_size=8, mlc_weight=0.8)
    _, history = fit(config, model, examples, quiet=True)
    assert history[0]["align_loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "preset", "dtype", "precision"),
    [
        ("cuda", "paper", "bfloat16", "high"),
        ("cuda", "embedded", "bfloat16", "highest"),
        ("cpu", "paper", "float32", "highest"),
        ("mps", "paper", "float32", "highest"),
    ],
)
def test_the_arithmetic_is_settled_by_device_and_preset(monkeypatch, device, preset, dtype, precision):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    config = settings(dtype="auto", preset=preset)
    settle_arithmetic(config, torch.device(device))
    assert config.dtype == dtype and said == [precision]
    config = settings(dtype="float32", preset=preset)
    settle_arithmetic(config, torch.device(device))
    assert config.dtype == "float32"


def test_dropout_is_off_so_policy_and_reference_agree(tiny_model, examples):
    model = copy.deepcopy(tiny_model).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    _, history = fit(settings(steps=1), model, examples, quiet=True)
    assert history[0]["align_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_precomputed_reference_equals_the_live_one_and_does_not_move(model, examples):
    before = references(examples, model, settings(batch_size=1))
    frozen = copy.deepcopy(model)
    fit(settings(), model, examples, quiet=True)
    assert torch.allclose(before, references(examples, frozen, settings(batch_size=2)), atol=1e-5)
    assert not torch.allclose(before, references(examples, model, settings(batch_size=2)), atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_gives_the_gradient_of_one_large_batch(model, examples, method):
    """Usually groups mix prompts (laid out language by language), or prompts are summed and not averaged."""
    config = settings(method=method, mlc_weight=0.8)
    whole = gradient(model, examples, 8, config)
    parts = gradient(model, examples, 1, config)
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-6 * whole.abs().max().item() * 100)


def test_weight_0_is_the_plain_method_bit_for_bit(tiny_model, examples):
    plain, weighted = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    only_english = [Example(e.where, {"en": e.prompts["en"]}, e.chosen, e.rejected) for e in examples]
    fit(settings(languages="en"), plain, only_english, quiet=True)
    fit(settings(mlc_weight=0.0), weighted, examples, quiet=True)
    for a, b in zip(plain.parameters(), weighted.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_its_loss_and_mlc_the_consistency_loss(model, examples, method):
    config = settings(method=method, steps=40, mlc_weight=2.0, extractor="frozen", batch_size=8, log_every=1)
    _, history = fit(config, model, examples, quiet=True)
    assert history[-1]["align_loss"] < 0.8 * history[0]["align_loss"]
    assert history[-1]["mlc_loss"] < 0.5 * history[0]["mlc_loss"]
    for metrics in history:
        assert metrics["mlc_floor"] <= metrics["mlc_loss"] <= metrics["mlc_ceiling"] + 1e-5


def test_the_same_seed_gives_the_same_weights(tiny_model, examples):
    first, second = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    for model in (first, second):
        fit(settings(mlc_weight=0.8), model, examples, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_mlc_parts_changes_neither_the_loss_nor_the_gradient(model, examples):
    one, three = (gradient(model, examples, 8, settings(mlc_weight=0.8, mlc_parts=parts)) for parts in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-4 * one.abs().max().item(), rtol=1e-3)


def test_mlc_every_skips_the_loss_on_the_other_steps(model, examples):
    config = settings(steps=4, mlc_weight=0.8, mlc_every=2, log_every=1)
    _, history = fit(config, model, examples, quiet=True)
    added = [metrics["loss"] - metrics["align_loss"] - metrics["sft_loss"] for metrics in history]
    expected = [0.8 * metrics.get("consistency_loss", 0.0) for i, metrics in enumerate(history)]
    assert added == pytest.approx(expected, abs=1e-5)
    assert ["consistency_loss" in metrics for metrics in history] == [True, False, True, False]


def test_the_log_shows_the_diagnostics_without_mlc_too_and_they_change_nothing(tiny_model, examples):
    first, second = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    _, history = fit(settings(log_every=1), first, examples, quiet=True)
    english = [Example(e.where, {"en": e.prompts["en"]}, e.chosen, e.rejected) for e in examples]
    _, plain = fit(settings(log_every=1), second, english, quiet=True)
    figures = {"mlc_loss", "mlc_floor", "mlc_ceiling", "mlc_shuffled", "collinearity", "retrieval", "retrieval_chance"}
    assert figures <= set(history[0]) and not figures & set(plain[0])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_cosine_ablation_logs_both_losses(model, examples):
    config = settings(steps=1, mlc_weight=2.0, consistency="cosine")
    _, (metrics,) = fit(config, model, examples, quiet=True)
    assert metrics["loss"] == pytest.approx(
        metrics["align_loss"] + metrics["sft_loss"] + 2 * metrics["consistency_loss"]
    )
    assert metrics["mlc_floor"] <= metrics["mlc_loss"] <= metrics["mlc_ceiling"]


def test_the_consistency_loss_of_a_batch_is_the_mean_over_its_prompts_taken_alone(model, examples):
    """Laid out language by language instead of prompt by prompt, a batch would mix prompts within a group."""
    config = settings(mlc_layer=2)
    batch = consistency_loss(model, torch.nn.Identity(), examples, config)
    alone = [consistency_loss(model, torch.nn.Identity(), [e], config).item() for e in examples]
    assert batch.item() == pytest.approx(sum(alone) / len(alone), abs=1e-5)


def loss_by_numpy(model, extractor, examples, tau: float, form: str) -> float:
    """The consistency loss at entry 2 in float64, one prompt at a time, each in the languages that it has."""
    losses = []
    for example in examples:
        rows = []
        for ids in example.prompts.values():
            state = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, -1]
            row = (extractor.weight @ state + extractor.bias).detach().double().numpy()
            rows.append(row / np.linalg.norm(row))
        sigma = np.linalg.svd(np.stack(rows), compute_uv=False)
        scores = sigma / tau if form == "paper" else sigma / (tau * sigma[0])
        losses.append(np.log(np.exp(scores - scores[0]).sum()))
    return np.mean(losses)


@pytest.mark.parametrize("form", ["official", "paper"])
def test_the_consistency_loss_is_that_of_the_extractor_s_rows_at_the_settings_temperature_and_form(
    model, examples, form
):
    """Usually the extractor is left out, or τ or the form is a fixed one and not that of the settings."""
    torch.manual_seed(1)
    extractor, config = make_extractor("learned", 32, 16), settings(mlc_layer=2, mlc_tau=0.37, mlc_form=form)
    expected = loss_by_numpy(model, extractor, examples, 0.37, form)
    assert consistency_loss(model, extractor, examples, config).item() == pytest.approx(expected, abs=1e-5)


def test_rows_that_lack_translations_count_in_the_languages_they_have(model, examples):
    """Usually the mean is over groups of equally many languages and not over prompts, or a single row is an error."""
    extractor, config = make_extractor("learned", 32, 16), settings(mlc_layer=2)
    for example, missing in zip(examples, ((), ("zh",), ("en", "sw"), ("sw",), ("zh", "sw"), ()), strict=False):
        for language in missing:
            del example.prompts[language]
    expected = loss_by_numpy(model, extractor, examples, 0.2, "official")
    assert consistency_loss(model, extractor, examples, config).item() == pytest.approx(expected, abs=1e-5)
    alone = [example for example in examples if len(example.prompts) == 1]
    assert len(alone) == 2 and consistency_loss(model, extractor, alone, config).item() == 0


def test_consistency_alone_moves_no_layer_above_the_chosen_one(model, examples):
    """Usually the layer of the settings is not used, and states come from the last one."""
    config = settings(mlc_layer=1)
    consistency_loss(model, torch.nn.Identity(), examples, config).backward()
    moved = [layer.mlp.down_proj.weight.grad is not None for layer in model.model.layers]
    assert moved == [True, False, False]


def test_a_frozen_extractor_stays_and_a_learned_one_moves(model, examples):
    for kind, moves in (("frozen", False), ("learned", True)):
        torch.manual_seed(0)
        start = make_extractor("frozen", 32, 16).weight.clone()
        extractor, _ = fit(settings(mlc_weight=0.8, extractor=kind), copy.deepcopy(model), examples, quiet=True)
        assert torch.equal(extractor.weight, start) is not moves


def test_frozen_parameters_do_not_move_and_an_unknown_name_is_an_error(model, examples):
    before = model.get_input_embeddings().weight.clone()
    fit(settings(freeze="embed_tokens"), model, examples, quiet=True)
    assert torch.equal(before, model.get_input_embeddings().weight)
    with pytest.raises(InputError, match="--freeze nonsense"):
        fit(settings(freeze="nonsense"), model, examples, quiet=True)


def test_a_non_finite_loss_stops_and_names_step_and_rows(model, examples):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"step 0: loss is nan.*rows:"):
        fit(settings(method="sft"), model, examples, quiet=True)


def test_the_shuffled_control_trains_on_other_groups_of_the_same_prompts(examples):
    shuffled = shuffle_translations(examples, 1)
    assert [e.prompts["en"] for e in shuffled] == [e.prompts["en"] for e in examples]
    assert [e.prompts["zh"] for e in shuffled] != [e.prompts["zh"] for e in examples]
    assert sorted(e.prompts["zh"] for e in shuffled) == sorted(e.prompts["zh"] for e in examples)


def test_rows_come_in_whole_epochs_in_an_order_of_the_seed():
    def first(n, seed):
        order = row_order(5, seed)
        return [next(order) for _ in range(n)]

    assert sorted(first(5, 0)) == sorted(first(10, 0)[5:]) == [0, 1, 2, 3, 4]
    assert first(10, 0) == first(10, 0) != first(10, 1)
    later = row_order(5, 0, skip=7)
    assert [next(later) for _ in range(6)] == first(13, 0)[7:]


def test_a_resumed_run_ends_with_the_same_bits_and_the_same_log(tiny_model, examples, tmp_path, monkeypatch):
    config = settings(steps=7, mlc_weight=0.8, save_every=2, log_every=1, accumulation=2)
    whole, stopped, resumed = (copy.deepcopy(tiny_model) for _ in range(3))
    extractor, history = fit(config, whole, examples, tmp_path / "whole", quiet=True)

    class Killed(Exception):
        pass

    def kill_at_step_5(log, metrics):
        if metrics["step"] == 5:
            raise Killed
        write(log, metrics)

    write = MetricsLog.write
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "write", kill_at_step_5)
        fit(config, stopped, examples, tmp_path / "stopped", quiet=True)
    config.resume = True
    again, later = fit(config, resumed, examples, tmp_path / "stopped", quiet=True)
    pairs = zip(
        [*whole.parameters(), *extractor.parameters()], [*resumed.parameters(), *again.parameters()], strict=True
    )
    for a, b in pairs:
        assert torch.equal(a, b)

    def timeless(log):
        return [{k: v for k, v in metrics.items() if k not in TIMES} for metrics in log]

    assert timeless(history) == timeless(later)


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(model, examples, tmp_path):
    fit(settings(save_every=1), model, examples, tmp_path, quiet=True)
    with pytest.raises(InputError, match=r"--learning_rate 0.5: .* was made with 0.001"):
        fit(settings(resume=True, learning_rate=0.5), model, examples, tmp_path, quiet=True)
    (tmp_path / "checkpoint.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole checkpoint"):
        fit(settings(resume=True), model, examples, tmp_path, quiet=True)


def test_the_log_is_json_lines_and_the_screen_line_is_aligned(model, examples, tmp_path):
    _, history = fit(settings(mlc_weight=0.8, log_every=1), model, examples, tmp_path, quiet=True)
    assert [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()] == history
    lines = [log_line(metrics) for metrics in history]
    assert len({len(line) for line in lines}) == 1 and "mlc" in lines[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "ppo"),
        ("mlc_form", "new"),
        ("steps", 0),
        ("mlc_tau", 0.0),
        ("mlc_weight", -1.0),
        ("mlc_tau", math.nan),
    ],
)
def test_a_senseless_setting_is_named(name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        settings(**{name: value}).check()
