"""What is loaded belongs together or is refused in one line: weights, configuration, tokenizer, template, adapters."""

import datetime
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from mlc_min.examples import Row, encode_prompt, encode_rows, response_batch
from mlc_min.lab.sentences import EMBEDDED
from mlc_min.loop import response_logps
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.models import check_ids, check_logits, fingerprint, freeze, load_model
from mlc_min.states import vocabulary_logits

TEMPLATE = (EMBEDDED / "model/chat_template.jinja").read_text("utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the embedded model to break."""
    return Path(shutil.copytree(EMBEDDED / "model", tmp_path / "model"))


def refused(folder: Path, **options) -> str:
    with pytest.raises(InputError) as error:
        load_model(folder, **options)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")


def change_weights(folder: Path, change) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


# --- weights and configuration ---


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\nsize 1\n", None, b""])
def test_a_pointer_to_weights_or_half_of_them_is_no_model(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4_000_000] if content is None else content)
    assert "cannot be loaded" in refused(folder)


def test_a_layer_that_is_not_in_the_file_is_not_made_up(folder):
    change_weights(folder, lambda state: {k: v for k, v in state.items() if "layers.2." not in k})
    assert "model.layers.2.input_layernorm.weight is not among the weights, nor 8 others" in refused(folder)


def test_an_untied_head_that_is_not_in_the_file_is_not_made_up(folder):
    change_config(folder, tie_word_embeddings=False)
    assert "lm_head.weight is not among the weights" in refused(folder)


def test_weights_that_the_model_has_no_place_for_are_not_ignored(folder):
    name = "model.layers.0.mlp.up_proj.weight_scale"  # as an unknown quantisation stores it
    change_weights(folder, lambda state: state | {name: torch.ones(1)})
    assert f"{name} has no place in the model" in refused(folder)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 9000}, {"intermediate_size": 96}, {"num_hidden_layers": 9}, {"model_type": "x"}]
)
def test_a_configuration_of_another_shape_is_one_line(folder, change):
    change_config(folder, **change)
    refused(folder)


def test_the_fingerprint_sees_every_single_weight_and_the_configuration(base, tiny_model):
    import copy

    model = copy.deepcopy(tiny_model)
    first = fingerprint(model)
    assert first == fingerprint(copy.deepcopy(model)) and len(first) == 16
    seen = {first}
    for weight in (model.model.layers[1].mlp.down_proj.weight, model.get_input_embeddings().weight):
        for place in ((0, 0), (7, 13), (-1, -1), (3, 31)):
            with torch.no_grad():
                before = weight[place].item()
                weight[place] += 1e-3
            seen.add(fingerprint(model))
            with torch.no_grad():
                weight[place] = before
    assert fingerprint(model) == first and len(seen) == 9
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert fingerprint(model) != first


# --- logits ---

SMALL = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=8.0)),
        (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.0625)),
    ],
)
def test_families_that_scale_their_logits_are_scored_as_they_score_themselves(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    batch = response_batch([[5, 6, 7]], [[9, 10, 2]])
    chances = model(input_ids=batch["input_ids"]).logits.double().log_softmax(-1)
    expected = sum(chances[0, t - 1, batch["input_ids"][0, t]].item() for t in (3, 4, 5))
    assert response_logps(model, batch)[0].item() == pytest.approx(expected, abs=1e-3)
    check_logits(model, [5, 6, 7], "here")


def test_logits_that_are_made_in_an_unknown_way_end_the_run(tiny_model, monkeypatch):
    check_logits(tiny_model, [5, 6, 7], "here")
    real = type(tiny_model).forward

    def scaled(self, *inputs, **named):
        output = real(self, *inputs, **named)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(type(tiny_model), "forward", scaled)
    with pytest.raises(
        InputError, match="here: Qwen2ForCausalLM makes its logits in a way that is not known here: off by"
    ):
        check_logits(tiny_model, [5, 6, 7], "here")
    assert not tiny_model.training


def test_the_head_is_linear_and_nothing_else_where_the_family_has_no_scale(tiny_model):
    states = torch.randn(3, 32)
    assert torch.equal(vocabulary_logits(tiny_model, states), states @ tiny_model.lm_head.weight.T)


# --- tokenizer and chat template ---

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = TEMPLATE.replace(
    "<user>{{ message['content'] }}", "<user>{% for c in message['content'] %}{{ c['text'] }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (CHATML, "ends a reply with '<|im_end|>', which is not a token here"),
        (PARTS, "leaves out what the user says"),
        (TEMPLATE.replace("{{ message['content'] }}</s>", "{{ message['content'] }}")
         .replace("{% if add_generation_prompt %}<assistant>{% endif %}", ""), "writes nothing that starts a reply"),
        ("{{ raise_exception('Only for tools') }}", "the chat template cannot be used (Only for tools)"),
        ("{% for m in messages %}{{ m['content'] }", "the chat template cannot be used"),
        ("{{ messages[0]['text'] }}", "leaves out what the user says"),
        ("", "no chat template"),
    ],
)  # fmt: skip
def test_a_chat_template_that_does_not_fit_is_refused(folder, template, what):
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    assert what in refused(folder)


