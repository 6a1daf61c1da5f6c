"""Settings of one training run. A preset, then a file, then flags: the later one counts.

--preset paper --config mine.yaml --learning_rate 1e-6
"""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

import yaml

from mlc_min.machinery.errors import SWITCH, Help, InputError
from mlc_min.machinery.files import EMBEDDED
from mlc_min.machinery.rows import parse_languages

# The settings of the official runs; 32 rows an optimizer step were 1 x 4 accumulation x 8 GPUs there.
PAPER = dict(
    method="dpo", beta=0.1, sft_weight=0.0, mlc_weight=0.8, mlc_tau=0.2, mlc_form="official", mlc_layer=-1, mlc_every=2,
    mlc_parts=4, consistency="mlc", extractor="learned", extractor_dim=512, freeze="", learning_rate=6e-7, warmup=0.1,
    weight_decay=0.0, max_grad_norm=1.0, epochs=3.0, batch_size=1, accumulation=32, max_length=1024, dtype="auto",
)  # fmt: skip
# The defaults below and the MLC loss of the main job: for the embedded model, which is too small for the paper's.
PRESETS = {"embedded": dict(mlc_weight=6.0, mlc_tau=0.5, mlc_layer=3), "paper": PAPER}


def setting(default, help_text: str, above=None, least=None, most=None, unit: str = ""):
    """A field with its reason and its bounds: greater than `above`, at least `least`, at most `most`, all in `unit`."""
    bounds = {"above": above, "least": least, "most": most, "unit": unit}
    return field(default=default, metadata={"help": help_text, "bounds": bounds})


