"""Load a causal language model and its tokenizer, and see that the two belong together before anything is trained."""

import datetime
import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mlc_min.consistency import mlc_loss
from mlc_min.examples import encode_prompt, end_of_turn
from mlc_min.machinery.errors import InputError, first_line, refusing
from mlc_min.machinery.files import shipped
from mlc_min.states import vocabulary_logits


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises InputError for a device that is not there, and for one
    where PyTorch cannot do what the loss needs, as on some versions' mps."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with refusing(f"--device {name}: not usable here (…); try --device cpu", RuntimeError, AssertionError):
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "mps":
            check_singular_values(device)
    return device


def check_singular_values(device: torch.device) -> None:
    """Raises RuntimeError unless the loss of nearly collinear rows has the gradient there that it has on the CPU: torch
    2.14 decomposes such batches wrongly on mps (issue 196112 of pytorch)."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 1, 64, generator=draw) + 1e-3 * torch.randn(16, 10, 64, generator=draw)
    gradients = []
    for place in ("cpu", device):
        x = rows.to(place).requires_grad_()
        gradients.append(torch.autograd.grad(mlc_loss(x), x)[0].cpu())
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    if not error < 0.1:
        raise RuntimeError(f"torch {torch.__version__} has wrong gradients of singular values there, by {error:.0%}")


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    attention: str | None = None, chat_template: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # fmt: skip
    """(model, tokenizer) from a folder or Hub id, weights in safetensors only, or from a .gguf file; no code from the
    folder is run. A folder of LoRA adapters gives its base model with the adapters merged into it.

    dtype: of the weights. float32 by default: at learning rates around 1e-6 an update of a bfloat16
    weight rounds to nothing. attention: backend of transformers, such as "eager" or "sdpa"; None: its own choice.
    chat_template: a file with the template, in place of the tokenizer's own.
    Raises InputError in one line if there is no such model or backend, if weights and configuration do not belong
    together, or tokenizer, chat template and embeddings.
    """
    place, given, options = f"--model {path}", shipped(path), {}
    if given.suffix == ".gguf":
        if not given.is_file():
            raise InputError(f"{place}: no such file")
        path, options = given.parent, {"gguf_file": given.name}
        with refusing(f"{place}: needs the package gguf; run `pip install gguf`", ImportError):
            import gguf  # noqa: F401  (transformers reads the file with it)
    with refusing(f"{place}: the tokenizer cannot be loaded (…)"):  # whose errors are of any kind
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    if chat_template:
        with refusing(f"--chat_template {chat_template}: cannot be read (…)", OSError, UnicodeDecodeError):
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    load = merged_adapters if is_adapter_folder(given) else load_weights
    model = load(path, dtype, attention, **options)
    tokenizer.template_date = datetime.date.today()
    check_tokenizer(tokenizer, model, place)
    return model.to(device).eval(), tokenizer


def load_weights(path: str | Path, dtype: torch.dtype, attention: str | None, **options) -> PreTrainedModel:
    """The model alone. Raises InputError if a weight is missing in the files, has another shape, or has no place in the
    model: transformers fills in random numbers, or leaves weights out, and only warns."""
    place = f"--model {Path(path) / options['gguf_file'] if options else path}"
    advice = "give a folder with a model in safetensors and a tokenizer"
    if not options and Path(path).is_dir() and (found := sorted(Path(path).glob("*.gguf"))):
        advice = f"give the file, --model {found[0]}"
    if attention:
        options["attn_implementation"] = attention
    with refusing(f"{place}: cannot be loaded (…); {advice}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **options
        )
    faults = {"missing_keys": "is not among the weights", "mismatched_keys": "has another shape than config.json says"}
    faults["unexpected_keys"] = "has no place in the model that config.json describes"
    for kind, meaning in faults.items():
        if report.get(kind):
            first, *others = sorted(map(str, report[kind]))
            more = f", nor {len(others)} others" if others else ""
            raise InputError(f"{place}: {first} {meaning}{more}; config.json and weights do not belong together")
    if report.get("error_msgs"):
        raise InputError(f"{place}: cannot be loaded ({first_line(report['error_msgs'][0])}); {advice}")
    if "gguf_file" in options:  # else it counts as quantised, which cannot be saved
        del model.config.quantization_config
        fresh = type(model)(model.config).to(dtype)
        fresh.load_state_dict(model.state_dict())
        model = fresh
    return model


def is_adapter_folder(path: str | Path) -> bool:
    """Whether the folder holds adapters of peft in place of a model."""
    return (Path(path) / "adapter_config.json").is_file()


def merged_adapters(path: str | Path, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """The base model that a folder of LoRA adapters names, with the adapters added to its weights: so it trains like
    any other, and new adapters do not take the place of these."""
    with refusing(f"--model {path}: holds LoRA adapters, which need peft; run `pip install peft`", ImportError):
        from peft import PeftConfig, PeftModel
    with refusing(f"--model {path}: adapter_config.json cannot be read (…)"):
        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    model = load_weights(base, dtype, attention)
    print(f"{path}: LoRA adapters of {base}, merged into it")
    with refusing(f"--model {path}: the adapters do not fit {base} (…)"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")  # missing or unexpected ones
        merged = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
        return merged.requires_grad_(True)  # peft has frozen it


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, place: str) -> None:
    """Give the tokenizer a pad token, and raise InputError in one line if chat template, tokenizer and embeddings do
    not belong together. Each of these has trained models on nonsense without a word."""
    if not tokenizer.chat_template:
        advice = "use an instruction-tuned model, or give one with --chat_template FILE"
        raise InputError(f"{place}: the tokenizer has no chat template; {advice}")
    texts = ("How do I mend it?", "Tell me more about trees")
    with refusing(f"{place}: the chat template cannot be used (…); see --chat_template"):  # errors of any kind
        prompts = [encode_prompt(tokenizer, text) for text in texts]
        end = end_of_turn(tokenizer)
    for text, ids in zip(texts, prompts, strict=True):
        shown = "".join(tokenizer.decode(ids).split())  # decoding may add blanks, and a tokenizer small letters
        if "".join(text.split()).casefold() not in shown.casefold():
            raise InputError(f"{place}: the chat template leaves out what the user says; it gives {shown[:60]!r}")
    if prompts[0][-1] != prompts[1][-1]:
        fault = "the chat template writes nothing that starts a reply (add_generation_prompt)"
        raise InputError(f"{place}: {fault}, so that prompts have no last token in common")
    if tokenizer.pad_token_id is None:  # its value is harmless: masks are made from lengths, never from token values
        tokenizer.pad_token_id = end
    rows = model.get_input_embeddings().weight.shape[0]
    check_ids([*prompts, [end], [tokenizer.pad_token_id]], tokenizer, rows, place)


def check_ids(sequences: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase, rows: int, place: str) -> None:
    """Raises InputError for the first token id that the embeddings, of so many rows, do not have."""
    for ids in sequences:
        if max(ids) >= rows:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            fault = f"token {token!r} has the id {max(ids)}, but the model has {rows} embeddings"
            raise InputError(f"{place}: {fault}; take the model's own tokenizer, or resize the model for its tokens")


@torch.no_grad()
def check_logits(model: PreTrainedModel, input_ids: list[int], place: str) -> None:
    """Raises InputError unless `vocabulary_logits` gives the model's own logits, on one prompt. A model that scales its
    logits in a way unknown there would otherwise be trained on wrong log-probs without a word."""
    was_training, ids = model.training, torch.tensor([input_ids], device=model.device)
    model.eval()  # dropout would make a difference of its own
    ours = vocabulary_logits(model, model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state).float()
    own = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    difference, size = (ours - own).abs().max().item(), own.abs().max().item()
    if not difference <= 1e-2 * size:
        how = f"{type(model).__name__} makes its logits in a way that is not known here"
        raise InputError(f"{place}: {how}: off by {difference:.3g} of {size:.3g}")


def freeze(model: PreTrainedModel, names: str) -> list[str]:
    """Stop training of each parameter whose name contains one of the comma-separated `names`; returns those frozen.

    Raises InputError for a name that matches nothing, and if nothing is left to train.
    """
    frozen = []
    for part in filter(None, (n.strip() for n in names.split(","))):
        matched = [(name, p) for name, p in model.named_parameters() if part in name]
        if not matched:
            raise InputError(f"--freeze {part}: no parameter has this in its name; see model.named_parameters()")
        for name, parameter in matched:
            parameter.requires_grad_(False)
            frozen.append(name)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"--freeze {names}: no parameter of the model is left to train")
    return frozen


def digest(values: Iterable) -> str:
    """Sixteen hex digits that change when any of these values does, which JSON must be able to write."""
    whole = hashlib.sha256()
    for value in values:
        whole.update(json.dumps(value).encode())
    return whole.hexdigest()[:16]


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits that change when the model does: a hash of its configuration and of every byte of its weights
    and buffers (of those that are trained and those that are not)."""
    settings = model.config.to_diff_dict().items()
    config = {name: v for name, v in settings if name not in ("_name_or_path", "transformers_version")}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for row in tensor.detach().reshape(-1).split(2**24):  # in parts, so that a GPU's weights are not copied at once
            whole.update(row.cpu().contiguous().view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def add_adapters(model: PreTrainedModel, rank: int, alpha: int):
    """The model with LoRA adapters of peft on all its linear layers but the head; only these are trained.

    alpha: 0 is twice the rank. B starts at zero, so the adapted model equals the base model.
    Raises InputError if peft is not installed.
    """
    with refusing("--lora: needs peft; run `pip install peft`, or leave --lora out", ImportError):
        from peft import LoraConfig, get_peft_model
    settings = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute activations again in the backward pass in place of keeping them; that needs training mode, so every
    dropout is put to 0."""
    # transformers renamed the method in 5.21.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.train()
