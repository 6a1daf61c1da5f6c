"""Settings of one training run. A preset, then a file, then flags: the later one counts.

--preset paper --config mine.yaml --learning_rate 1e-6
"""

import argparse
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

import yaml

from mlc_min.machinery.errors import SWITCH, Help, InputError, first_line, refusing
from mlc_min.machinery.files import EMBEDDED
from mlc_min.machinery.rows import parse_languages, text_lines, unique

# The settings of the official runs; 32 rows an optimizer step were 1 x 4 accumulation x 8 GPUs there.
PAPER = dict(
    method="dpo", beta=0.1, sft_weight=0.0, mlc_weight=0.8, mlc_tau=0.2, mlc_form="official", mlc_layer=-1, mlc_every=2,
    mlc_parts=2, consistency="mlc", extractor="learned", extractor_dim=512, freeze="", learning_rate=6e-7, warmup=0.1,
    weight_decay=0.0, max_grad_norm=1.0, epochs=3.0, batch_size=1, accumulation=32, max_length=1024, dtype="auto",
)  # fmt: skip
# The defaults below and the MLC loss of the main job: for the embedded model, which is too small for the paper's.
PRESETS = {"embedded": dict(mlc_weight=6.0, mlc_tau=0.5, mlc_layer=3), "paper": PAPER}


def setting(default, help_text: str, bounds: str = ""):
    """A field with its reason and, for a number, its bounds and their unit: "(0, 100] m" is above 0, at most 100."""
    return field(default=default, metadata={"help": help_text, "bounds": bounds})


