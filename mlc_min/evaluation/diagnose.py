"""Is a low MLC loss more than a trick? Three figures, without gradient, that say what it means.

The loss can reach its floor without any language meeting another: a trained extractor can map everything to one line,
and a model can add one large common vector to all states. Neither brings translations closer than unrelated prompts,
and that difference is what these figures show.
"""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.consistency import mlc_ceiling, mlc_floor, mlc_loss, singular_values, unit_rows
from mlc_min.examples import Example, Row, encode_row_prompts, pad
from mlc_min.loop import groups_of_states
from mlc_min.states import last_token_states


@torch.no_grad()
def collinearity(representations: torch.Tensor) -> torch.Tensor:
    """σ₁²/m of each prompt, the share of the energy on one line: (N, m, d) -> (N,) in [1/r, 1].

    1 - σ₁²/m is the relative error of the best rank-1 approximation (Eckart-Young).
    """
    return singular_values(representations)[:, 0].square() / representations.shape[1]


def shuffle_groups(representations: torch.Tensor) -> torch.Tensor:
    """The control: language j of prompt n goes to prompt n + j (mod N), so that no group is a translation set.

    (N, m, d) -> (N, m, d). If these groups are as collinear as the true ones, the loss measured nothing.
    """
    return torch.stack([row.roll(j, 0) for j, row in enumerate(representations.unbind(1))], dim=1)


@torch.no_grad()
def retrieval_accuracy(representations: torch.Tensor) -> torch.Tensor:
    """Share of prompts whose nearest first-language (English) row, by cosine, is their own translation.

    (N, m, d) -> (m,); entry 0 is the first language with itself. Chance is 1/N.
    """
    z = unit_rows(representations).transpose(0, 1)  # (m, N, d)
    with torch.autocast(z.device.type, enabled=False):
        nearest = (z @ z[0].T).argmax(-1)  # (m, N)
    return (nearest == torch.arange(z.shape[1], device=z.device)).float().mean(-1)


@torch.no_grad()
def probe_figures(model: PreTrainedModel, extractor: nn.Module, examples: list[Example], recipe) -> dict:
    """What the training log shows beside the losses, on fixed examples; means over prompts, tensors or numbers.

    mlc_loss of the extractor's representations between mlc_floor and mlc_ceiling, and beside that of shuffled groups
    (mlc_shuffled); collinearity and collinearity_shuffled of the raw states; retrieval and retrieval_chance, shares."""
    found: dict[str, list[tuple]] = {}  # name -> (prompts that it is of, value) of each size of group that has it
    for m, states in groups_of_states(model, examples, recipe).items():
        representations, loss = extractor(states), partial(mlc_loss, tau=recipe.mlc_tau, form=recipe.mlc_form)
        own = {
            "mlc_loss": loss(representations),
            "mlc_floor": mlc_floor(m, representations.shape[-1], recipe.mlc_tau, recipe.mlc_form),
            "mlc_ceiling": mlc_ceiling(m, representations.shape[-1]),
            "collinearity": collinearity(states).mean(),
        }
        if len(states) > 1 and m > 1:  # one group alone can be neither shuffled nor searched
            own["mlc_shuffled"] = loss(shuffle_groups(representations))
            own["collinearity_shuffled"] = collinearity(shuffle_groups(states)).mean()
            own["retrieval"] = retrieval_accuracy(states)[1:].mean()
            own["retrieval_chance"] = 1 / len(states)
        for name, value in own.items():
            found.setdefault(name, []).append((len(states), value))
    return {name: sum(n * value for n, value in of) / sum(n for n, _ in of) for name, of in found.items()}


@torch.no_grad()
def prompt_states(
    model: PreTrainedModel, tokenizer: Tokenizer, rows: list[Row], languages: tuple[str, ...], layer: int = -1
) -> torch.Tensor:
    """Raw hidden states of the last prompt token: (rows, languages, d_h)."""
    states = []
    for row in rows:
        prompts = list(encode_row_prompts(row, tokenizer, languages).values())
        batch = {name: tensor.to(model.device) for name, tensor in pad(prompts).items()}
        states.append(last_token_states(model, **batch, layer=layer))
    return torch.stack(states).float()


def diagnose(
    model: PreTrainedModel, tokenizer: Tokenizer, rows: list[Row], languages: tuple[str, ...], layer: int = -1,
    tau: float = 0.2,
) -> dict:  # fmt: skip
    """Figures on raw hidden states (no extractor); give one row per meaning.

    mlc_loss: official form at `tau`, to be read between mlc_floor and mlc_ceiling; collinearity: σ₁²/m of a
    prompt and its translations, mean over rows; all again for groups of unrelated prompts (_shuffled).
    retrieval: per language, % of prompts whose nearest first-language prompt is their translation.
    spectrum: the singular values of a prompt and its translations, mean over rows.
    Raises ValueError for a layer that is not there, and BrokenDown, which is one too, for states of NaN or of zeros.
    """
    states = prompt_states(model, tokenizer, rows, languages, layer)
    retrieval = (100 * retrieval_accuracy(states)).tolist()
    shuffled = shuffle_groups(states)
    return {
        "mlc_loss": mlc_loss(states, tau).item(),
        "mlc_loss_shuffled": mlc_loss(shuffled, tau).item(),
        "mlc_floor": mlc_floor(len(languages), states.shape[-1], tau),
        "mlc_ceiling": mlc_ceiling(len(languages), states.shape[-1]),
        "collinearity": collinearity(states).mean().item(),
        "collinearity_shuffled": collinearity(shuffled).mean().item(),
        "spectrum": singular_values(states).mean(0).tolist(),
        "spectrum_shuffled": singular_values(shuffled).mean(0).tolist(), "layer": layer,
        "retrieval": dict(zip(languages[1:], retrieval[1:], strict=True)), "retrieval_chance": 100 / len(rows),
    }  # fmt: skip