def test_a_template_from_a_file_takes_the_place_of_a_missing_one(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    assert "--chat_template FILE" in refused(folder)
    (tmp_path / "mine").write_text(TEMPLATE.replace("<user>", "<user>!"), "utf-8")
    _, tokenizer = load_model(folder, chat_template=tmp_path / "mine")
    assert tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "a"))[1] == "<0x21>"  # the ! of the file
    with pytest.raises(InputError, match=r"--chat_template .*none: cannot be read"):
        load_model(folder, chat_template=tmp_path / "none")


def test_a_broken_tokenizer_file_is_one_line(folder):
    for content in (
        "version https://git-lfs.github.com/spec/v1",
        '{"model": {"type": "BPE", "vocab": {}, "merges": [[1]]}}',
    ):
        (folder / "tokenizer.json").write_text(content)
        assert "the tokenizer cannot be loaded" in refused(folder)


def test_no_pad_token_takes_the_end_token_and_none_of_both_is_refused(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer = load_model(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", ""), "utf-8")
    assert "no end token" in refused(folder)


def test_tokens_that_the_model_was_not_resized_for_are_named(folder):
    _, tokenizer = load_model(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<turn>")
    tokenizer.save_pretrained(folder)
    assert "token '<turn>' has the id 3000, but the model has 3000 embeddings" in refused(folder)
    with pytest.raises(InputError, match="rows:7: token '<turn>' has the id 3000"):
        check_ids([[5], [6, 3000]], tokenizer, 3000, "rows:7")
    check_ids([[5], [6, 2999]], tokenizer, 3000, "rows:7")


def test_a_system_text_is_used_where_the_template_has_a_place_for_it_and_refused_where_not(base):
    import copy

    tokenizer = copy.deepcopy(base[1])
    rows = [Row("f:1", {"en": "a b"}, "c"), Row("f:2", {"en": "a b"}, "c", system="d")]
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(ValueError, match="f:2: the chat template has no place for a system text"):
        encode_rows(rows, tokenizer, ("en",), 99)
    tokenizer.chat_template = (
        "{% for message in messages if message['role'] != 'system' %}<user>{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="f:2: the chat template has no place for a system text"):
        encode_rows(rows, tokenizer, ("en",), 99)
    tokenizer.chat_template = TEMPLATE  # writes it, as if somebody else had spoken
    (plain, other), _ = encode_rows(rows, tokenizer, ("en",), 99)
    ids = tokenizer("d", add_special_tokens=False)["input_ids"]
    assert len(other.prompt) > len(plain.prompt) and ids[0] in other.prompt and ids[0] not in plain.prompt


def test_a_template_that_writes_the_date_writes_the_days_that_the_tokenizer_carries(base):
    import copy

    tokenizer = copy.deepcopy(base[1])
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    days = [datetime.date(2024, 7, 26), datetime.date(2024, 7, 27)]
    prompts = []
    for day in days:
        tokenizer.template_date = day
        prompts.append(encode_prompt(tokenizer, "a"))
    assert prompts[0] != prompts[1] and "26 Jul 2024" in tokenizer.decode(prompts[0])


# --- adapters, GGUF, freezing ---


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_folder_of_adapters_is_its_base_model_with_the_adapters_in_its_weights(folder, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.tensor([[5, 6, 7]])
    expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapters")
    _, tokenizer = load_model(folder)
    tokenizer.save_pretrained(tmp_path / "adapters")
    model, _ = load_model(tmp_path / "adapters")
    assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters()) and "merged into it" in capsys.readouterr().out
    change = tmp_path / "adapters/adapter_model.safetensors"
    save_file({k: v for k, v in load_file(change).items() if "layers.1" not in k}, change)
    assert "the adapters do not fit" in refused(tmp_path / "adapters")
    settings = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "gone"}))
    with pytest.raises(InputError, match="--model gone: cannot be loaded"):
        load_model(tmp_path / "adapters")


def test_a_gguf_file_gives_weights_that_can_be_trained_and_saved(folder, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    model, tokenizer = load_model(folder)
    path, config = tmp_path / "tiny.gguf", model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in parts.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for ours, theirs in names.items():
        weight = model.get_parameter(f"{ours}.weight").detach()
        for name, n in heads.items():  # llama.cpp keeps the halves of each head interleaved
            if theirs.endswith(name):
                weight = weight.view(n, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr("mlc_min.machinery.models.AutoTokenizer.from_pretrained", lambda *_, **__: tokenizer)
    loaded, _ = load_model(path)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.allclose(
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, loaded(ids).logits, atol=1e-6
    )
    assert "no such file" in refused(tmp_path / "other.gguf")
    assert f"give the file, --model {path}" in refused(tmp_path)


def test_a_gguf_file_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(tmp_path / "a.gguf")


def test_freezing_everything_leaves_nothing_to_train(tiny_model):
    import copy

    with pytest.raises(InputError, match="--freeze weight,bias: no parameter of the model is left to train"):
        freeze(copy.deepcopy(tiny_model), "weight,bias")
