"""Hidden states of the last prompt token at one layer, the h of the method, and the way from states to logits.

Layers are numbered as in transformers' `hidden_states`: entry 0 is the embedding, entry k the output of the k-th layer,
and the last entry n the output of the last layer after the final norm; -1 means n. Masks should stay on the CPU, where
they can be read without waiting for a GPU.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from mlc_min.preference import to_device


class _LayerReached(Exception):
    """Carries the input of layer k out of the forward pass, so that nothing above it runs."""


def resolve_layer(model: PreTrainedModel, layer: int) -> int:
    """The entry number 0…n for `layer`, which may be negative as in Python. Raises ValueError outside."""
    n = model.config.get_text_config().num_hidden_layers
    if not -n - 1 <= layer <= n:
        raise ValueError(f"layer must lie between {-n - 1} and {n} for this model of {n} layers, got {layer}")
    return layer % (n + 1)


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, … from the first real token on, so that left padding changes nothing. (N, T) -> (N, T)."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def last_position(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index of each row's last real token, for right and left padding alike. (N, T) -> (N,) int64, on the CPU. From the
    mask and never from token values: many models pad with their end token. Raises ValueError for a row of zeros.

    >>> last_position(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
    [1, 2]
    """
    mask = attention_mask.cpu().numpy().astype(bool)
    if not mask.any(-1).all():
        raise ValueError("a row of attention_mask is all zeros: an empty prompt has no last token")
    return torch.from_numpy(mask.shape[-1] - 1 - np.flip(mask, -1).argmax(-1))


def last_token_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, layer: int = -1,
    inputs_embeds: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """h: hidden state of the last token of each prompt at entry `layer`. (N, T), (N, T) -> (N, d_h).

    The prompts must end as generation would start, that is with the chat template's generation prompt. Runs the layers
    up to `layer` and stops: no layer above it, no final norm unless it is the last entry, no vocabulary logits. Keeps
    the gradient. The dtype is the model's own (or autocast's).
    inputs_embeds: (N, T, d_h), the embeddings of the ids, if they have been looked up already."""
    layer, decoder, device = resolve_layer(model, layer), model.get_decoder(), model.device
    last, mask = to_device(last_position(attention_mask), device), to_device(attention_mask, device)
    inputs = {"input_ids": to_device(input_ids, device)} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    inputs |= dict(attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
    if layer == len(decoder.layers):
        hidden_states = decoder(**inputs).last_hidden_state
    else:

        def stop(module, args, kwargs):
            raise _LayerReached(args[0] if args else kwargs["hidden_states"])

        hook = decoder.layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            decoder(**inputs)
            raise RuntimeError(f"the model never ran layer {layer}: its layers are not where this code looks")
        except _LayerReached as reached:
            hidden_states = reached.args[0]
        finally:
            hook.remove()
    return hidden_states[torch.arange(len(last), device=last.device), last]


def last_token_states_in_parts(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, layer: int = -1, parts: int = 1
) -> torch.Tensor:
    """`last_token_states` of a right-padded batch, in `parts` passes over rows of similar length, each padded to its
    own longest row only. Translations differ so much in tokens that in one pass half of the work can be padding."""
    if parts == 1:
        return last_token_states(model, input_ids, attention_mask, layer)
    # Looked up once: the gradient of the embeddings is as large as they are, and each lookup would make one.
    embeds = model.get_input_embeddings()(to_device(input_ids, model.device))
    order, states = attention_mask.cpu().sum(-1).argsort(stable=True), []
    for rows in order.tensor_split(min(parts, len(order))):
        width = int(last_position(attention_mask[rows]).numpy().max()) + 1
        own = embeds[to_device(rows, model.device), :width]
        states.append(last_token_states(model, input_ids, attention_mask[rows, :width], layer, own))
    return torch.cat(states)[to_device(order.argsort(), model.device)]


def vocabulary_logits(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """(…, d_h) last hidden states -> (…, V) logits, for use at the positions that need them only. What a family does
    beside the matrix is written out here; `machinery/models.py` compares the result with the model's own logits before
    a run, since a family that does more would be trained on wrong log-probs without a word."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden_states)
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
