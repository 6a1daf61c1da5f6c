"""Load a causal language model and its tokenizer from a folder in Hugging Face format."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlc_min.machinery.errors import InputError


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not usable here ({reason}); try --device cpu") from None
    return device


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
):
    """(model, tokenizer) from a folder or Hub id; weights in safetensors only, and no code from the folder is run.

    dtype: of the weights. float32 by default: at learning rates around 1e-6 an update of a bfloat16
    weight rounds to nothing. attention: backend of transformers, such as "eager" or "sdpa"; None: its own choice.
    Raises InputError in one line if there is no such model or backend.
    """
    settings = {"use_safetensors": True, "trust_remote_code": False}
    if attention:
        settings["attn_implementation"] = attention
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InputError(
            f"--model {path}: cannot be loaded ({reason}); give a folder with a model in safetensors and a tokenizer"
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks are made from lengths, never from token values
    return model.to(device), tokenizer


def vocabulary_head(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map from last hidden states to logits, for use at the positions that need them only."""
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    output = model.get_output_embeddings()

    def head(hidden_states: torch.Tensor) -> torch.Tensor:
        logits = output(hidden_states)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    return head


def freeze(model, names: str) -> list[str]:
    """Stop training of each parameter whose name contains one of the comma-separated `names`; returns those frozen.

    Raises InputError for a name that matches nothing.
    """
    frozen = []
    for part in filter(None, (n.strip() for n in names.split(","))):
        matched = [(name, p) for name, p in model.named_parameters() if part in name]
        if not matched:
            raise InputError(f"--freeze {part}: no parameter has this in its name; see model.named_parameters()")
        for name, parameter in matched:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


@torch.no_grad()
def fingerprint(model) -> str:
    """Sixteen hex digits that change when the weights do: a hash of about 64 values from each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def add_adapters(model, rank: int, alpha: int):
    """The model with LoRA adapters of peft on all its linear layers but the head; only these are trained.

    alpha: 0 is twice the rank. Their start is a product with zeros, so the model is the same as without.
    Raises InputError if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora: needs peft; run `pip install peft`, or leave --lora out") from None
    settings = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def without_dropout(model) -> None:
    """Put the model into training mode, which gradient checkpointing needs, with every dropout at 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.train()
