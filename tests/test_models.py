"""Loading, saving and the vocabulary head."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from test_states import FAMILIES, make_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma3Config

from mlc_min.examples import Example, response_batch
from mlc_min.loop import response_logps
from mlc_min.machinery import models
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.files import save_folder, write_atomically
from mlc_min.machinery.log import hardware
from mlc_min.machinery.models import freeze, load_model, pick_device
from mlc_min.machinery.settings import TrainConfig
from mlc_min.states import last_token_states, vocabulary_logits
from mlc_min.train import fit


def test_the_head_gives_the_models_own_logits(tiny_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    states = tiny_model.model(ids).last_hidden_state
    assert torch.equal(vocabulary_logits(tiny_model, states), tiny_model(ids).logits)


def test_the_head_keeps_gemma_2s_softcap():
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, intermediate_size=16, head_dim=8, final_logit_softcapping=0.5))
    ids = torch.tensor([[5, 6, 7]])
    logits = model(ids).logits
    assert torch.equal(vocabulary_logits(model, model.model(ids).last_hidden_state), logits)
    assert logits.abs().max() < 0.5


def test_a_folder_without_model_or_a_device_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="--device nonsense"):
        pick_device("nonsense")


def test_a_device_with_wrong_gradients_of_singular_values_is_refused(monkeypatch):
    models.check_singular_values(torch.device("cpu"))
    real, calls = models.mlc_loss, []

    def wrong_the_second_time(x):
        calls.append(x)
        return real(x) * (1.2 if len(calls) == 2 else 1.0)

    monkeypatch.setattr(models, "mlc_loss", wrong_the_second_time)
    with pytest.raises(RuntimeError, match="wrong gradients of singular values there, by 20%"):
        models.check_singular_values(torch.device("cpu"))


@pytest.mark.parametrize("fault", [None, "no svdvals", "wrong"])
def test_mps_is_taken_where_it_can_do_what_the_loss_needs_and_else_refused_in_one_line(monkeypatch, fault):
    def check(device):
        if fault:
            raise NotImplementedError(f"{fault}\nand more")

    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(models, "check_singular_values", check)
    if fault is None:
        assert pick_device("mps").type == "mps"
        return
    with pytest.raises(InputError) as error:
        pick_device("mps")
    assert str(error.value) == f"--device mps: not usable here ({fault}); try --device cpu"


def test_the_hardware_of_a_result_names_the_kind_of_device():
    cores = hardware(torch.device("cpu"))
    assert hardware(torch.device("mps")) == f"mps, {cores}" and "CPU cores" in cores


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


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_are_scored_as_by_the_whole_model_in_every_family(family):
    model = make_model(family)
    batch = response_batch([[5, 6, 7], [8]], [[9, 10, 2], [11, 2]])
    sums, lengths = response_logps(model, batch)
    for i, (prompt, response) in enumerate([([5, 6, 7], [9, 10, 2]), ([8], [11, 2])]):
        logits = model(torch.tensor([prompt + response])).logits[0].double()
        chances = logits.log_softmax(-1)
        expected = sum(chances[len(prompt) - 1 + k, token].item() for k, token in enumerate(response))
        assert sums[i].item() == pytest.approx(expected, abs=1e-4) and lengths[i] == len(response)


def test_a_response_is_scored_the_same_behind_padding_as_before_it():
    """Without attention mask and position ids (transformers needs one of them), padding would change the sums."""
    model, sequence = make_model("Llama"), [5, 6, 7, 9, 10, 2]
    with torch.no_grad():  # so that each token that is looked at shows
        for parameter in model.parameters():
            parameter.mul_(8)
    ids = torch.tensor([[0, 0, 0, *sequence]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    behind = {"input_ids": ids, "attention_mask": mask, "response_mask": torch.tensor([[False] * 6 + [True] * 3])}
    alone = response_batch([sequence[:3]], [sequence[3:]])
    assert response_logps(model, behind)[0].item() == pytest.approx(response_logps(model, alone)[0].item(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "dtype": "bfloat16", "mlc_layer": 1}])
def test_every_family_trains_from_log_2_with_either_way_of_saving_memory(family, options):
    model = make_model(family)
    examples = [
        Example(f"f:{i}", {"en": [5 + i, 6], "zh": [7, 8 + i, 9]}, [10 + i, 2], [20, 21 + i, 2]) for i in range(4)
    ]
    config = TrainConfig(
        languages="en,zh", steps=8, batch_size=4, extractor_dim=8, mlc_weight=0.5, freeze="", sft_weight=0.0,
        learning_rate=1e-2, log_every=1, device="cpu", **options,
    )  # fmt: skip
    _, history = fit(config, model, examples, quiet=True)
    assert history[0]["align_loss"] == pytest.approx(0.693147, abs=0.01 if options else 1e-5)
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["accuracy"] == 1.0


def test_the_text_half_of_a_gemma_3_that_also_sees_is_what_is_used():
    text = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48, head_dim=8, sliding_window=4)  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    tokens = dict(image_token_index=60, boi_token_index=61, eoi_token_index=62)
    config = Gemma3Config(text_config=text, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4, **tokens)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[2, 5, 6, 7]])
    mask = torch.ones_like(ids)
    whole = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for layer, states in enumerate(whole.hidden_states):
        assert torch.allclose(last_token_states(model, ids, mask, layer), states[:, -1], atol=1e-5)
    states = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(vocabulary_logits(model, states), whole.logits, atol=1e-5)
