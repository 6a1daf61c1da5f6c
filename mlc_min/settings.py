"""Settings of one training run. Defaults, then a preset, then a file, then flags: the later one counts.

--preset paper --config mine.yaml --learning_rate 1e-6
"""

import argparse
import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from mlc_min.consistency import FORMS
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.rows import parse_languages
from mlc_min.world.sentences import ALIGNED, EMBEDDED

CHOICES = {
    "preset": ("", "paper"),
    "method": ("sft", "dpo", "simpo", "orpo"),
    "mlc_form": FORMS,
    "consistency": ("mlc", "cosine"),
    "extractor": ("learned", "frozen", "identity"),
    "missing": ("error", "skip", "present"),
    "too_long": ("skip", "error"),
    "dtype": ("float32", "bfloat16"),
    "report_to": ("none", "tensorboard"),
}
# The settings of the official runs; 32 rows an optimizer step were 1 x 4 accumulation x 8 GPUs there.
PAPER = dict(
    method="dpo", beta=0.1, sft_weight=0.0, mlc_weight=0.8, mlc_tau=0.2, mlc_form="official", mlc_layer=-1, mlc_every=2,
    mlc_parts=4, consistency="mlc", extractor="learned", extractor_dim=512, freeze="", learning_rate=6e-7, warmup=0.1,
    weight_decay=0.0, max_grad_norm=1.0, epochs=3.0, batch_size=1, accumulation=32, max_length=1024, dtype="bfloat16",
)  # fmt: skip
PRESETS = {"": {}, "paper": PAPER}


def setting(default, help_text: str):
    return field(default=default, metadata={"help": help_text})


