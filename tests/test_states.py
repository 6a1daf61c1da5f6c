"""Last-token states at every layer, against transformers' own `output_hidden_states=True`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mlc_min.examples import pad
from mlc_min.states import last_position, last_token_states, last_token_states_in_parts, position_ids, resolve_layer

N = 3  # layers of every model here, so entries 0…3
ROWS = [[5, 6, 7, 8, 9, 10, 2], [11, 2], [2, 12, 13, 2]]
PAD = 0  # what padding is filled with, so that real tokens equal to it are there to be mistaken for it
SIDES = pytest.mark.parametrize("side", ["right", "left"])
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "Llama": (LlamaConfig, LlamaForCausalLM, {}),
    "Mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "Gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "query_pre_attn_scalar": 8} | SLIDING),
    "Gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8, "query_pre_attn_scalar": 8} | SLIDING),
}


def make_model(family: str, **changes):
    config, model, special = FAMILIES[family]
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=N,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.1,  # large enough that attending to a wrong token shows
            **special,
            **changes,
        )
    )
    with torch.no_grad():  # norms that do something of their own, so that one too many or too few shows
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter))
    return made.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make_model(request.param)


def alone(model, rows=ROWS) -> torch.Tensor:
    """The oracle (entries, N, d_h): each row run by itself without padding, every entry read at its last token."""
    with torch.no_grad():
        entries = [model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows]
    return torch.stack([torch.stack([entry[0, -1] for entry in of_row]) for of_row in entries], dim=1)


def padded(rows=ROWS, side="right", more=0) -> dict[str, torch.Tensor]:
    """The rows as a batch, with `more` columns of padding than needed."""
    batch = pad([*rows, [PAD] * (max(map(len, rows)) + more)], side)
    return {name: tensor[:-1] for name, tensor in batch.items()}


# --- values ---


@SIDES
@pytest.mark.parametrize("layer", range(-N - 1, N + 1))
def test_every_entry_equals_that_of_transformers_whatever_the_padding(model, layer, side):
    """Usually length - 1 is taken for the last position, which is wrong with padding on the left, or the mask is not
    passed on."""
    expected = alone(model)[layer]
    for more in (0, 1, 9):
        with torch.no_grad():
            found = last_token_states(model, **padded(side=side, more=more), layer=layer)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@SIDES
def test_one_by_one_equals_batched(tiny_model, side):
    """Usually something of a row depends on the other rows' lengths, such as its positions or its last index."""
    for layer in range(N + 1):
        batched = last_token_states(tiny_model, **padded(side=side), layer=layer)
        single = [last_token_states(tiny_model, **padded([row], side), layer=layer) for row in ROWS]
        torch.testing.assert_close(batched, torch.cat(single), atol=1e-5, rtol=1e-5)


@SIDES
@pytest.mark.parametrize("layer", [1, N])
def test_the_model_is_given_positions_that_count_the_real_tokens(layer, side):
    """Usually `position_ids` is left out, so that padding on the left is counted. No state of these models shows it,
    since rotary positions see differences only; a model with learned positions, as GPT-2 has, would be wrong."""
    model, seen = make_model("Qwen2"), []
    model.get_decoder().rotary_emb.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    batch = padded(side=side, more=2)
    last_token_states(model, **batch, layer=layer)
    for positions, mask, row in zip(seen[0].expand(len(ROWS), -1), batch["attention_mask"].bool(), ROWS, strict=True):
        assert positions[mask].tolist() == list(range(len(row)))


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
@pytest.mark.parametrize("layer", [0, 1, N])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_parts_the_states_and_the_gradient_are_those_of_one_pass(family, parts, layer):
    rows, weights = [*ROWS, [7] * 9, [3], [9, 8, 2, 2]], torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    whole, cut = make_model(family), make_model(family)
    expected = last_token_states(whole, **padded(rows), layer=layer)
    found = last_token_states_in_parts(cut, **padded(rows, more=2), layer=layer, parts=parts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or (a.grad - b.grad).abs().max() <= 1e-5 * (1 + a.grad.abs().max())


def test_parts_hold_no_more_padding_than_their_own_longest_row_needs():
    model, seen = make_model("Qwen2"), []
    hook = model.model.layers[0].mlp.register_forward_hook(
        lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2]))
    )
    last_token_states_in_parts(model, **padded([[5] * 2, [5] * 9, [5] * 3, [5] * 8]), layer=1, parts=2)
    hook.remove()
    assert seen == [(2, 3), (2, 9)]


