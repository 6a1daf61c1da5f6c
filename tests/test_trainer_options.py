"""What the trainer offers beside its loop: rows in different languages, memory savers, adapters, the card, the log."""

import copy
import dataclasses
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from mlc_min.consistency import cosine_loss, mlc_ceiling, mlc_floor, mlc_loss
from mlc_min.evaluation.diagnose import probe_figures
from mlc_min.examples import Example, encode_rows
from mlc_min.lab.sentences import EMBEDDED
from mlc_min.loop import Run, alignment_loss, consistency_loss, row_order, train
from mlc_min.machinery.checkpoint import save_checkpoint
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.models import checkpoint_activations, freeze, load_model
from mlc_min.machinery.rows import read_rows
from mlc_min.machinery.settings import TrainConfig
from mlc_min.states import last_token_states
from mlc_min.train import fit, main, token_count

LANGUAGES = ("en", "zh", "sw")


def settings(**changes) -> TrainConfig:
    defaults = dict(languages="en,zh,sw", steps=3, batch_size=4, extractor_dim=16, freeze="", learning_rate=1e-3)
    return TrainConfig(**(defaults | {"device": "cpu"} | changes))


@pytest.fixture
def mixed() -> list[Example]:
    """Four rows: three languages, two, one, and another two."""
    return [
        Example("f:1", {"en": [5, 6], "zh": [7, 8, 9], "sw": [10]}, [11, 2], [12, 13, 2]),
        Example("f:2", {"en": [14], "sw": [15, 16]}, [17, 2], [18, 2]),
        Example("f:3", {"en": [19, 20, 21]}, [22, 2], [23, 2]),
        Example("f:4", {"en": [24, 25], "zh": [26]}, [27, 28, 2], [29, 2]),
    ]


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


# --- no waiting ---


class HostWaits(TorchDispatchMode):
    """Counts, by the line of ours that asks, the operations for which the host would wait for a GPU: reading a number,
    and an index whose size depends on the values."""

    def __init__(self):
        super().__init__()
        self.lines: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            # Between the operation and this method stand torch's own wrappers of such methods.
            wrappers = [os.path.join("torch", name) for name in ("utils", "_dynamo", "_compile.py")]
            stack = [f for f in traceback.extract_stack()[:-1] if not any(name in f.filename for name in wrappers)]
            asking = stack[-1]
            if f"{os.sep}mlc_min{os.sep}" in asking.filename:  # and not in transformers or in torch's optimizer
                self.lines[f"{Path(asking.filename).name}:{asking.lineno}"] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sft", "dpo", "simpo", "orpo"])
def test_a_step_waits_for_the_device_at_most_twice_a_micro_batch_and_once_for_the_norm(model, mixed, method):
    examples = [dataclasses.replace(mixed[0], where=f"f:{i}", reference=(-1.0, -2.0)) for i in range(8)]
    config = settings(method=method, mlc_weight=1.0, mlc_parts=2, batch_size=2, accumulation=4)
    steps = train(Run.start(model, config), examples, config)
    next(steps)  # what is done once, such as the optimizer's state
    with HostWaits() as waits:
        next(steps)
    assert sum(waits.lines.values()) == 4 + 1, waits.lines  # the check of the states; the norm
    with HostWaits() as waits:
        torch.ones(3)[torch.ones(3) > 0].sum().item()
        mlc_floor(3, 2)
        assert not waits.lines  # those of this file do not count
        cosine_loss(torch.ones(1, 2, 2))
    assert sum(waits.lines.values()) == 1


# --- rows with different languages ---


@pytest.mark.parametrize("consistency", ["mlc", "cosine"])
def test_groups_with_different_languages_in_one_batch_give_the_mean_of_each_ones_own_loss(model, mixed, consistency):
    extractor = torch.nn.Linear(32, 16)
    config = settings(consistency=consistency)
    loss, metrics = consistency_loss(model, extractor, mixed, config), probe_figures(model, extractor, mixed, config)
    expected, floors, ceilings = [], [], []
    for example in mixed:
        states = torch.cat([
            last_token_states(model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
            for ids in example.prompts.values()
        ])[None]  # fmt: skip
        expected.append(cosine_loss(extractor(states)) if consistency == "cosine" else mlc_loss(extractor(states)))
        floors.append(mlc_floor(len(example.prompts), 16))
        ceilings.append(mlc_ceiling(len(example.prompts), 16))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)
    assert metrics["mlc_floor"] == pytest.approx(sum(floors) / 4)
    assert metrics["mlc_ceiling"] == pytest.approx(sum(ceilings) / 4)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.model.layers.parameters())


def rows_file(tmp_path, rows: list[dict]):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


