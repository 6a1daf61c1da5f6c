"""The single training script: an English-only SFT, DPO, SimPO or ORPO loss, plus λ times the MLC loss.

    python -m mlc_min.train --method dpo --mlc_weight 0.8          # the embedded model, about 1 minute
    python -m mlc_min.train --preset paper --model <folder or Hub id> --train rows.jsonl --output runs/mine

The loop is written out so that it can be read: one function gives the alignment loss of a batch, one the
consistency loss, and `train` adds them up.
"""

import hashlib
import itertools
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from mlc_min.consistency import (
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
    preference_batch,
    shuffle_translations,
)
from mlc_min.machinery.checkpoint import RandomState, Trained, load_checkpoint, save_checkpoint
from mlc_min.machinery.errors import InputError, run_command
from mlc_min.machinery.models import add_adapters, freeze, load_model, pick_device, vocabulary_head, without_dropout
from mlc_min.machinery.rows import Row, only_harmful, read_rows
from mlc_min.machinery.run_folder import record_of, save_run
from mlc_min.machinery.saving import write_json
from mlc_min.machinery.stopping import StopRequest
from mlc_min.machinery.training_log import MetricsLog
from mlc_min.preference import dpo_loss, orpo_loss, sft_loss, simpo_loss
from mlc_min.reference import cached_reference_logps, reference_logps, response_logps
from mlc_min.represent import last_token_states_in_parts, resolve_layer
from mlc_min.settings import TrainConfig, parse_settings


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
    """The auxiliary loss of a batch of translated prompts: (scalar, metrics), the mean over prompts. Prompts may have
    different sets of languages; one in a single language adds 0. `diagnostics`: also the figures that say what a
    low loss means, at four more singular value decompositions."""
    batch = consistency_batch(examples, config.language_list, pad_id)
    input_ids, attention_mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    states = last_token_states_in_parts(model, input_ids, attention_mask, config.mlc_layer, config.mlc_parts)
    sizes = batch["sizes"].tolist()
    groups = states.split(sizes)
    loss, metrics = states.new_zeros((), dtype=torch.float32), {}
    for m in sorted(set(sizes)):  # one batch of matrices for each number of languages; mostly there is one
        same = torch.stack([group for group in groups if len(group) == m])  # (n, m, d_h)
        representations = extractor(same)  # (n, m, d)
        weight = len(same) / len(groups)
        if config.consistency == "cosine":
            part = cosine_loss(representations)
        else:
            part = mlc_loss(representations, config.mlc_tau, config.mlc_form)
        loss = loss + weight * part
        if diagnostics:
            for name, value in group_figures(same, representations, part, config).items():
                metrics[name] = metrics.get(name, 0.0) + weight * value
    return loss, metrics


@torch.no_grad()
def group_figures(states, representations, loss, config: TrainConfig) -> dict[str, float]:
    """What the loss of n prompts in the same number m of languages means. (n, m, d_h), (n, m, d), scalar."""
    _, m, dim = representations.shape
    figures = {
        "mlc_loss": mlc_loss(representations, config.mlc_tau, config.mlc_form).item(),
        "mlc_floor": mlc_floor(m, dim, config.mlc_tau, config.mlc_form),
        "mlc_ceiling": mlc_ceiling(m, dim),
        "collinearity": collinearity(states).mean().item(),
    }
    if config.consistency == "cosine":
        figures["cosine_loss"] = loss.item()
    if len(states) > 1 and m > 1:  # one group alone can be neither shuffled nor searched
        figures["mlc_shuffled"] = mlc_loss(shuffle_groups(representations), config.mlc_tau, config.mlc_form).item()
        figures["collinearity_shuffled"] = collinearity(shuffle_groups(states)).mean().item()
        figures["retrieval"] = retrieval_accuracy(states)[1:].mean().item()
        figures["retrieval_chance"] = 1 / len(states)
    return figures


def total_loss(
    model, head, extractor: nn.Module, batch, mlc_batch, reference, pad_id: int, config: TrainConfig,
    uses_mlc: bool, is_logged: bool,
):  # fmt: skip
    """L_align + λ L_cons of one batch: (scalar, metrics). mlc_batch: the same rows, or shuffled ones."""
    loss, metrics = alignment_loss(model, head, batch, reference, pad_id, config)
    if uses_mlc:
        auxiliary, figures = consistency_loss(model, extractor, mlc_batch, pad_id, config, is_logged)
        loss = loss + config.mlc_weight * auxiliary
        metrics |= figures
    elif is_logged and any(len(example.prompts) > 1 for example in mlc_batch):
        with torch.no_grad():  # what the states do without MLC: measured, not trained
            metrics |= consistency_loss(model, extractor, mlc_batch, pad_id, config)[1]
    return loss, metrics | {"loss": loss.item()}


