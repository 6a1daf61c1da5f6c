"""The single training script: an English-only SFT, DPO, SimPO or ORPO loss, plus λ times the MLC loss.

    python -m mlc_min.train --method dpo --mlc_weight 0.8          # the embedded model, about 1 minute
    python -m mlc_min.train --model <folder or Hub id> --train rows.jsonl --method dpo --mlc_weight 0.8

The loop is written out so that it can be read: one function gives the alignment loss of a batch, one the
consistency loss, and `train` adds them up.
"""

import itertools
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup

from mlc_min.checkpoint import load_checkpoint, save_checkpoint
from mlc_min.consistency import (
    FORMS,
    collinearity,
    cosine_loss,
    make_extractor,
    mlc_ceiling,
    mlc_floor,
    mlc_loss,
    retrieval_accuracy,
    shuffle_groups,
)
from mlc_min.data import (
    Example,
    chosen_batch,
    consistency_batch,
    encode_rows,
    only_harmful,
    parse_languages,
    preference_batch,
    read_rows,
    shuffle_translations,
)
from mlc_min.errors import InputError, run_command
from mlc_min.models import freeze, load_model, pick_device, vocabulary_head
from mlc_min.preference import dpo_loss, orpo_loss, sequence_logps, sft_loss, simpo_loss
from mlc_min.represent import last_token_states, position_ids, resolve_layer
from mlc_min.saving import save_folder, write_atomically
from mlc_min.sentences import ALIGNED, EMBEDDED

METHODS = ("sft", "dpo", "simpo", "orpo")


