"""The port to TRL: its losses and gradients are those of our loop, TRL's options change no figure, and two processes
train what one does. Skipped without TRL. The model is the embedded one with noise on its weights: no loss is near 0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

pytest.importorskip("trl", reason="TRL is not installed; run `pip install -r requirements-trl.txt`")

import datasets
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig
from trl import DPOConfig, SFTConfig

from mlc_min.examples import encode_rows, preference_batch, response_batch
from mlc_min.lab.sentences import EMBEDDED
from mlc_min.loop import response_logps, row_order
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.models import load_model
from mlc_min.machinery.rows import read_rows
from mlc_min.machinery.settings import TrainConfig
from mlc_min.ports import trl as port
from mlc_min.train import fit

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("en", "zh", "sw")
# A strong loss of a middle layer, so that an error in it shows.
MLC = dict(languages=",".join(LANGUAGES), mlc_weight=6.0, mlc_tau=0.5, mlc_layer=3, mlc_every=2, extractor_dim=16)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
# TRL 1.16 uses what transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder; TRL loads the reference model from it too."""
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = load_model(EMBEDDED / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with (EMBEDDED / "train.jsonl").open(encoding="utf-8") as rows:
        path.write_text("".join(list(rows)[:32]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def encoded(base):
    rows = read_rows(EMBEDDED / "train.jsonl", LANGUAGES, ("chosen", "rejected"))
    return encode_rows(rows, base[1], LANGUAGES, 1024)[0]


@pytest.fixture(scope="module")
def examples(encoded):
    """16 rows with chosen responses of one length: for them TRL's mean of the SFT loss is ours."""
    return [example for example in encoded if len(example.chosen) == 10][:16]


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL then does not report its use to its makers
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def trainer_of(folder, tmp_path):
    def make(method, examples, mlc=MLC, peft_config=None, evaluated=None, **changes):
        """A trainer that takes the rows in their order, four a step, for four steps."""
        kind, config = (port.MLCDPOTrainer, DPOConfig) if method == "dpo" else (port.MLCSFTTrainer, SFTConfig)
        settings = dict(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, max_steps=4, per_device_train_batch_size=4,
            learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=1, seed=3, save_strategy="no",
            train_sampling_strategy="sequential", logging_steps=1, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        mlc = port.MLCConfig(method=method, **mlc)
        model, tokenizer = load_model(folder)
        data = dict(eval_dataset=evaluated and port.token_dataset(evaluated, mlc), processing_class=tokenizer)
        dataset = port.token_dataset(examples, mlc)
        return kind(model, config(**settings | changes), mlc, dataset, peft_config=peft_config, **data)

    return make


def logged(trainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(first: dict, second: dict) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


# --- the same as our loop ---


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_the_token_ids_are_those_of_our_loop(trainer_of, examples, method):
    trainer = trainer_of(method, examples)
    batch = next(iter(trainer.get_train_dataloader()))
    first = examples[:4]
    alone = response_batch([e.prompt for e in first], [e.chosen for e in first])
    ours = preference_batch(first) if method == "dpo" else alone
    in_response = batch["completion_mask"].bool() if method == "dpo" else batch["labels"] != -100
    assert torch.equal(batch["input_ids"], ours["input_ids"]) and torch.equal(in_response, ours["response_mask"])
    assert torch.equal(batch["attention_mask"], ours["attention_mask"])
    assert [e.prompts for e in batch["translations"]] == [e.prompts for e in examples[:4]]


@pytest.mark.parametrize("weight", [0.0, 6.0])
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_losses_and_gradients_are_those_of_our_loop_step_by_step(
    trainer_of, folder, examples, method, weight, monkeypatch
):
    seen: list[list] = []
    clip = torch.nn.utils.clip_grad_norm_

    def before_clipping(parameters, *settings, **named):
        parameters = list(parameters)
        seen[-1].append([None if p.grad is None else p.grad.clone() for p in parameters])
        return clip(parameters, *settings, **named)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", before_clipping)
    mlc = MLC | {"mlc_weight": weight}
    config = TrainConfig(
        method=method, steps=4, batch_size=4, freeze="", sft_weight=0.0, learning_rate=1e-4, warmup=0.25, log_every=1,
        seed=3, **mlc,
    )  # fmt: skip
    seen.append([])
    _, history = fit(config, load_model(folder)[0], examples, quiet=True)
    order = row_order(len(examples), config.seed)
    seen.append([])
    trainer = trainer_of(method, [examples[next(order)] for _ in range(16)], mlc)
    trainer.train()

    assert logged(trainer, "loss") == pytest.approx([line["loss"] for line in history], rel=1e-5)
    mlc_losses = [line["consistency_loss"] for line in history[::2]] if weight else []
    assert logged(trainer, "mlc_loss") == pytest.approx(mlc_losses, rel=1e-5)
    assert len(seen[0]) == len(seen[1]) == 4
    worst = 0.0
    for ours, theirs in zip(*seen, strict=True):
        # In the steps between, the extractor has no gradient, and Adam does not move it.
        assert [g is None for g in ours] == [g is None for g in theirs]
        ours, theirs = [g for g in ours if g is not None], [g for g in theirs if g is not None]
        scale = max(g.abs().max() for g in ours)
        worst = max(worst, *((a - b).abs().max() / scale for a, b in zip(ours, theirs, strict=True)))
    print(f"largest difference of a gradient, {method}, λ {weight}: {worst:.1e} of the largest")
    assert worst < 1e-5


def test_sft_keeps_trls_mean_over_tokens_where_our_loop_has_one_over_rows(trainer_of, folder, encoded):
    short, long = (next(example for example in encoded if len(example.chosen) == n) for n in (10, 20))
    model, _ = load_model(folder)
    batch = response_batch([short.prompt, long.prompt], [short.chosen, long.chosen])
    with torch.no_grad():
        logps, lengths = response_logps(model, batch)
    trainer = trainer_of("sft", [short, long], MLC | {"mlc_weight": 0.0}, max_steps=1, per_device_train_batch_size=2)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([-(logps.sum() / lengths.sum()).item()], rel=1e-5)
    assert logged(trainer, "loss") != pytest.approx([-(logps / lengths).mean().item()], rel=1e-2)


def test_the_shuffled_control_keeps_the_english_prompts_only(examples):
    settings = port.MLCConfig(languages=",".join(LANGUAGES), shuffle_translations=True)
    plain, shuffled = (port.token_dataset(examples, s)["translations"] for s in (port.MLCConfig(), settings))
    assert all(a[0] == b[0] and a[1] != b[1] and a[2] != b[2] for a, b in zip(plain, shuffled, strict=True))


# --- TRL's options ---

FIGURES = ("loss", "grad_norm", "mlc_loss", "mlc_floor", "collinearity")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dpo", {"gradient_checkpointing": False}),  # TRL's default is True
        ("dpo", {"precompute_ref_log_probs": True}),
        ("dpo", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        ("sft", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_an_option_that_saves_memory_changes_no_figure(trainer_of, examples, method, changes):
    plain, changed = trainer_of(method, examples), trainer_of(method, examples, **changes)
    plain.train()
    changed.train()
    for name in FIGURES:
        assert logged(changed, name) == pytest.approx(logged(plain, name), rel=1e-4), name
    assert len(logged(plain, "loss")) == 4 and len(logged(plain, "mlc_loss")) == 2


def test_figures_are_computed_for_the_steps_that_are_logged_and_gathered_once(trainer_of, examples, monkeypatch):
    schedule = dict(max_steps=7, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=3)
    every, few = trainer_of("dpo", examples, **schedule | {"logging_steps": 1}), trainer_of("dpo", examples, **schedule)
    every.train()
    asked, gathered = [], []
    real_figures, real_gather = port.probe_figures, few.accelerator.gather

    def figures(*arguments):
        asked.append(few.state.global_step + 1)
        return real_figures(*arguments)

    def gather(tensor):
        gathered.append(tensor.shape)
        return real_gather(tensor)

    monkeypatch.setattr(port, "probe_figures", figures)
    monkeypatch.setattr(few.accelerator, "gather", gather)
    few.train()
    # Steps 1, 3, 5 and 7 have MLC, in two micro-batches each; lines come after 3, after 6 and at the end, after 7.
    assert asked == [3, 3, 5, 5, 7, 7]
    assert gathered.count((2, len(port.FIGURES))) == 3
    assert logged(few, "mlc_loss") == pytest.approx(logged(every, "mlc_loss")[1:], rel=1e-6)


def test_lora_starts_at_the_same_losses_and_moves_adapters_and_extractor_only(trainer_of, examples):
    plain, lora = trainer_of("dpo", examples, max_steps=1), trainer_of("dpo", examples, peft_config=LORA)
    plain.train()
    before = weights(lora.model)
    lora.train()
    for name in ("loss", "mlc_loss"):
        assert logged(lora, name)[0] == pytest.approx(logged(plain, name)[0], rel=1e-5)
    moved = {name for name, value in weights(lora.model).items() if not torch.equal(value, before[name])}
    assert {"mlc_extractor.weight", "mlc_extractor.bias"} < moved
    assert all("lora" in name for name in moved if "mlc_extractor" not in name)


@pytest.mark.parametrize(("alpha", "used"), [(0, 8), (32, 32)])
def test_the_alpha_of_lora_is_honoured_and_twice_the_rank_by_default(alpha, used, few_rows, tmp_path, monkeypatch):
    flags = f"--lora 4 --lora_alpha {alpha} --languages en,zh --use_cpu true --bf16 false --max_steps 1"
    monkeypatch.setattr(sys, "argv", ["trl", *flags.split(), "--train", str(few_rows), "--output_dir", str(tmp_path)])
    port.main()
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha) == (4, used)


def test_the_extractor_is_float32_and_optimised_like_the_rest_in_bfloat16_arithmetic_too(trainer_of, examples):
    plain, half = trainer_of("sft", examples, max_steps=1), trainer_of("sft", examples, max_steps=1, bf16=True)
    plain.train()
    half.train()
    assert half.model.mlc_extractor.weight.dtype == torch.float32
    optimised = {id(p): group["initial_lr"] for group in half.optimizer.param_groups for p in group["params"]}
    assert {optimised[id(p)] for p in half.model.mlc_extractor.parameters()} == {1e-4}
    assert logged(half, "mlc_loss") == pytest.approx(logged(plain, "mlc_loss"), rel=1e-2)


def test_evaluation_has_both_losses_whatever_the_step(trainer_of, examples):
    trainer = trainer_of("dpo", examples, evaluated=examples[:8], per_device_eval_batch_size=4)
    trainer.state.global_step = 1
    figures = trainer.evaluate()
    assert figures["eval_loss"] == pytest.approx(0.693147 + 6 * logged(trainer, "eval_mlc_loss")[0], rel=1e-5)


# --- files ---


def test_the_saved_model_is_one_that_every_tool_loads_with_the_extractor_beside_it(trainer_of, examples, tmp_path):
    trainer = trainer_of("sft", examples, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert largest_difference(weights(model), weights(trainer.model)) == 0
    extractor = load_file(tmp_path / "saved/extractor.safetensors")
    assert extractor.keys() == {"weight", "bias"}
    assert largest_difference(extractor, trainer.model.mlc_extractor.state_dict()) == 0


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_resumed_run_ends_with_the_same_weights_and_extractor(trainer_of, examples, peft_config):
    saving = dict(save_strategy="steps", save_steps=2, peft_config=peft_config)
    whole, resumed = trainer_of("dpo", examples, **saving), trainer_of("dpo", examples, **saving)
    whole.train()
    first_half = Path(whole.args.output_dir) / "checkpoint-2"
    resumed.train(resume_from_checkpoint=str(first_half))
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0
    assert largest_difference(load_file(first_half / "extractor.safetensors"), weights(whole.model.mlc_extractor)) > 0
    if peft_config:
        AutoPeftModelForCausalLM.from_pretrained(first_half)


# --- several processes ---

# accelerate has FSDP for GPUs only and would quietly run DDP: so this start calls the CPUs GPUs. All else is as there.
AS_IF_ON_GPUS = """
from accelerate.state import AcceleratorState, DistributedType, PartialState
from mlc_min.ports.trl import main

start = PartialState.__init__


def start_as_if_on_gpus(self, *settings, **named):
    is_first = not PartialState._shared_state
    start(self, *settings, **named)
    if is_first:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = start_as_if_on_gpus
main()
print("ran as", AcceleratorState().distributed_type)
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(kind, folder, few_rows, tmp_path, monkeypatch):
    # Without Adam and clipping, an error in the scale of a gradient shows in the weights.
    settings = dict(
        model=folder, train=few_rows, **MLC, use_cpu=True, bf16=False, max_steps=4, learning_rate=0.01,
        optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def command(name: str, **sizes) -> list[str]:
        flags = settings | sizes | {"output_dir": tmp_path / name}
        return [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]

    monkeypatch.setattr(sys, "argv", ["trl", *command("one", per_device_train_batch_size=8)])
    port.main()
    program = ["-m", "mlc_min.ports.trl"]
    if kind == "fsdp":
        (tmp_path / "start.py").write_text(AS_IF_ON_GPUS)
        program = [str(tmp_path / "start.py")]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"mlc_min/ports/{kind}.yaml"]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    sizes = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    process = subprocess.run(
        [sys.executable, *launcher, *program, *command("two", **sizes)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    assert kind == "ddp" or process.stdout.count("ran as DistributedType.FSDP") == 2
    assert (
        largest_difference(load_file(folder / "model.safetensors"), load_file(tmp_path / "one/model.safetensors"))
        > 1e-2
    )
    for file in ("model.safetensors", "extractor.safetensors"):
        worst = largest_difference(load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file))
        print(f"largest difference of a weight, {kind}, {file}: {worst:.1e}")
        assert worst < 1e-5
    AutoModelForCausalLM.from_pretrained(tmp_path / "two")


# --- bad input ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method simpo", "--method simpo"),
        ("--use_cpu true --nonsense 1", "--nonsense"),
        ("--use_cpu true --train nothing.jsonl", "nothing.jsonl: "),
        ("--use_cpu true --mlc_weight -1", "--mlc_weight -1.0: must be at least 0"),
        ("--use_cpu true --mlc_weight 1 --mlc_layer 9", "layer must lie between -5 and 4"),
        ("--use_cpu true --method sft --packing true", "packing"),
        ("--use_cpu true --use_liger_kernel true", "--use_liger_kernel"),
        ("--use_cpu true --lora_alpha -1", "--lora_alpha -1: must be at least 0"),
        ('--use_cpu true --gradient_checkpointing_kwargs {"use_reentrant":true}', "use_reentrant"),
    ],
)
def test_bad_input_is_one_line(flags, message, few_rows, tmp_path, monkeypatch):
    common = ["--train", str(few_rows), "--languages", "en,zh", "--output_dir", str(tmp_path / "trl")]
    monkeypatch.setattr(sys, "argv", ["trl", *common, *flags.split()])
    with pytest.raises(InputError, match=message) as error:
        port.main()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", ["command", "Python"])
def test_several_gpus_without_accelerate_are_refused(start, trainer_of, examples, few_rows, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    monkeypatch.setattr(sys, "argv", ["trl", "--train", str(few_rows), "--use_cpu", "true"])
    with pytest.raises(InputError, match=r"2 GPUs are visible; start it with `accelerate launch .*--num_processes 2 "):
        port.main() if start == "command" else trainer_of("dpo", examples)


def test_another_trl_than_the_one_that_this_was_checked_with_is_named(trainer_of, examples, monkeypatch):
    monkeypatch.setattr(port, "trl_version", "1.17.0")
    with pytest.warns(UserWarning, match=r"trl 1.17.0: checked with 1.16 only"):
        trainer_of("dpo", examples)


def test_without_trl_the_command_says_how_to_install_it():
    program = "import runpy, sys; sys.modules['trl'] = None; runpy.run_module('mlc_min.ports.trl', run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "error: TRL is not installed; run `pip install -r requirements-trl.txt`\n"