@dataclass
class TrainConfig:
    """Settings of one run. The defaults suit the embedded model; `--preset paper` takes the paper's, in brackets."""

    preset: str = setting("", "paper: the official runs' settings, for real models")
    config: str = setting("", "YAML or JSON file with any of these settings; flags override it")
    # what
    model: str = setting(str(EMBEDDED / "model"), "model folder in Hugging Face format, or Hub id")
    train: str = setting(str(EMBEDDED / "train.jsonl"), "rows, JSONL, a JSON list or CSV")
    output: str = setting("runs/train", "folder for the trained model, the extractor, the log and checkpoints")
    languages: str = setting(",".join(ALIGNED), "the first has the responses; MLC uses all")
    # the alignment loss
    method: str = setting("dpo", "sft, dpo, simpo or orpo [dpo]")
    beta: float = setting(0.1, "β of DPO and ORPO [0.1]")
    simpo_beta: float = setting(2.0, "β of SimPO, which has log-probs per token")
    simpo_gamma: float = setting(1.0, "target margin of SimPO")
    sft_weight: float = setting(1.0, "SFT loss beside DPO or SimPO [0]; a tiny model falls apart without it")
    # the consistency loss
    mlc_weight: float = setting(0.0, "λ [0.8]; 0 is the plain method, bit for bit")
    mlc_tau: float = setting(0.2, "τ, softmax temperature [0.2]")
    mlc_form: str = setting("official", "official or paper [official]")
    mlc_layer: int = setting(-1, "hidden-state entry, -1 the last [-1]")
    mlc_parts: int = setting(1, "passes over the prompts, sorted by length: less padding [4 in --preset paper]")
    mlc_every: int = setting(1, "use the MLC loss on every n-th step only [2]")
    consistency: str = setting("mlc", "mlc, or cosine for the pairwise ablation")
    extractor: str = setting("learned", "learned [yes], frozen or identity")
    extractor_dim: int = setting(512, "d [512]")
    shuffle_translations: bool = setting(False, "control: translations of other prompts")
    harmful_only: bool = setting(False, "control: leave out rows that are not `harmful`")
    # what is trained
    freeze: str = setting("embed_tokens", "comma-separated parts of the names of parameters to keep fixed [none]")
    lora: int = setting(0, "rank of LoRA adapters on all linear layers, by peft; 0 trains the weights themselves")
    lora_alpha: int = setting(0, "α of LoRA; 0: twice the rank")
    # optimisation
    learning_rate: float = setting(1e-4, "peak of a cosine with warm-up [6e-7]")
    warmup: float = setting(0.1, "share of the steps [0.1]")
    weight_decay: float = setting(0.0, "AdamW's [0]")
    max_grad_norm: float = setting(1.0, "gradient clipping [1]")
    steps: int = setting(150, "optimizer steps")
    epochs: float = setting(0.0, "passes over the rows, in place of steps [3]; 0: use steps")
    batch_size: int = setting(16, "rows a forward pass [1]")
    accumulation: int = setting(1, "forward passes an optimizer step [32: 4 x 8 GPUs]")
    # rows
    max_length: int = setting(1024, "of prompt and response, in tokens [1024, cut]")
    too_long: str = setting("skip", "skip: leave longer rows out and count them; error: stop at the first")
    missing: str = setting("error", "rows that lack translations: error, skip, or present: use those they have")
    group_by_length: bool = setting(False, "batches of rows of similar length: less padding, less random an order")
    # the machine
    device: str = setting("auto", "auto, cpu or cuda")
    dtype: str = setting("float32", "of the arithmetic: float32 or bfloat16 [bfloat16]; weights stay float32")
    gradient_checkpointing: bool = setting(False, "less memory, one more forward pass")
    attention: str = setting("", "attention backend of transformers, such as eager or sdpa; empty: its own choice")
    reference_cache: str = setting("runs/reference", "folder of reference log-probs, reused for same model and data")
    # saving and showing
    save_every: int = setting(0, "steps between checkpoints in the output folder; 0: only when stopped")
    resume: bool = setting(False, "continue from the output folder's checkpoint, if any")
    log_every: int = setting(10, "steps between lines of the log")
    report_to: str = setting("none", "none, or tensorboard besides the log")
    seed: int = setting(0, "of the row order, the extractor's start and the shuffling")

    def check(self) -> None:
        """Raise InputError for the first setting that makes no sense."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name} {getattr(self, name)}: choose one of {', '.join(filter(None, allowed))}")
        for name in (
            "mlc_every",
            "mlc_parts",
            "extractor_dim",
            "steps",
            "batch_size",
            "accumulation",
            "max_length",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("beta", "simpo_beta", "mlc_tau", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"--{name} {getattr(self, name)}: must be greater than 0")
        for name in (
            "sft_weight",
            "mlc_weight",
            "weight_decay",
            "warmup",
            "save_every",
            "epochs",
            "lora",
            "lora_alpha",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"--{name} {getattr(self, name)}: must not be negative")
        if len(self.language_list) < 2 and self.mlc_weight:  # reading the list checks it, whatever the weight
            raise InputError(f"--languages {self.languages}: MLC compares at least two")

    @property
    def language_list(self) -> tuple[str, ...]:
        return parse_languages(self.languages)


FIELDS = {item.name: item for item in fields(TrainConfig)}


def parse_settings(description: str, arguments: list[str] | None = None) -> TrainConfig:
    """TrainConfig from the command line, checked. Raises InputError for a bad file or setting."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=None)
    early.add_argument("--config", default="")
    first, _ = early.parse_known_args(arguments)
    from_file = read_settings(first.config) if first.config else {}
    preset = from_file.get("preset", "") if first.preset is None else first.preset
    parser = HfArgumentParser(TrainConfig, description=description, prog="python -m mlc_min.train", allow_abbrev=False)
    parser.set_defaults(**PRESETS.get(preset, {}) | from_file)
    config = TrainConfig(**vars(parser.parse_args(arguments)))
    config.check()
    return config


def read_settings(path: str | Path) -> dict:
    """Settings from a YAML or JSON file: one mapping of names to values, with the types of TrainConfig's fields.

    Raises InputError with file and line, or the name of the setting.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; give an existing YAML or JSON file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or type(error).__name__).split())
        raise InputError(f"{path}{line}: not YAML ({problem}); write one `name: value` a line") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a mapping of settings, one `name: value` a line")
    return {name: _typed(name, value, path) for name, value in values.items()}


def _typed(name, value, path: Path):
    if name not in FIELDS or name == "config":
        raise InputError(f"{path}: there is no setting {name!r}; see python -m mlc_min.train --help")
    kind = type(FIELDS[name].default)
    if kind is float and type(value) in (int, str):  # YAML takes 6e-7, which has no point, for text
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind:
        raise InputError(f"{path}: {name} must be {_KINDS[kind]}, not {value!r:.60}")
    return value


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
assert all(item.default is not MISSING for item in FIELDS.values())
