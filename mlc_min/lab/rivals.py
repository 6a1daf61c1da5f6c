"""What MLC is compared with beside DPO, written from the papers: two losses that need translated responses, with which
training goes on after DPO in English, and a vector that needs no training."""

import copy
import random
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from mlc_min.examples import Example, pad, preference_batch
from mlc_min.loop import batches_of, response_logps, row_order
from mlc_min.states import last_token_states, position_ids

# β as in their code, our main job's learning rate, the whole vector; none of this was tuned.
MPO = {"loss": "MPO", "beta": 1.0, "learning_rate": 1e-4}
DCO = {"loss": "DCO", "beta": 1.0, "learning_rate": 1e-4}
VECTOR = {"layer": 3, "scale": 1.0}


def mpo_loss(target: Tensor, source_reference: Tensor, beta: float) -> Tensor:
    """MPO (arXiv 2505.16869) without its term for hidden states: squared distance of β times the target language's gap,
    chosen minus rejected, to the reference's gap in the source language. All (N,), log-probs per token."""
    return (beta * target - source_reference).square()


def dco_loss(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """DCO (arXiv 2603.04678): in each of two languages the margin, chosen minus rejected, shall move by as much as the
    reference has of it in the other. policy, reference: margins in both languages, (N,) summed log-probs each.
    β > 1 moves the second language more."""
    (first, second), (reference_first, reference_second) = policy, reference
    moved_first, moved_second = first - reference_first, second - reference_second
    return (moved_first - reference_second / beta).abs() + (moved_second - beta * reference_first).abs()


def gaps(model: PreTrainedModel, examples: list[Example], is_per_token: bool) -> Tensor:
    """(N,): log-prob of the chosen response minus that of the rejected one."""
    logps, lengths = response_logps(model, preference_batch(examples))
    chosen, rejected = (logps / lengths if is_per_token else logps).chunk(2)
    return chosen - rejected


def mean_states(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """(2N, d_h): last hidden states, averaged over the tokens of prompt and response."""
    batch = {name: tensor.to(model.device) for name, tensor in preference_batch(examples).items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = model.get_decoder()(ids, attention_mask=mask, position_ids=position_ids(mask)).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def go_on(model: PreTrainedModel, settings: dict, examples: dict[str, list[Example]], recipe) -> None:
    """Train on, in place, with MPO or DCO for as many steps as before; the reference is the model as it is now, aligned
    in English.

    examples: of each language, English first, the same rows in the same order. Each row of a batch is used in English
    and in one other language, drawn anew."""
    (english, *others), reference = examples, copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), settings["learning_rate"], weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, recipe.steps // 10, recipe.steps)
    order, draw = row_order(len(examples[english]), recipe.seed), random.Random(recipe.seed)
    for _ in tqdm(range(recipe.steps), settings["loss"]):
        rows = [next(order) for _ in range(recipe.batch_size)]
        first, second = [examples[english][i] for i in rows], [examples[draw.choice(others)][i] for i in rows]
        if settings["loss"] == "MPO":
            loss = mpo_loss(gaps(model, second, True), gaps(reference, first, True), settings["beta"]).mean()
            loss = loss + (mean_states(model, first) - mean_states(reference, first)).square().mean()
        else:
            margins = [tuple(gaps(own, batch, False) for batch in (first, second)) for own in (model, reference)]
            loss = dco_loss(*margins, settings["beta"]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def refusal_vector(model: PreTrainedModel, harmful: list[list[int]], harmless: list[list[int]]) -> Tensor:
    """(d_h,): mean state of the last prompt token at VECTOR's layer, harmful prompts minus harmless ones
    (arXiv 2406.11717)."""
    states = ([last_token_states(model, **pad(batch), layer=VECTOR["layer"]) for batch in batches_of(prompts, 64)]
              for prompts in (harmful, harmless))  # fmt: skip
    return torch.sub(*(torch.cat(own).mean(0) for own in states))


@contextmanager
def steered(model: PreTrainedModel, vector: Tensor):
    """Within it, VECTOR's scale times the vector is added to what that layer gives, at every token."""

    def add(module, args, output):
        shift = VECTOR["scale"] * vector
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    handle = model.get_decoder().layers[VECTOR["layer"] - 1].register_forward_hook(add)
    try:
        yield model
    finally:
        handle.remove()
