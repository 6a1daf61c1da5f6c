"""Is a low MLC loss more than a trick? Three figures on prompts that were not trained on.

The loss can reach its floor without any language meeting another: a trained extractor can map everything to
one line, and a model can add one large common vector to all states. Neither brings translations closer than
unrelated prompts, and that difference is what these figures show.
"""

import torch

from mlc_min.consistency import (
    collinearity,
    mlc_ceiling,
    mlc_floor,
    mlc_loss,
    retrieval_accuracy,
    shuffle_groups,
    singular_values,
)
from mlc_min.examples import Row, encode_row_prompts, pad
from mlc_min.states import last_token_states


@torch.no_grad()
def prompt_states(model, tokenizer, rows: list[Row], languages: tuple[str, ...], layer: int = -1) -> torch.Tensor:
    """Raw hidden states of the last prompt token: (rows, languages, d_h)."""
    states = []
    for row in rows:
        prompts = list(encode_row_prompts(row, tokenizer, languages).values())
        batch = {name: tensor.to(model.device) for name, tensor in pad(prompts).items()}
        states.append(last_token_states(model, **batch, layer=layer))
    return torch.stack(states).float()


def diagnose(model, tokenizer, rows: list[Row], languages: tuple[str, ...], layer: int = -1, tau: float = 0.2) -> dict:
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
        "layer": layer,
        "spectrum": singular_values(states).mean(0).tolist(),
        "spectrum_shuffled": singular_values(shuffled).mean(0).tolist(),
        "retrieval": dict(zip(languages[1:], retrieval[1:], strict=True)),
        "retrieval_chance": 100 / len(rows),
    }
