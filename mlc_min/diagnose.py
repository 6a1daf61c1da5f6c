"""Is a low MLC loss more than a trick? Three figures on prompts that were not trained on.

The loss can reach its floor without any language meeting another: a trained extractor can map everything to
one line, and a model can add one large common vector to all states. Neither brings translations closer than
unrelated prompts, and that difference is what these figures show.
"""

import torch

from mlc_min.consistency import collinearity, retrieval_accuracy, shuffle_groups
from mlc_min.data import Row, encode_prompt, pad
from mlc_min.represent import last_token_states


@torch.no_grad()
def prompt_states(model, tokenizer, rows: list[Row], languages: tuple[str, ...], layer: int = -1) -> torch.Tensor:
    """Raw hidden states of the last prompt token: (rows, languages, d_h)."""
    states = []
    for row in rows:
        prompts = [encode_prompt(tokenizer, row.prompts[language]) for language in languages]
        batch = {name: tensor.to(model.device) for name, tensor in pad(prompts, tokenizer.pad_token_id).items()}
        states.append(last_token_states(model, **batch, layer=layer))
    return torch.stack(states).float()


def diagnose(model, tokenizer, rows: list[Row], languages: tuple[str, ...], layer: int = -1) -> dict:
    """collinearity: σ₁²/m of the raw states of each prompt and its translations, mean over the rows;
    collinearity_shuffled: of groups of unrelated prompts; retrieval: per language, % of prompts whose
    nearest first-language prompt is their translation (among `rows`, so give one row per meaning)."""
    states = prompt_states(model, tokenizer, rows, languages, layer)
    retrieval = (100 * retrieval_accuracy(states)).tolist()
    return {
        "collinearity": collinearity(states).mean().item(),
        "collinearity_shuffled": collinearity(shuffle_groups(states)).mean().item(),
        "retrieval": dict(zip(languages[1:], retrieval[1:], strict=True)),
        "retrieval_chance": 100 / len(rows),
    }