def train(
    config: TrainConfig,
    model,
    tokenizer,
    examples: list[Example],
    output: Path | None = None,
    quiet: bool = False,
    reference: torch.Tensor | None = None,
):
    """Train `model` in place. Returns (extractor, list of metrics, one dict per logged step).

    `output`: a folder for train_log.jsonl, one line per logged step, and checkpoint.pt, written every `save_every`
    steps and when the process is asked to stop (SIGTERM, Ctrl-C), which then ends with SystemExit.
    `reference`: (rows, 2) from `reference_logps`; computed here if it is None and the method needs it.
    Raises InputError for a loss or gradient that is not finite, naming the step, the rows and the last checkpoint.
    """
    torch.manual_seed(config.seed)
    pad_id = tokenizer.pad_token_id
    try:
        resolve_layer(model, config.mlc_layer)
    except ValueError as error:
        raise InputError(f"--mlc_layer: {error}") from None
    hidden_size = model.config.get_text_config().hidden_size
    extractor = make_extractor(config.extractor, hidden_size, config.extractor_dim).to(model.device)
    # Dropout would make policy and reference differ at step 0, where the DPO loss must be log 2.
    model.eval()
    freeze(model, config.freeze)
    head = vocabulary_head(model)
    autocast = arithmetic(config, model.device)
    if config.method == "dpo" and reference is None:
        with autocast:  # the policy's arithmetic, or step 0 would not be at log 2
            reference = reference_logps(model, head, examples, pad_id, 4 * config.batch_size)
    if config.gradient_checkpointing:
        # transformers renames it: 5.20 has the old name only, and 5.24 warns at that.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        without_dropout(model)
    mlc_examples = shuffle_translations(examples, config.seed) if config.shuffle_translations else examples

    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.mlc_weight:
        parameters += [p for p in extractor.parameters() if p.requires_grad]
    # Fused, where there is a GPU: the other ways need another copy of all parameters for a moment.
    fused = True if model.device.type == "cuda" else None
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.steps), config.steps)
    stateful = {"model": Trained(model), "extractor": extractor, "optimizer": optimizer, "scheduler": scheduler}
    stateful["random"] = RandomState()
    start, checkpoint, saved, data = 0, None, "no checkpoint was saved", data_hash(examples)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        checkpoint = output / "checkpoint.pt"
        if config.resume:
            start = load_checkpoint(checkpoint, config, data, **stateful)
            saved = f"the last good checkpoint is {checkpoint}, step {start}" if start else saved
    log = MetricsLog(checkpoint and output / "train_log.jsonl", start, config.steps, quiet, config.report_to)
    lengths = [example_length(example) for example in examples] if config.group_by_length else None
    skip = start * config.accumulation * config.batch_size
    rows = row_order(len(examples), config.seed, skip, lengths, config.batch_size)
    name = config.method + ("+mlc" if config.mlc_weight else "")
    with StopRequest() as stop:
        for step in tqdm(range(start, config.steps), desc=name, leave=False, disable=quiet):
            is_logged = step % config.log_every == 0 or step == config.steps - 1
            uses_mlc = config.mlc_weight > 0 and step % config.mlc_every == 0
            metrics: dict[str, float] = {}
            seen: list[str] = []
            for _ in range(config.accumulation):
                drawn = [next(rows) for _ in range(config.batch_size)]
                batch, mlc_batch = [examples[i] for i in drawn], [mlc_examples[i] for i in drawn]
                seen += [example.where for example in batch]
                batch_reference = None if reference is None else reference[drawn]
                inputs = (batch, mlc_batch, batch_reference, pad_id, config, uses_mlc, is_logged)
                try:
                    with autocast:
                        loss, figures = total_loss(model, head, extractor, *inputs)
                except ValueError as error:  # states that are not finite, or zero
                    raise InputError(not_finite(step, f"loss cannot be computed ({error})", seen, saved)) from None
                if not math.isfinite(figures["loss"]):
                    raise InputError(not_finite(step, f"loss is {figures['loss']}", seen, saved))
                # The mean over the micro-batches: the gradient is that of one batch of all their rows.
                (loss / config.accumulation).backward()
                for figure, value in figures.items():
                    metrics[figure] = metrics.get(figure, 0.0) + value / config.accumulation
                log.tokens += sum(token_count(example, config.method, uses_mlc) for example in batch)
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
            if not math.isfinite(norm):
                raise InputError(not_finite(step, f"gradient's norm is {norm}", seen, saved))
            metrics |= {"step": step, "learning_rate": scheduler.get_last_lr()[0], "grad_norm": norm}
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            if is_logged:
                log.write(metrics)
            due = config.save_every and (step + 1) % config.save_every == 0
            if checkpoint and (due or stop.signal):
                save_checkpoint(checkpoint, step + 1, config, data, **stateful)
                saved = f"the last good checkpoint is {checkpoint}, step {step + 1}"
            if stop.signal:
                print(f"stopped after step {step}; {saved}; --resume true continues from it", file=sys.stderr)
                sys.exit(128 + stop.signal)
    return extractor, log.history


