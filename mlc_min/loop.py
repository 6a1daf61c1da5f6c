"""The training loop: L = L_align + λ · L_MLC, the loss of English responses plus that of translated prompts.

`recipe` is any object with the settings that are read here; `machinery/settings.py` lists them with their reasons.
Figures are tensors, since reading one waits for the GPU: the caller reads those that it logs."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from mlc_min.consistency import BrokenDown, cosine_loss, make_extractor, mlc_loss, separation_loss
from mlc_min.examples import Example, consistency_batch, preference_batch, response_batch
from mlc_min.preference import dpo_loss, orpo_loss, sequence_logps, sft_loss, simpo_loss, to_device
from mlc_min.states import last_token_states_in_parts, position_ids, vocabulary_logits


def response_logps(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums (N,), lengths (N,)) of the responses of a batch of `response_batch`."""
    input_ids, mask = (to_device(batch[name], model.device) for name in ("input_ids", "attention_mask"))
    inputs = dict(input_ids=input_ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
    states = model.get_decoder()(**inputs).last_hidden_state
    return sequence_logps(states, input_ids, batch["response_mask"], partial(vocabulary_logits, model))


def alignment_loss(model: PreTrainedModel, examples: list[Example], recipe) -> tuple[torch.Tensor, dict]:
    """L_align, in the first language only: (scalar, figures). For DPO each example carries its `reference`."""
    if recipe.method == "sft":
        batch = response_batch([e.prompt for e in examples], [e.chosen for e in examples])
        loss = sft_loss(*response_logps(model, batch)).mean()
        return loss, {"align_loss": loss}
    logps, lengths = response_logps(model, preference_batch(examples))
    (chosen, rejected), (chosen_lengths, rejected_lengths) = logps.chunk(2), lengths.chunk(2)
    pair = chosen, rejected, chosen_lengths, rejected_lengths
    rewards = chosen / chosen_lengths, rejected / rejected_lengths  # log-probs per token, without a reference
    if recipe.method == "dpo":
        reference = to_device(torch.tensor([e.reference for e in examples]), logps.device)  # (N, 2)
        loss = dpo_loss(chosen, rejected, reference[:, 0], reference[:, 1], recipe.beta).mean()
        rewards = recipe.beta * (chosen - reference[:, 0]), recipe.beta * (rejected - reference[:, 1])
    elif recipe.method == "simpo":
        loss = simpo_loss(*pair, recipe.simpo_beta, recipe.simpo_gamma).mean()
    else:
        loss = orpo_loss(*pair, recipe.beta).mean()
    figures = {"align_loss": loss, "accuracy": (rewards[0] > rewards[1]).float().mean()}
    figures |= {"margin": (rewards[0] - rewards[1]).mean(), "chosen_reward": rewards[0].mean()}
    if recipe.sft_weight and recipe.method != "orpo":  # ORPO has the SFT loss inside
        figures["sft_loss"] = sft_loss(chosen, chosen_lengths).mean()
        loss = loss + recipe.sft_weight * figures["sft_loss"]
    return loss, figures


def groups_of_states(model: PreTrainedModel, examples: list[Example], recipe) -> dict[int, torch.Tensor]:
    """h of every prompt in every language that it has, {m: (prompts in m languages, m, d_h)}; mostly there is one m."""
    batch = consistency_batch(examples, recipe.language_list)
    sizes = batch.pop("sizes").tolist()
    groups = last_token_states_in_parts(model, **batch, layer=recipe.mlc_layer, parts=recipe.mlc_parts).split(sizes)
    return {m: torch.stack([group for group in groups if len(group) == m]) for m in sorted(set(sizes))}


def consistency_loss(model: PreTrainedModel, extractor: nn.Module, examples: list[Example], recipe) -> torch.Tensor:
    """L_MLC, the mean over prompts, scalar. A prompt in a single language adds 0."""
    loss = torch.zeros((), device=model.device)
    for states in groups_of_states(model, examples, recipe).values():
        representations = extractor(states)  # (n, m, d_h) -> (n, m, d)
        if recipe.consistency == "cosine":
            part = cosine_loss(representations)
        else:
            part = mlc_loss(representations, recipe.mlc_tau, recipe.mlc_form)
        if recipe.separate_weight:
            part = part + recipe.separate_weight * separation_loss(representations, recipe.mlc_tau)
        loss = loss + len(states) / len(examples) * part
    return loss


def arithmetic(model: PreTrainedModel, recipe):
    """The context of a forward pass: autocast to bfloat16, or nothing."""
    return torch.autocast(model.device.type, torch.bfloat16) if recipe.dtype == "bfloat16" else nullcontext()


@torch.no_grad()
def with_reference(model: PreTrainedModel, examples: list[Example], recipe) -> list[Example]:
    """The examples with the log-probs of their responses under `model` as it is now: computed once, so that no second
    model stays in memory."""
    scored = []
    for batch in batches_of(examples, 4 * recipe.batch_size):
        with arithmetic(model, recipe):  # the policy's, or step 0 would not be at log 2
            logps, _ = response_logps(model, preference_batch(batch))
        pairs = torch.stack(logps.chunk(2), dim=1).tolist()
        scored += [replace(example, reference=tuple(pair)) for example, pair in zip(batch, pairs, strict=True)]
    return scored


def batches_of(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def row_order(count: int, seed: int, skip: int = 0, lengths: list[int] | None = None, size: int = 50) -> Iterator[int]:
    """Row indices for ever: a new random order each epoch, decided by the seed alone; without the first `skip`.
    lengths: sort within each `size` rows, so that a batch's rows are of similar length."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in itertools.count():
        order = torch.randperm(count, generator=generator).tolist()
        if lengths is not None:
            order = [i for chunk in batches_of(order, size) for i in sorted(chunk, key=lambda i: -lengths[i])]
        yield from order[max(0, skip - epoch * count) :]


@dataclass
class Run:
    """What a step changes, and so what a checkpoint holds."""

    model: PreTrainedModel
    extractor: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    step: int = 0

    @classmethod
    def start(cls, model: PreTrainedModel, recipe) -> "Run":
        """A new extractor and optimizer for those parameters of the model that require a gradient."""
        torch.manual_seed(recipe.seed)
        hidden_size = model.config.get_text_config().hidden_size
        extractor = make_extractor(recipe.extractor, hidden_size, recipe.extractor_dim).to(model.device)
        trained = [*model.parameters(), *(extractor.parameters() if recipe.mlc_weight else ())]
        trained = [p for p in trained if p.requires_grad]
        fused = model.device.type == "cuda" or None  # the other ways need another copy of all parameters for a moment
        optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused)
        warmup = round(recipe.warmup * recipe.steps)
        return cls(model, extractor, optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, recipe.steps))


def train(run: Run, examples: list[Example], recipe) -> Iterator[dict]:
    """One optimizer step per `next`, up to `recipe.steps`; yields the step's figures, means over its micro-batches, and
    its `rows`. The same loop continues a run whose `step` is not 0.

    Raises BrokenDown, before the step is taken, if the loss or its gradient is not finite."""
    parameters, size = run.optimizer.param_groups[0]["params"], recipe.batch_size
    lengths = [len(e.prompt) + max(len(e.chosen), len(e.rejected or ())) for e in examples]
    done, lengths = run.step * recipe.accumulation * size, lengths if recipe.group_by_length else None
    order = row_order(len(examples), recipe.seed, done, lengths, 50 * size)
    while run.step < recipe.steps:
        uses_mlc = recipe.mlc_weight > 0 and run.step % recipe.mlc_every == 0
        rows, figures = [examples[i] for i in itertools.islice(order, recipe.accumulation * size)], {}
        try:
            for batch in batches_of(rows, size):
                with arithmetic(run.model, recipe):
                    loss, shown = alignment_loss(run.model, batch, recipe)  # 1. English: chosen and rejected
                    if uses_mlc:  # 2. all languages, prompts only
                        shown["consistency_loss"] = consistency_loss(run.model, run.extractor, batch, recipe)
                        loss = loss + recipe.mlc_weight * shown["consistency_loss"]
                # 3. One number, one backward pass. The mean over the micro-batches: the gradient of one large batch.
                (loss / recipe.accumulation).backward()
                for name, value in (shown | {"loss": loss}).items():
                    figures[name] = figures.get(name, 0.0) + value.detach() / recipe.accumulation
            norm = nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            if not torch.isfinite(norm):  # the one wait for a GPU beside the loss's, whose SVD needs one
                raise BrokenDown(f"loss is {figures['loss'].item():.4g}, its gradient's norm {norm.item():.4g}")
        except BrokenDown as error:
            where = ", ".join(row.where for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            raise BrokenDown(f"step {run.step}: {error}; look at the rows {where}") from None
        figures |= {"learning_rate": run.scheduler.get_last_lr()[0], "grad_norm": norm}
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        yield {"step": run.step - 1, "rows": rows, "uses_mlc": uses_mlc} | figures