def run(monkeypatch, tmp_path, *arguments) -> None:
    base = ("--output", tmp_path / "run", "--steps", 2, "--batch_size", 2, "--device", "cpu", "--log_every", 1)
    base += ("--reference_cache", "", "--extractor_dim", 16)
    base += ("--preset", "embedded", "--mlc_layer", -1, "--mlc_weight", 0)
    monkeypatch.setattr(sys, "argv", ["train", *map(str, (*base, *arguments))])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main()


ROW = {
    "prompt": "How can I draw the bus?",
    "prompt_zh": "我怎样才能画公交车？",
    "chosen": "🚫 Sorry",
    "rejected": "✏🚌 Sure",
}
NO_ZH = {name: text for name, text in ROW.items() if name != "prompt_zh"}


@pytest.mark.parametrize(("policy", "used"), [("skip", 2), ("present", 3)])
def test_rows_that_lack_a_translation_are_counted_and_skipped_or_used(monkeypatch, tmp_path, capsys, policy, used):
    path = rows_file(tmp_path, [ROW, NO_ZH, ROW])
    common = ("--train", path, "--languages", "en,zh", "--mlc_weight", 1)
    with pytest.raises(InputError, match=r"rows.jsonl:2: field 'prompt_zh' is missing"):
        run(monkeypatch, tmp_path, *common)
    assert not (tmp_path / "run").exists()
    run(monkeypatch, tmp_path, *common, "--missing", policy)
    assert f"3 rows, {used} used; 1 lack some translation, 0 a response" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/model/train_config.json").read_text())
    assert record["rows"] == dict(
        read=3, lacking_translations=1, lacking_responses=0, prompt_too_long=0, response_too_long=0, used=used
    )


def test_rows_that_are_too_long_are_counted_by_reason_or_refused(monkeypatch, tmp_path, capsys):
    long = "draw the bus and " * 60
    rows = [ROW, ROW | {"prompt": long}, ROW | {"chosen": long}, ROW]
    path = rows_file(tmp_path, rows)
    common = ("--train", path, "--languages", "en", "--max_length", 80)
    run(monkeypatch, tmp_path, *common)
    printed = capsys.readouterr().out
    assert "4 rows, 2 used" in printed and "1 by the prompt alone, 1 with the response" in printed
    with pytest.raises(InputError, match=r"rows.jsonl:2: longer than --max_length 80"):
        run(monkeypatch, tmp_path, *common, "--too_long", "error")


def test_epochs_become_steps(monkeypatch, tmp_path):
    path = rows_file(tmp_path, [ROW] * 5)
    run(monkeypatch, tmp_path, "--train", path, "--languages", "en", "--epochs", 2, "--method", "sft")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]  # 2 passes over 5 rows in batches of 2
    assert json.loads((tmp_path / "run/model/train_config.json").read_text())["settings"]["steps"] == 5


# --- memory ---


def losses(model, examples, config) -> list[torch.Tensor]:
    examples = [dataclasses.replace(example, reference=(0.0, 0.0)) for example in examples]
    total = alignment_loss(model, examples, config)[0]
    total = total + consistency_loss(model, torch.nn.Identity(), examples, config)
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("layer", [-1, 1])
def test_gradient_checkpointing_changes_memory_and_not_the_gradient(tiny_model, mixed, layer):
    plain, saving = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    for module in saving.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # it must be switched off, or the losses would differ
    checkpoint_activations(saving)
    config = settings(mlc_layer=layer)
    for a, b in zip(losses(plain, mixed, config), losses(saving, mixed, config), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_loop_with_gradient_checkpointing_ends_with_the_same_weights(tiny_model, mixed):
    first, second = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    fit(settings(mlc_weight=0.8), first, mixed, quiet=True)
    fit(settings(mlc_weight=0.8, gradient_checkpointing=True), second, mixed, quiet=True)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_sorting_by_length_keeps_every_row_once_an_epoch_and_resumes_in_place():
    lengths = [length * 7 % 11 for length in range(230)]
    order = row_order(230, 0, 0, lengths, 100)
    epoch = [next(order) for _ in range(230)]
    assert sorted(epoch) == list(range(230)) and epoch != sorted(epoch)
    for start in range(0, 200, 100):
        chunk = [lengths[i] for i in epoch[start : start + 100]]
        assert chunk == sorted(chunk, reverse=True)
    later = row_order(230, 0, 57, lengths, 100)
    assert [next(later) for _ in range(100)] == epoch[57:157]


def test_tokens_are_counted_as_the_model_sees_them(mixed):
    assert token_count(mixed[0], "sft", False) == 2 + 2
    assert token_count(mixed[0], "dpo", False) == (2 + 2) + (2 + 3)
    assert token_count(mixed[0], "dpo", True) == (2 + 2) + (2 + 3) + (2 + 3 + 1)


# --- adapters ---

PEFT = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers in a way that is going out of use


@PEFT
def test_lora_trains_the_adapters_alone_starts_at_the_base_and_is_saved_as_peft_reads_it(monkeypatch, tmp_path):
    peft = pytest.importorskip("peft")
    arguments = (
        "--train",
        rows_file(tmp_path, [ROW] * 4),
        "--languages",
        "en,zh",
        "--mlc_weight",
        1,
        "--lora",
        4,
        "--freeze",
        "",
    )
    run(monkeypatch, tmp_path, *arguments, "--learning_rate", 1e-2)
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert log[0]["align_loss"] == pytest.approx(0.693147, abs=1e-5)  # the reference is the model without adapters
    folder = tmp_path / "run/model"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "extractor.safetensors", "README.md"} <= names
    assert "model.safetensors" not in names and "AutoPeftModelForCausalLM" in (folder / "README.md").read_text("utf-8")
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "model")
    before = {name: p.clone() for name, p in base.named_parameters()}
    adapted = peft.PeftModel.from_pretrained(base, folder)
    weights = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(weights) == 4 * 7 and any(p.abs().sum() > 0 for p in weights.values())
    ids = torch.tensor([[5, 6, 7, 8]])
    ours, _ = load_model(folder)  # as `mlc_min.safety --model` does
    assert torch.allclose(ours(ids).logits, adapted(ids).logits, atol=1e-5)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, before["model.embed_tokens.weight"])