@dataclass
class TrainConfig:
    """Settings of one run. The defaults suit the embedded model; `--preset paper` takes the paper's, in brackets."""

    # fmt: off
    preset: Literal["", "embedded", "paper"] = setting(
        "", "paper: the official runs' settings; embedded: those of the small model; empty: embedded without --model "
        "and --train, else paper")
    config: str = setting("", "YAML or JSON file with any of these settings; flags override it")
    # what
    model: str = setting(str(EMBEDDED / "model"), "folder in Hugging Face format, Hub id, or .gguf file")
    chat_template: str = setting("", "file with the chat template, for a model that has none")
    train: str = setting(str(EMBEDDED / "train.jsonl"), "rows, JSONL, a JSON list or CSV")
    output: str = setting("runs/train", "folder for the trained model, the extractor, the log and checkpoints")
    languages: str = setting("en,zh,ru,ja,ar,bn,sw,ur,ps,ku", "the first has the responses; MLC uses all")
    # the alignment loss
    method: Literal["sft", "dpo", "simpo", "orpo"] = setting("dpo", "sft, dpo, simpo or orpo [dpo]")
    beta: float = setting(0.1, "β of DPO and ORPO [0.1]", "(0, 100] a factor")
    simpo_beta: float = setting(2.0, "β of SimPO, which has log-probs per token", "(0, 100] a factor")
    simpo_gamma: float = setting(1.0, "target margin of SimPO", "[-100, 100] in β · log-probs per token")
    sft_weight: float = setting(1.0, "SFT loss beside DPO or SimPO [0]; a tiny model needs it", "[0, 1000] a factor")
    # the consistency loss
    mlc_weight: float = setting(0.0, "λ [0.8; embedded: 6]; 0 is the plain method, bit for bit", "[0, 10000] a factor")
    mlc_tau: float = setting(0.2, "τ, softmax temperature [0.2]", "[0.001, 1000] in singular values")
    mlc_form: Literal["official", "paper"] = setting("official", "official or paper [official]")
    mlc_layer: int = setting(-1, "hidden-state entry, -1 the last [-1]", "[-10000, 10000] a layer")
    mlc_parts: int = setting(1, "passes over the prompts, sorted by length: less padding [2]", "[1, 1000] passes")
    mlc_every: int = setting(1, "use the MLC loss on every n-th step only [2]", "[1, 1e6] steps")
    consistency: Literal["mlc", "cosine"] = setting("mlc", "mlc, or cosine for the pairwise ablation")
    separate_weight: float = setting(0.0, "not in the paper: λ times this keeps prompts apart", "[0, 10000] a factor")
    center_languages: Literal["no", "batch", "running"] = setting(
        "no", "not in the paper: take the mean state of each language away before the extractor")
    extractor: Literal["learned", "frozen", "identity"] = setting("learned", "learned [yes], frozen or identity")
    extractor_dim: int = setting(512, "d [512]", "[1, 1e6] dimensions")
    shuffle_translations: bool = setting(False, "control: translations of other prompts")
    harmful_only: bool = setting(False, "control: leave out rows that are not `harmful`")
    # what is trained
    freeze: str = setting("embed_tokens", "comma-separated parts of the names of parameters to keep fixed [none]")
    lora: int = setting(0, "rank of peft's LoRA on all linear layers; 0 trains the weights", "[0, 10000] a rank")
    lora_alpha: int = setting(0, "α of LoRA; 0: twice the rank", "[0, 1e6] a factor")
    # optimisation
    learning_rate: float = setting(1e-4, "peak of a cosine with warm-up [6e-7]", "(0, 1] a rate")
    warmup: float = setting(0.1, "share of the steps [0.1]", "[0, 1] a share of the steps, not a number")
    weight_decay: float = setting(0.0, "AdamW's [0]", "[0, 10] a rate")
    max_grad_norm: float = setting(1.0, "gradient clipping [1]", "(0, 1e9] a norm")
    steps: int = setting(150, "optimizer steps", "[1, 1e9] steps")
    epochs: float = setting(0.0, "passes over the rows, in place of steps [3]; 0: use steps", "[0, 1e6] passes")
    batch_size: int = setting(16, "rows a forward pass [1]", "[1, 1e6] rows")
    accumulation: int = setting(1, "forward passes an optimizer step [32: 4 x 8 GPUs]", "[1, 1e6] passes")
    # rows
    max_length: int = setting(1024, "of prompt and response, in tokens [1024, cut]", "[1, 1e7] tokens")
    too_long: Literal["skip", "error"] = setting("skip", "skip longer rows and count them, or error: stop at the first")
    missing: Literal["error", "skip", "present"] = setting(
        "error", "rows that lack a translation or a response: error, skip, or present: use the translations they have")
    group_by_length: bool = setting(False, "batches of rows of similar length: less padding, less random an order")
    # the machine
    device: str = setting("auto", "auto (cuda, else cpu), cpu, cuda or mps")
    dtype: Literal["float32", "bfloat16", "auto"] = setting(
        "float32", "of the arithmetic [bfloat16]; auto, in --preset paper: bfloat16 on a GPU, float32 on a CPU, where "
        "bfloat16 is slower; weights stay float32. With that preset float32 on CUDA multiplies matrices in TF32")
    gradient_checkpointing: bool = setting(False, "less memory, one more forward pass")
    attention: str = setting("", "attention backend of transformers, such as eager or sdpa; empty: its own choice")
    reference_cache: str = setting("runs/reference", "folder of reference log-probs, reused for same model and data")
    # saving and showing
    save_every: int = setting(
        0, "steps between checkpoints; 0: only when stopped, and until the model is saved", "[0, 1e9] steps")
    resume: bool = setting(False, "continue from the output folder's checkpoint, if any")
    log_every: int = setting(10, "steps between lines of the log", "[1, 1e9] steps")
    report_to: Literal["none", "tensorboard"] = setting("none", "none, or tensorboard besides the log")
    seed: int = setting(0, "of the row order, the extractor's start and the shuffling", "[0, 9e18] a number")
    # fmt: on

    def check(self) -> None:
        """Raise InputError for the first setting that makes no sense."""
        for name, item in FIELDS.items():
            value, choices, bounds = getattr(self, name), get_args(item.type), item.metadata["bounds"]
            if choices and value not in choices:
                raise InputError(f"--{name} {value}: choose one of {', '.join(filter(None, choices))}")
            if bounds:
                low, most, unit = re.fullmatch(r"[(\[](\S+), (\S+)\] (.+)", bounds).groups()
                is_open = bounds.startswith("(")
                if not float(low) <= value <= float(most) or (is_open and value == float(low)):
                    low = f"greater than {low}" if is_open else f"at least {low}"
                    raise InputError(f"--{name} {value}: must be {low} and at most {most} ({unit})")
        if len(self.language_list) < 2 and self.mlc_weight:  # reading the list checks it, whatever the weight
            raise InputError(f"--languages {self.languages}: MLC compares at least two; add others, or --mlc_weight 0")

    @property
    def language_list(self) -> tuple[str, ...]:
        return parse_languages(self.languages)

    def described(self) -> str:
        """The first line of a run: which preset, whether MLC is in it, and which settings differ from the preset."""
        usual = {name: item.default for name, item in FIELDS.items()} | PRESETS.get(self.preset, {})
        fixed = FREE_SETTINGS | {"model", "train", "chat_template"}  # no part of a recipe
        changed = [name for name in FIELDS if name not in fixed and getattr(self, name) != usual[name]]
        other = [f"{name} {getattr(self, name)} (not {usual[name]})" for name in changed]
        mlc = f"{self.consistency.upper()} λ {self.mlc_weight:g}" if self.mlc_weight else "no MLC (--mlc_weight 0)"
        changes = "; ".join(other) or "nothing"
        return f"preset {self.preset or 'none'}: {self.method.upper()}, {mlc}; what differs from the preset: {changes}"