@dataclass
class TrainConfig:
    """Settings of one run. The defaults suit the embedded model; `--preset paper` takes the paper's, in brackets."""

    preset: Literal["", "embedded", "paper"] = setting(
        "", "paper: the official runs' settings; embedded: those of the small model; empty: embedded without --model "
        "and --train, else paper",
    )  # fmt: skip
    config: str = setting("", "YAML or JSON file with any of these settings; flags override it")
    # what
    model: str = setting(str(EMBEDDED / "model"), "folder in Hugging Face format, Hub id, or .gguf file")
    chat_template: str = setting("", "file with the chat template, for a model that has none")
    train: str = setting(str(EMBEDDED / "train.jsonl"), "rows, JSONL, a JSON list or CSV")
    output: str = setting("runs/train", "folder for the trained model, the extractor, the log and checkpoints")
    languages: str = setting("en,zh,ru,ja,ar,bn,sw,ur,ps,ku", "the first has the responses; MLC uses all")
    # the alignment loss
    method: Literal["sft", "dpo", "simpo", "orpo"] = setting("dpo", "sft, dpo, simpo or orpo [dpo]")
    beta: float = setting(0.1, "β of DPO and ORPO [0.1]", above=0, most=100, unit="a factor")
    simpo_beta: float = setting(2.0, "β of SimPO, which has log-probs per token", above=0, most=100, unit="a factor")
    simpo_gamma: float = setting(1.0, "target margin of SimPO", least=-100, most=100, unit="in β · log-probs per token")
    sft_weight: float = setting(
        1.0, "SFT loss beside DPO or SimPO [0]; a tiny model frays without it", least=0, most=1000, unit="a factor"
    )
    # the consistency loss
    mlc_weight: float = setting(
        0.0, "λ [0.8; 6 in --preset embedded]; 0 is the plain method, bit for bit", least=0, most=1e4, unit="a factor"
    )
    mlc_tau: float = setting(0.2, "τ, softmax temperature [0.2]", least=1e-3, most=1000, unit="in singular values")
    mlc_form: Literal["official", "paper"] = setting("official", "official or paper [official]")
    mlc_layer: int = setting(-1, "hidden-state entry, -1 the last [-1]", least=-10_000, most=10_000, unit="a layer")
    mlc_parts: int = setting(
        1, "passes over the prompts, sorted by length: less padding [4 in --preset paper]",
        least=1, most=1000, unit="passes",
    )  # fmt: skip
    mlc_every: int = setting(1, "use the MLC loss on every n-th step only [2]", least=1, most=10**6, unit="steps")
    consistency: Literal["mlc", "cosine"] = setting("mlc", "mlc, or cosine for the pairwise ablation")
    separate_weight: float = setting(
        0.0, "not in the paper: times λ, keeps different prompts apart, as in PMRL", least=0, most=1e4, unit="a factor"
    )
    center_languages: Literal["no", "batch", "running"] = setting(
        "no", "not in the paper: take the mean state of each language away before the extractor"
    )
    extractor: Literal["learned", "frozen", "identity"] = setting("learned", "learned [yes], frozen or identity")
    extractor_dim: int = setting(512, "d [512]", least=1, most=10**6, unit="dimensions")
    shuffle_translations: bool = setting(False, "control: translations of other prompts")
    harmful_only: bool = setting(False, "control: leave out rows that are not `harmful`")
    # what is trained
    freeze: str = setting("embed_tokens", "comma-separated parts of the names of parameters to keep fixed [none]")
    lora: int = setting(
        0, "rank of LoRA adapters on all linear layers, by peft; 0 trains the weights themselves",
        least=0, most=10_000, unit="a rank",
    )  # fmt: skip
    lora_alpha: int = setting(0, "α of LoRA; 0: twice the rank", least=0, most=10**6, unit="a factor")
    # optimisation
    learning_rate: float = setting(1e-4, "peak of a cosine with warm-up [6e-7]", above=0, most=1, unit="a rate")
    warmup: float = setting(0.1, "share of the steps [0.1]", least=0, most=1, unit="a share of the steps, not a number")
    weight_decay: float = setting(0.0, "AdamW's [0]", least=0, most=10, unit="a rate")
    max_grad_norm: float = setting(1.0, "gradient clipping [1]", above=0, most=1e9, unit="a norm")
    steps: int = setting(150, "optimizer steps", least=1, most=10**9, unit="steps")
    epochs: float = setting(
        0.0, "passes over the rows, in place of steps [3]; 0: use steps", least=0, most=1e6, unit="passes"
    )
    batch_size: int = setting(16, "rows a forward pass [1]", least=1, most=10**6, unit="rows")
    accumulation: int = setting(
        1, "forward passes an optimizer step [32: 4 x 8 GPUs]", least=1, most=10**6, unit="passes"
    )
    # rows
    max_length: int = setting(1024, "of prompt and response, in tokens [1024, cut]", least=1, most=10**7, unit="tokens")
    too_long: Literal["skip", "error"] = setting(
        "skip", "skip: leave longer rows out and count them; error: stop at the first"
    )
    missing: Literal["error", "skip", "present"] = setting(
        "error", "rows that lack a translation or a response: error, skip, or present: use the translations they have"
    )
    group_by_length: bool = setting(False, "batches of rows of similar length: less padding, less random an order")
    # the machine
    device: str = setting("auto", "auto, cpu or cuda")
    dtype: Literal["float32", "bfloat16", "auto"] = setting(
        "float32", "of the arithmetic [bfloat16]; auto, in --preset paper: bfloat16 on a GPU, float32 on a CPU, where "
        "bfloat16 is slower; weights stay float32",
    )  # fmt: skip
    gradient_checkpointing: bool = setting(False, "less memory, one more forward pass")
    attention: str = setting("", "attention backend of transformers, such as eager or sdpa; empty: its own choice")
    reference_cache: str = setting("runs/reference", "folder of reference log-probs, reused for same model and data")
    # saving and showing
    save_every: int = setting(
        0, "steps between checkpoints in the output folder; 0: only when stopped, and until the model is saved",
        least=0, most=10**9, unit="steps",
    )  # fmt: skip
    resume: bool = setting(False, "continue from the output folder's checkpoint, if any")
    log_every: int = setting(10, "steps between lines of the log", least=1, most=10**9, unit="steps")
    report_to: Literal["none", "tensorboard"] = setting("none", "none, or tensorboard besides the log")
    seed: int = setting(
        0, "of the row order, the extractor's start and the shuffling", least=0, most=2**63 - 1, unit="a number"
    )

    def check(self) -> None:
        """Raise InputError for the first setting that makes no sense."""
        for name, item in FIELDS.items():
            value, bounds = getattr(self, name), item.metadata["bounds"]
            choices, above, least, most = get_args(item.type), *(bounds[key] for key in ("above", "least", "most"))
            if choices and value not in choices:
                raise InputError(f"--{name} {value}: choose one of {', '.join(filter(None, choices))}")
            if most is None:
                continue
            if not value <= most or (least is not None and value < least) or (above is not None and value <= above):
                low = f"greater than {above:g}" if least is None else f"at least {least:g}"
                raise InputError(f"--{name} {value}: must be {low} and at most {most:g} ({bounds['unit']})")
        if len(self.language_list) < 2 and self.mlc_weight:  # reading the list checks it, whatever the weight
            raise InputError(f"--languages {self.languages}: MLC compares at least two; add others, or --mlc_weight 0")

    @property
    def language_list(self) -> tuple[str, ...]:
        return parse_languages(self.languages)

    def described(self) -> str:
        """The first line of a run: which preset, whether MLC is in it, and which settings differ from the preset."""
        usual = {name: item.default for name, item in FIELDS.items()} | PRESETS.get(self.preset, {})
        other = [
            f"{name} {getattr(self, name)} (not {usual[name]})"
            for name in FIELDS
            if name not in NOT_METHOD and getattr(self, name) != usual[name]
        ]
        mlc = f"{self.consistency.upper()} λ {self.mlc_weight:g}" if self.mlc_weight else "no MLC (--mlc_weight 0)"
        changes = "; ".join(other) or "nothing"
        return f"preset {self.preset or 'none'}: {self.method.upper()}, {mlc}; what differs from the preset: {changes}"


FIELDS = {item.name: item for item in fields(TrainConfig)}
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
# Where things lie and what is shown: no part of a recipe.
NOT_METHOD = {"preset", "config", "model", "train", "output", "device", "reference_cache", "resume", "log_every",
              "report_to", "save_every", "chat_template"}  # fmt: skip


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
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
        else:
            values, top = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
            if isinstance(values, dict):
                _unique([(key.value, None) for key, _ in top.value], path)
    except InputError:
        raise
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


def _unique(pairs: list[tuple], path: Path) -> dict:
    """The pairs as a dictionary; raises InputError for a name that comes twice, of which the last would win."""
    names = [str(name) for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: {name!r:.60} comes twice; keep one of them")
    return dict(pairs)


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