@PEFT
def test_lora_resumes_to_the_same_bits(monkeypatch, tmp_path):
    pytest.importorskip("peft")
    arguments = ("--train", rows_file(tmp_path, [ROW] * 6), "--languages", "en,zh", "--mlc_weight", 1)
    arguments += ("--lora", 2, "--freeze", "", "--steps", 4)
    run(monkeypatch, tmp_path / "whole", *arguments)
    run(monkeypatch, tmp_path / "parts", *arguments, "--save_every", 2)
    state = torch.load(tmp_path / "parts/run/checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and all("lora" in name for name in state["model"])
    (tmp_path / "parts/run/checkpoint.pt").unlink()
    monkeypatch.setattr("mlc_min.train.save_checkpoint", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "parts", *arguments, "--save_every", 1)
    monkeypatch.undo()
    run(monkeypatch, tmp_path / "parts", *arguments, "--resume", "true")
    first, second = (load_file(tmp_path / part / "run/model/adapter_model.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def stop_after_two(path, run, *more):
    save_checkpoint(path, run, *more)
    if run.step == 2:
        raise KeyboardInterrupt


def test_without_peft_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        run(monkeypatch, tmp_path, "--languages", "en", "--lora", 4, "--method", "sft")


# --- what is left behind ---


def test_the_model_folder_says_how_it_was_made(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--train", rows_file(tmp_path, [ROW] * 4), "--languages", "en,zh", "--mlc_weight", 0.8)
    folder = tmp_path / "run/model"
    record = json.loads((folder / "train_config.json").read_text())
    assert record["settings"]["mlc_weight"] == 0.8 and record["versions"]["torch"] == torch.__version__
    assert record["git_commit"] is None or len(record["git_commit"].split()[0]) == 40
    assert json.loads((tmp_path / "run/run.json").read_text()) == record  # there from the start
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n---\n\n# model, aligned with DPO + 0.8 x MLC")
    assert "| `mlc_weight` | `0.8` |" in card and "| mlc_loss |" in card and "No safety has been measured" in card
    AutoModelForCausalLM.from_pretrained(folder)


def test_tensorboard_gets_every_figure(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(monkeypatch, tmp_path, "--languages", "en", "--method", "sft", "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in log])


def test_an_attention_backend_that_is_none_is_one_line(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--languages", "en", "--method", "sft", "--attention", "eager")
    with pytest.raises(InputError, match="--model"):
        run(monkeypatch, tmp_path, "--languages", "en", "--attention", "nonsense")


def test_frozen_parameters_are_not_in_the_checkpoint(model, mixed, tmp_path):
    fit(settings(freeze="embed_tokens", save_every=1), model, mixed, tmp_path, quiet=True)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert set(saved) == {name for name, _ in model.named_parameters()} - set(freeze(model, "embed_tokens"))


def test_the_embedded_rows_all_fit(base):
    rows = read_rows(EMBEDDED / "train.jsonl", LANGUAGES, ("chosen", "rejected"))
    assert encode_rows(rows, base[1], LANGUAGES, 1024)[1] == {"prompt": [], "response": []}
