"""Loading, saving and the vocabulary head."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from mlc_min.errors import InputError
from mlc_min.models import freeze, load_model, pick_device, vocabulary_head
from mlc_min.saving import save_folder, write_atomically


def test_the_head_gives_the_models_own_logits(tiny_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    states = tiny_model.model(ids).last_hidden_state
    assert torch.equal(vocabulary_head(tiny_model)(states), tiny_model(ids).logits)


def test_the_head_keeps_gemma_2s_softcap():
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, intermediate_size=16, head_dim=8, final_logit_softcapping=0.5))
    ids = torch.tensor([[5, 6, 7]])
    logits = model(ids).logits
    assert torch.equal(vocabulary_head(model)(model.model(ids).last_hidden_state), logits)
    assert logits.abs().max() < 0.5


def test_a_folder_without_model_or_a_device_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="--device nonsense"):
        pick_device("nonsense")


def test_a_pickled_model_is_refused(base, tmp_path):
    model, tokenizer = base
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_saved_model_loads_with_the_same_weights(base, tmp_path):
    model, tokenizer = base

    def write(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save_folder(tmp_path / "model", write)
    again, _ = load_model(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")  # tied, so stored once


def test_freeze_returns_what_it_froze(tiny_model):
    import copy

    model = copy.deepcopy(tiny_model)
    frozen = freeze(model, "embed_tokens, layers.0.mlp.up")
    assert frozen == ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    assert sum(not p.requires_grad for p in model.parameters()) == 2


def test_a_save_that_fails_half_way_leaves_the_old_folder_whole(tmp_path):
    save_folder(tmp_path / "model", lambda folder: (folder / "a").write_text("old"))

    def fail(folder):
        (folder / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_folder(tmp_path / "model", fail)
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path):
    for text in ("one", "zwei ü"):
        write_atomically(tmp_path / "f.json", json.dumps(text))
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == "zwei ü"
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