@dataclass
class TrainConfig:
    """Settings of one run. The defaults suit the embedded model; the paper's stand in brackets."""

    model: str = field(
        default=str(EMBEDDED / "model"), metadata={"help": "model folder in Hugging Face format, or Hub id"}
    )
    train: str = field(default=str(EMBEDDED / "train.jsonl"), metadata={"help": "rows, JSONL or a JSON list"})
    output: str = field(
        default="runs/train", metadata={"help": "folder for the trained model, the extractor and the log"}
    )
    languages: str = field(default=",".join(ALIGNED), metadata={"help": "the first has the responses; MLC uses all"})
    method: str = field(default="dpo", metadata={"help": "|".join(METHODS)})
    beta: float = field(default=0.1, metadata={"help": "β of DPO and ORPO [0.1]"})
    simpo_beta: float = field(default=2.0, metadata={"help": "β of SimPO, which has log-probs per token"})
    simpo_gamma: float = field(default=1.0, metadata={"help": "target margin of SimPO"})
    sft_weight: float = field(
        default=1.0,
        metadata={
            "help": "SFT loss on the chosen response beside DPO or SimPO [0]; a tiny model falls apart without it"
        },
    )
    mlc_weight: float = field(default=0.0, metadata={"help": "λ [0.8]; 0 is the plain method, bit for bit"})
    mlc_tau: float = field(default=0.2, metadata={"help": "τ, softmax temperature [0.2]"})
    mlc_form: str = field(default="official", metadata={"help": "|".join(FORMS)})
    mlc_layer: int = field(default=-1, metadata={"help": "hidden-state entry, -1 the last [-1]"})
    mlc_every: int = field(default=1, metadata={"help": "use the MLC loss on every n-th step only [2]"})
    consistency: str = field(default="mlc", metadata={"help": "mlc, or cosine for the pairwise ablation"})
    extractor: str = field(default="learned", metadata={"help": "learned [yes], frozen or identity"})
    extractor_dim: int = field(default=512, metadata={"help": "d [512]"})
    shuffle_translations: bool = field(default=False, metadata={"help": "control: translations of other prompts"})
    harmful_only: bool = field(default=False, metadata={"help": "control: leave out rows that are not `harmful`"})
    freeze: str = field(
        default="embed_tokens",
        metadata={"help": "comma-separated parts of the names of parameters to keep fixed [none]"},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "peak of a cosine with warm-up [6e-7]"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps [0.1]"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's [0]"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping [1]"})
    steps: int = field(default=150, metadata={"help": "optimizer steps [3 epochs]"})
    batch_size: int = field(default=16, metadata={"help": "rows a forward pass [1]"})
    accumulation: int = field(default=1, metadata={"help": "forward passes an optimizer step [4 x 8 GPUs]"})
    max_length: int = field(default=1024, metadata={"help": "longer rows are left out and counted [1024, cut]"})
    save_every: int = field(default=0, metadata={"help": "steps between checkpoints in the output folder; 0 for none"})
    resume: bool = field(default=False, metadata={"help": "continue from the output folder's checkpoint, if any"})
    log_every: int = field(default=10, metadata={"help": "steps between lines of the log"})
    seed: int = field(default=0, metadata={"help": "of the row order, the extractor's start and the shuffling"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    dtype: str = field(
        default="float32", metadata={"help": "float32, or bfloat16 for the arithmetic; weights stay float32"}
    )

    def check(self) -> None:
        """Raise InputError for the first setting that makes no sense."""
        choices = dict(method=METHODS, mlc_form=FORMS, consistency=("mlc", "cosine"), dtype=("float32", "bfloat16"),
                       extractor=("learned", "frozen", "identity"))  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name} {getattr(self, name)}: choose one of {', '.join(allowed)}")
        for name in ("mlc_every", "extractor_dim", "steps", "batch_size", "accumulation", "max_length", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("beta", "simpo_beta", "mlc_tau", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be greater than 0")
        for name in ("sft_weight", "mlc_weight", "weight_decay", "warmup", "save_every"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--{name} {getattr(self, name)}: must not be negative")
        if len(self.language_list) < 2 and self.mlc_weight:  # reading the list checks it, whatever the weight
            raise InputError(f"--languages {self.languages}: MLC compares at least two")

    @property
    def language_list(self) -> tuple[str, ...]:
        return parse_languages(self.languages)


def response_logps(model, head, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums (N,), lengths (N,)) of the responses of a batch of `data.response_batch`."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    states = model.get_decoder()(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=position_ids(batch["attention_mask"]),
        use_cache=False,
    ).last_hidden_state
    return sequence_logps(states, batch["input_ids"], batch["response_mask"], head)


@torch.no_grad()
def reference_logps(model, head, examples: list[Example], pad_id: int, batch_size: int) -> torch.Tensor:
    """(rows, 2): summed log-probs of chosen and rejected under the untrained model.

    Computed once before training, so that no second model stays in memory and the reference cannot drift.
    """
    columns = []
    for start in tqdm(range(0, len(examples), batch_size), desc="reference", leave=False):
        logps, _ = response_logps(model, head, preference_batch(examples[start : start + batch_size], pad_id))
        columns.append(torch.stack(logps.chunk(2), dim=1))
    return torch.cat(columns)


def alignment_loss(
    model, head, examples: list[Example], reference: torch.Tensor | None, pad_id: int, config: TrainConfig
):
    """The English-only loss of a batch: (scalar, metrics). reference: (N, 2) for DPO."""
    if config.method == "sft":
        logps, lengths = response_logps(model, head, chosen_batch(examples, pad_id))
        loss = sft_loss(logps, lengths).mean()
        return loss, {"align_loss": loss.item()}
    logps, lengths = response_logps(model, head, preference_batch(examples, pad_id))
    (chosen, rejected), (chosen_lengths, rejected_lengths) = logps.chunk(2), lengths.chunk(2)
    if config.method == "dpo":
        loss = dpo_loss(chosen, rejected, reference[:, 0], reference[:, 1], config.beta).mean()
        rewards = config.beta * (chosen - reference[:, 0]), config.beta * (rejected - reference[:, 1])
    else:
        lengths = chosen_lengths, rejected_lengths
        if config.method == "simpo":
            loss = simpo_loss(chosen, rejected, *lengths, config.simpo_beta, config.simpo_gamma).mean()
        else:
            loss = orpo_loss(chosen, rejected, *lengths, config.beta).mean()
        rewards = chosen / chosen_lengths, rejected / rejected_lengths  # log-probs per token, without a reference
    metrics = {
        "align_loss": loss.item(),
        "accuracy": (rewards[0] > rewards[1]).float().mean().item(),
        "margin": (rewards[0] - rewards[1]).mean().item(),
        "chosen_reward": rewards[0].mean().item(),
    }
    if config.sft_weight and config.method != "orpo":  # ORPO has the SFT loss inside
        anchor = sft_loss(chosen, chosen_lengths).mean()
        metrics["sft_loss"] = anchor.item()
        loss = loss + config.sft_weight * anchor
    return loss, metrics


def consistency_loss(
    model, extractor: nn.Module, examples: list[Example], pad_id: int, config: TrainConfig, diagnostics: bool = True
):
    """The auxiliary loss of a batch of translated prompts: (scalar, metrics). `diagnostics`: also the figures that
    say what a low loss means, at four more singular value decompositions."""
    batch = consistency_batch(examples, config.language_list, pad_id)
    states = last_token_states(
        model, batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device), config.mlc_layer
    )
    states = states.view(len(examples), len(config.language_list), -1)  # (N, m, d_h)
    representations = extractor(states)  # (N, m, d)
    if config.consistency == "cosine":
        loss = cosine_loss(representations)
    else:
        loss = mlc_loss(representations, config.mlc_tau, config.mlc_form)
    metrics: dict[str, float] = {}
    if diagnostics:
        with torch.no_grad():
            metrics["mlc_loss"] = mlc_loss(representations, config.mlc_tau, config.mlc_form).item()
            metrics["collinearity"] = collinearity(states).mean().item()
            if config.consistency == "cosine":
                metrics["cosine_loss"] = loss.item()
            if len(examples) > 1:  # one group alone can be neither shuffled nor searched
                shuffled = mlc_loss(shuffle_groups(representations), config.mlc_tau, config.mlc_form)
                metrics["mlc_shuffled"] = shuffled.item()
                metrics["collinearity_shuffled"] = collinearity(shuffle_groups(states)).mean().item()
                metrics["retrieval"] = retrieval_accuracy(states)[1:].mean().item()
                metrics["retrieval_chance"] = 1 / len(examples)
    return loss, metrics


def train(
    config: TrainConfig, model, tokenizer, examples: list[Example], output: Path | None = None, quiet: bool = False
):
    """Train `model` in place. Returns (extractor, list of metrics, one dict per logged step).

    `output`: a folder for train_log.jsonl, one line per logged step, and checkpoint.pt if `save_every` is set.
    """
    torch.manual_seed(config.seed)
    pad_id, languages = tokenizer.pad_token_id, config.language_list
    try:
        resolve_layer(model, config.mlc_layer)
    except ValueError as error:
        raise InputError(f"--mlc_layer: {error}") from None
    hidden_size = model.config.get_text_config().hidden_size
    extractor = make_extractor(config.extractor, hidden_size, config.extractor_dim).to(model.device)
    dim = hidden_size if config.extractor == "identity" else config.extractor_dim
    # Dropout would make policy and reference differ at step 0, where the DPO loss must be log 2.
    model.eval()
    freeze(model, config.freeze)
    head = vocabulary_head(model)
    autocast = torch.autocast(model.device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext()
    reference = None
    if config.method == "dpo":
        with autocast:  # the policy's arithmetic, or step 0 would not be at log 2
            reference = reference_logps(model, head, examples, pad_id, 4 * config.batch_size)
    has_translations = len(languages) > 1 and set(languages) <= set(examples[0].prompts)
    mlc_examples = shuffle_translations(examples, config.seed) if config.shuffle_translations else examples

    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.mlc_weight:
        parameters += [p for p in extractor.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.steps), config.steps)
    bounds = {
        "mlc_floor": mlc_floor(len(languages), dim, config.mlc_tau, config.mlc_form),
        "mlc_ceiling": mlc_ceiling(len(languages), dim),
    }
    stateful = {"model": model, "extractor": extractor, "optimizer": optimizer, "scheduler": scheduler}
    start = 0
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        if config.resume:
            start = load_checkpoint(output / "checkpoint.pt", config, **stateful)
    log = MetricsLog(None if output is None else output / "train_log.jsonl", start, quiet)
    rows = row_order(len(examples), config.seed, skip=start * config.accumulation * config.batch_size)
    name = config.method + ("+mlc" if config.mlc_weight else "")
    for step in tqdm(range(start, config.steps), desc=name, leave=False, disable=quiet):
        is_logged = step % config.log_every == 0 or step == config.steps - 1
        metrics: dict[str, float] = {}
        for _ in range(config.accumulation):
            drawn = [next(rows) for _ in range(config.batch_size)]
            batch, mlc_batch = [examples[i] for i in drawn], [mlc_examples[i] for i in drawn]
            batch_reference = None if reference is None else reference[drawn]
            with autocast:
                loss, figures = alignment_loss(model, head, batch, batch_reference, pad_id, config)
                if not torch.isfinite(loss):
                    where = ", ".join(example.where for example in batch)
                    raise InputError(
                        f"step {step}: the loss is {loss.item()}; lower --learning_rate, or look at the rows {where}"
                    )
                if config.mlc_weight and step % config.mlc_every == 0:
                    auxiliary, more = consistency_loss(model, extractor, mlc_batch, pad_id, config, is_logged)
                    loss = loss + config.mlc_weight * auxiliary
                    figures |= more
                elif is_logged and has_translations:  # what the states do without MLC: measured, not trained
                    with torch.no_grad():
                        figures |= consistency_loss(model, extractor, mlc_batch, pad_id, config)[1]
            figures["loss"] = loss.item()
            # The mean over the micro-batches: the gradient is that of one batch of all their rows.
            (loss / config.accumulation).backward()
            for figure, value in figures.items():
                metrics[figure] = metrics.get(figure, 0.0) + value / config.accumulation
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if "mlc_loss" in metrics:
            metrics |= bounds
        metrics |= {"step": step, "learning_rate": scheduler.get_last_lr()[0], "grad_norm": norm.item()}
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if is_logged:
            log.write(metrics)
        if output is not None and config.save_every and (step + 1) % config.save_every == 0:
            save_checkpoint(output / "checkpoint.pt", step + 1, config, **stateful)
    return extractor, log.history


def row_order(count: int, seed: int, skip: int = 0):
    """Row indices for ever: a new random order each epoch, decided by the seed alone; without the first `skip`."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in itertools.count():
        order = torch.randperm(count, generator=generator).tolist()
        yield from order[max(0, skip - epoch * count) :]


class MetricsLog:
    """Each logged step as a dict in `history`, as a line on the screen and as a line of a JSON-lines file."""

    def __init__(self, path: Path | None, start: int, quiet: bool):
        self.path, self.quiet, self.started = path, quiet, time.perf_counter()
        self.history: list[dict] = []
        if path is not None:
            # A resumed run keeps the lines up to its checkpoint; the steps after it are done again.
            if start and path.exists():
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                self.history = [metrics for metrics in lines if metrics["step"] < start]
            write_atomically(path, "".join(json.dumps(metrics) + "\n" for metrics in self.history))

    def write(self, metrics: dict[str, float]) -> None:
        metrics["seconds"] = round(time.perf_counter() - self.started, 2)
        self.history.append(metrics)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        if not self.quiet:
            tqdm.write(log_line(metrics))


def log_line(metrics: dict[str, float]) -> str:
    """One aligned line of the figures that a person watches."""
    line = f"step {metrics['step']:5d}  loss {metrics['loss']:7.4f}  align {metrics['align_loss']:7.4f}"
    if "accuracy" in metrics:
        line += f"  acc {metrics['accuracy']:4.2f}  margin {metrics['margin']:6.2f}"
    if "mlc_loss" in metrics:
        line += f"  mlc {metrics['mlc_floor']:.3f} < {metrics['mlc_loss']:.3f} < {metrics['mlc_ceiling']:.3f}"
        if "mlc_shuffled" in metrics:
            line += f"  (shuffled {metrics['mlc_shuffled']:.3f})  retrieval {metrics['retrieval']:4.2f}"
    return line + f"  lr {metrics['learning_rate']:.1e}  grad {metrics['grad_norm']:6.2f}  {metrics['seconds']:6.1f} s"


def save_run(config: TrainConfig, model, tokenizer, extractor: nn.Module) -> None:
    """Write the model folder (safetensors, loads anywhere), `extractor.safetensors` and `train_config.json`."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if config.mlc_weight and extractor.state_dict():
            save_file(extractor.state_dict(), folder / "extractor.safetensors")
        (folder / "train_config.json").write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")

    save_folder(Path(config.output) / "model", write)


def main() -> None:
    parser = HfArgumentParser(TrainConfig, description=__doc__, prog="python -m mlc_min.train")
    (config,) = parser.parse_args_into_dataclasses()
    config.check()
    device = pick_device(config.device)
    languages = config.language_list
    responses = ("chosen",) if config.method == "sft" else ("chosen", "rejected")
    try:
        rows = read_rows(config.train, languages, responses)
    except InputError:
        if config.mlc_weight:
            raise
        languages = languages[:1]  # without MLC no translation is needed; where all are there, the log uses them
        rows = read_rows(config.train, languages, responses)
    if config.harmful_only:
        rows = only_harmful(rows, config.train)
    model, tokenizer = load_model(config.model, device)
    examples, left_out = encode_rows(rows, tokenizer, languages, config.max_length)
    print(f"{len(examples)} rows from {config.train}; {left_out} left out as longer than {config.max_length} tokens")
    if not examples:
        raise InputError(f"--max_length {config.max_length}: no row fits; raise it")
    extractor, _ = train(config, model, tokenizer, examples, Path(config.output))
    save_run(config, model, tokenizer, extractor)
    print(f"saved {config.output}/model and {config.output}/train_log.jsonl")


if __name__ == "__main__":
    run_command(main)