FIELDS = {item.name: item for item in fields(TrainConfig)}
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
# Where things lie and what is shown: none of these touches the arithmetic, and a resumed run may change them.
FREE_SETTINGS = {"preset", "config", "output", "device", "reference_cache", "resume", "log_every", "report_to",
                 "save_every"}  # fmt: skip


def parse_settings(description: str, arguments: list[str] | None = None) -> TrainConfig:
    """TrainConfig from the command line, checked. Raises InputError for a bad file or setting."""
    parser = argparse.ArgumentParser(
        prog="python -m mlc_min.train", description=description, formatter_class=Help, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    for name, item in FIELDS.items():
        kind = type(item.default)
        choices = "|".join(filter(None, get_args(item.type)))
        how = SWITCH if kind is bool else {"type": kind, "metavar": choices or kind.__name__}
        text = item.metadata["help"].replace("%", "%%")
        default = "" if item.default == "" else f" (default: {item.default})"
        parser.add_argument(f"--{name}", **how, help=text + default)
    flags = vars(parser.parse_args(arguments))
    given = (read_settings(flags["config"]) if flags.get("config") else {}) | flags
    # The small model's learning rate and frozen embeddings are no settings for anybody else's model or rows.
    preset = given.get("preset") or ("paper" if {"model", "train"} & set(given) else "embedded")
    chosen = PRESETS.get(preset, {}) | given | {"preset": preset}
    if any("steps" in level and "epochs" not in level for level in (flags, given)):
        chosen["epochs"] = 0.0  # else those of the preset, or of the file, would override the steps
    config = TrainConfig(**chosen)
    config.check()
    return config


def read_settings(path: str | Path) -> dict:
    """Settings from a YAML or JSON file: one mapping of names to values, with the types of TrainConfig's fields.

    Raises InputError with file and line, or the name of the setting.
    """
    path = Path(path)
    with refusing(f"--config {path}: …; give an existing YAML or JSON file", OSError):
        text = "".join(line for _, line in text_lines(path))
    try:
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=unique)
        else:
            values, top = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
            if isinstance(values, dict):
                unique([(str(key.value), value.value) for key, value in top.value])
    except InputError as error:
        raise InputError(f"{path}: {error}; keep one of them") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = first_line(getattr(error, "problem", None) or type(error).__name__)
        raise InputError(f"{path}{line}: not YAML ({problem}); write one `name: value` a line") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a mapping of settings, one `name: value` a line")
    return {name: _typed(name, value, path) for name, value in values.items()}


def _typed(name, value, path: Path):
    if name not in FIELDS or name == "config":
        raise InputError(f"{path}: there is no setting {name!r}; see python -m mlc_min.train --help")
    kind = type(FIELDS[name].default)
    if kind is float and type(value) in (int, str):  # YAML takes 6e-7, which has no point, for text
        with suppress(ValueError, OverflowError):
            return float(value)
    if type(value) is not kind:
        raise InputError(f"{path}: {name} must be {_KINDS[kind]}, not {value!r:.60}")
    return value