def arithmetic(config: TrainConfig, device: torch.device):
    """The context that a forward pass of this run is made in: autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext()


def data_hash(examples: list[Example]) -> str:
    """Sixteen hex digits that change when a row, the tokenizer or the chat template does."""
    ids = json.dumps([[e.prompts, e.chosen, e.rejected] for e in examples])
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


def not_finite(step: int, what: str, rows: list[str], saved: str) -> str:
    """The one line that ends a run whose arithmetic has broken down."""
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return f"step {step}: the {what}; lower --learning_rate, or look at the rows {shown}; {saved}"


def example_length(example: Example) -> int:
    """Tokens of the first language's prompt and the longer response."""
    return len(next(iter(example.prompts.values()))) + max(len(example.chosen), len(example.rejected or ()))


def token_count(example: Example, method: str, uses_mlc: bool) -> int:
    """Tokens of a row that go through the model in one step, padding not counted."""
    prompts = [len(ids) for ids in example.prompts.values()]
    count = prompts[0] + len(example.chosen)
    if method != "sft":
        count += prompts[0] + len(example.rejected)
    return count + (sum(prompts) if uses_mlc else 0)


def row_order(count: int, seed: int, skip: int = 0, lengths: list[int] | None = None, batch_size: int = 1):
    """Row indices for ever: a new random order each epoch, decided by the seed alone; without the first `skip`.

    lengths: sort within each 50 batches, so that a batch's rows are of similar length.
    """
    generator = torch.Generator().manual_seed(seed)
    for epoch in itertools.count():
        order = torch.randperm(count, generator=generator).tolist()
        if lengths is not None:
            size = 50 * batch_size
            chunks = [order[i : i + size] for i in range(0, count, size)]
            order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: -lengths[i])]
        yield from order[max(0, skip - epoch * count) :]


def select_rows(config: TrainConfig) -> tuple[list[Row], dict[str, int]]:
    """Read the rows by the settings' policies; returns them and the count of what was found.

    Raises InputError for a row that is not as it should be and may not be left out, or if none is left.
    """
    languages = config.language_list
    responses = ("chosen",) if config.method == "sft" else ("chosen", "rejected")
    lenient = config.missing != "error" or not config.mlc_weight  # without MLC no translation is needed
    rows = read_rows(config.train, languages, responses, languages[:1] if lenient else None)
    if config.harmful_only:
        rows = only_harmful(rows, config.train)
    counts = {"read": len(rows), "lacking_translations": sum(len(row.prompts) < len(languages) for row in rows)}
    if config.mlc_weight and config.missing == "skip":
        rows = [row for row in rows if len(row.prompts) == len(languages)]
    if not rows:
        raise InputError(f"{config.train}: no row has all of --languages {config.languages}; try --missing present")
    return rows, counts


def fitting_examples(config: TrainConfig, rows: list[Row], tokenizer, counts: dict[str, int]) -> list[Example]:
    """Encode the rows that fit into --max_length; adds to `counts` how many did and why the others did not.

    Raises InputError if one does not and --too_long is "error", or if none does.
    """
    examples, left_out = encode_rows(rows, tokenizer, config.language_list, config.max_length)
    counts |= {f"{name}_too_long": len(where) for name, where in left_out.items()} | {"used": len(examples)}
    too_long = left_out["prompt"] + left_out["response"]
    if too_long and config.too_long == "error":
        raise InputError(f"{too_long[0]}: longer than --max_length {config.max_length}; raise it, or --too_long skip")
    print(
        f"{config.train}: {counts['read']} rows, {len(examples)} used; {counts['lacking_translations']} lack some "
        f"translation (--missing {config.missing}); left out as longer than {config.max_length} tokens: "
        f"{counts['prompt_too_long']} by the prompt alone, {counts['response_too_long']} with the response"
    )
    if not examples:
        raise InputError(f"--max_length {config.max_length}: no row fits; raise it")
    return examples


def main() -> None:
    config = parse_settings(__doc__)
    device = pick_device(config.device)
    rows, counts = select_rows(config)
    # Adapters are float32 of their own; weights that are not trained may stay in bfloat16, half the memory.
    weights = torch.bfloat16 if config.lora and config.dtype == "bfloat16" else torch.float32
    model, tokenizer = load_model(config.model, device, weights, config.attention)
    examples = fitting_examples(config, rows, tokenizer, counts)
    if config.epochs:
        config.steps = math.ceil(config.epochs * len(examples) / (config.batch_size * config.accumulation))
    record = record_of(config, device, counts)
    reference = None
    if config.method == "dpo":
        model.eval()
        settings = (tokenizer.pad_token_id, 4 * config.batch_size, config.dtype)
        with arithmetic(config, device):  # before the adapters, of which the reference has none
            reference = cached_reference_logps(
                config.reference_cache, model, vocabulary_head(model), examples, *settings
            )
    if config.lora:
        torch.manual_seed(config.seed)  # of the adapters' start
        model = add_adapters(model, config.lora, config.lora_alpha)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "run.json", record)
    extractor, history = train(config, model, tokenizer, examples, output, reference=reference)
    save_run(config, model, tokenizer, extractor, record, history)
    print(f"saved {output}/model and {output}/train_log.jsonl")


if __name__ == "__main__":
    run_command(main)