def test_the_values_would_show_an_attended_pad_token(model):
    """The tolerance above is not vacuous: without the mask the states are elsewhere."""
    batch = padded(side="left", more=2)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    for layer in range(1, N + 1):
        with torch.no_grad():
            found = last_token_states(model, **batch, layer=layer)
        assert (found - alone(model)[layer])[1].abs().max() > 1e-2  # the row of two, shorter than any window


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_entry_stays_after_the_final_norm_where_the_config_unties_it(family):
    untied = make_model(family, tie_last_hidden_states=False)
    theirs = alone(untied)[-1]  # transformers: before the norm
    ours = last_token_states(untied, **padded())
    assert (ours - theirs).abs().max() > 0.1
    torch.testing.assert_close(ours, untied.get_decoder().norm(theirs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, alone(make_model(family))[-1], atol=1e-5, rtol=1e-5)


# --- what runs, and what learns ---


@pytest.mark.parametrize("layer", range(N + 1))
def test_nothing_above_the_layer_runs(model, layer):
    """Usually the whole model runs, as with `output_hidden_states=True`: an exception in a hook ends it."""
    decoder, calls = model.get_decoder(), []
    parts = {f"layer {i}": part for i, part in enumerate(decoder.layers)}
    parts |= {"final norm": decoder.norm, "head": model.get_output_embeddings()}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))  # called when a part has run
        for name, part in parts.items()
    ]
    last_token_states(model, **padded(), layer=layer)
    for hook in hooks:
        hook.remove()
    assert calls == [f"layer {i}" for i in range(layer)] + ["final norm"] * (layer == N)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("layer", range(N + 1))
def test_the_gradient_reaches_what_lies_below_the_layer_as_in_transformers_and_nothing_above(layer, checkpointing):
    model = make_model("Qwen2").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    weights = torch.randn(len(ROWS), 32)
    (last_token_states(model, **padded(), layer=layer) * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}

    names = ["embed_tokens", *(f"layers.{i}." for i in range(layer)), *["model.norm."] * (layer == N)]
    below = {name for name in found if any(part in name for part in names)}
    assert {name for name, grad in found.items() if grad is not None} == below

    oracle = make_model("Qwen2")
    for row, weight in zip(ROWS, weights, strict=True):
        entry = oracle(torch.tensor([row]), output_hidden_states=True).hidden_states[layer]
        (entry[0, -1] * weight).sum().backward()
    for name in below:
        torch.testing.assert_close(found[name], oracle.get_parameter(name).grad, atol=1e-5, rtol=1e-4)
        assert found[name].abs().max() > 0


def hooks_left(model) -> list:
    return [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


@pytest.mark.parametrize("layer", range(N + 1))
def test_no_hook_is_left_behind_even_after_an_exception(layer):
    """Usually the hook is not taken out in a `finally`."""
    model = make_model("Qwen2")
    ids = torch.tensor([[5, 6, 7]])
    logits = model(ids).logits
    last_token_states(model, **padded(), layer=layer)
    assert hooks_left(model) == []
    with pytest.raises(IndexError):
        last_token_states(model, torch.tensor([[64]]), torch.tensor([[1]]), layer)  # there is no token 64
    assert hooks_left(model) == []
    assert torch.equal(model(ids).logits, logits)


# --- masks and numbers ---


@pytest.mark.parametrize(
    "mask, last, positions",
    [
        ([[1, 1, 1, 1]], [3], [[0, 1, 2, 3]]),
        ([[1, 1, 0, 0]], [1], [[0, 1, 1, 1]]),
        ([[0, 0, 1, 1]], [3], [[0, 0, 0, 1]]),
        ([[1, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]], [0, 2, 2, 2], [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 2]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_last_position_and_position_ids_are_the_hand_typed_ones(mask, last, positions, dtype):
    """Usually length - 1 is returned, which is the last position only with padding on the right."""
    mask = torch.tensor(mask, dtype=dtype)
    assert last_position(mask).tolist() == last
    assert position_ids(mask).tolist() == positions


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 4), st.sampled_from(["left", "right"]))
def test_positions_count_the_real_tokens_and_the_last_is_found_for_any_lengths(lengths, more, side):
    """Usually one side of the padding is forgotten."""
    mask = padded([[5] * length for length in lengths], side, more)["attention_mask"]
    width = max(lengths) + more
    starts = [width - length if side == "left" else 0 for length in lengths]
    assert last_position(mask).tolist() == [s + length - 1 for s, length in zip(starts, lengths, strict=True)]
    for row, start, length in zip(position_ids(mask).tolist(), starts, lengths, strict=True):
        assert row[start : start + length] == list(range(length))


@pytest.mark.parametrize("layer", range(-N - 1, N + 1))
def test_layers_are_numbered_as_in_python(tiny_model, layer):
    assert resolve_layer(tiny_model, layer) == list(range(N + 1))[layer]


@pytest.mark.parametrize("layer", [-N - 2, N + 1, 99])
def test_a_layer_that_is_not_there_is_refused_with_the_range(tiny_model, layer):
    with pytest.raises(ValueError, match=rf"layer must lie between -4 and 3 .* got {layer}"):
        last_token_states(tiny_model, **padded(), layer=layer)


def test_an_empty_prompt_is_refused(tiny_model):
    """Usually a row without a token gives some position silently."""
    mask, before = torch.tensor([[1, 1, 0], [0, 0, 0]]), hooks_left(tiny_model)
    for layer in range(N + 1):
        with pytest.raises(ValueError, match="an empty prompt has no last token"):
            last_token_states(tiny_model, torch.full((2, 3), 5), mask, layer)
    assert hooks_left(tiny_model) == before  # transformers leaves some of its own
