"""What a finished run leaves: a model folder that every other tool loads, and a card that says how it was made, and,
once it has been evaluated, what was found."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.evaluation.records import read_object
from mlc_min.evaluation.report import FIGURES
from mlc_min.machinery import log
from mlc_min.machinery.errors import InputError, first_line, refusing
from mlc_min.machinery.files import save_folder, write_atomically
from mlc_min.machinery.settings import TrainConfig


def record_of(config: TrainConfig, device: torch.device, rows: dict) -> dict:
    """The resolved settings, what became of the rows, and what it ran on."""
    return {
        "settings": asdict(config),
        "rows": rows,
        "versions": log.versions(),
        "git_commit": log.git_commit(),
        "hardware": log.hardware(device),
    }


def save_run(
    config: TrainConfig, model: PreTrainedModel, tokenizer: Tokenizer, extractor: nn.Module, record: dict,
    history: list[dict],
) -> None:  # fmt: skip
    """Write the `model` folder of the run, whole or not at all: weights in safetensors (with LoRA: the adapters in
    peft's format), tokenizer, `extractor.safetensors`, `train_config.json` (`record`) and README.md.

    Raises InputError if that fails, a full disk for instance; the line says whether a checkpoint holds the weights."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if config.mlc_weight and extractor.state_dict():
            save_file(extractor.state_dict(), folder / "extractor.safetensors")
        (folder / "train_config.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(config, record, history), encoding="utf-8")

    output = Path(config.output)
    try:
        save_folder(output / "model", write)
    except Exception as error:  # safetensors and tokenizers have errors of their own
        checkpoint = output / "checkpoint.pt"
        kept = f"{checkpoint} has the weights: make room, and the same command with --resume true saves them"
        if not checkpoint.exists():
            kept = "the trained weights are lost: there was no room for a checkpoint either"
        raise InputError(f"{output}/model: cannot be saved ({first_line(error)}); {kept}") from None


def model_card(config: TrainConfig, record: dict, history: list[dict]) -> str:
    """README.md of the model: how it was made, how to load it, and what is not known about it."""
    consistency = f" + {config.mlc_weight:g} x {config.consistency.upper()}" if config.mlc_weight else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    library, load, note = "transformers", "AutoModelForCausalLM", ""
    if record["settings"]["lora"]:  # 0 there, whatever the flag says, if the adapters have been merged
        library, load, note = "peft", "AutoPeftModelForCausalLM", "  # from peft"
    last = {name: value for metrics in history for name, value in metrics.items()}
    shown = ("align_loss", "accuracy", "margin", "mlc_floor", "mlc_loss", "mlc_ceiling", "mlc_shuffled", "retrieval")
    figures = "\n".join(f"| {name} | {last[name]:.4g} |" for name in shown if name in last)
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in record["settings"].items() if value != "")
    return f"""---
library_name: {library}
---

# {Path(config.model).name}, aligned with {config.method.upper()}{consistency}

Made by mlc_min from `{config.model}` on {record["rows"]["used"]} rows of `{config.train}`, in {config.steps} steps.
Commit {record["git_commit"]}; {versions}; {record["hardware"]}.

```python
model = {load}.from_pretrained("{config.output}/model"){note}
```

`extractor.safetensors`, where there is one, is the linear map of the MLC loss; the model does not need it.
No safety has been measured by making it: `python -m mlc_min.safety --model {config.output}/model --test …` does that.

| last logged step | |
|---|---|
{figures}

| setting | |
|---|---|
{settings}
"""


def add_results(output: Path, summary: dict, judges: list[str]) -> Path | None:
    """Write the figures of an evaluation (`metrics.summarize`, in percent) into the card of the model that it is of,
    as the Hub's `model-index`, in place of those of the same test set. Returns the card's path.

    None, and nothing is written, unless the model is of `mlc_min.train`, in a folder beside `output` or in it, and has
    not been trained anew since its replies were generated. Raises InputError for a card that is no card any more.
    """
    run = read_object(output / "run.json")
    folder = Path(run.get("model") or "").resolve()
    card, made = folder / "README.md", folder / "train_config.json"
    beside = folder.parent in (output.resolve(), output.resolve().parent)
    if run.get("control") or not run.get("test") or not (beside and card.is_file() and made.is_file()):
        return None
    if made.stat().st_mtime > (output / "run.json").stat().st_mtime:
        return None
    with refusing(f"{card}: its first lines, the metadata, cannot be read (…); mend or remove them"):
        content = ModelCard.load(card)
    test = Path(run["test"])
    sets = {"aligned": summary["aligned"]} | ({"harmless": Path(run["harmless"]).name} if run.get("harmless") else {})
    about = {"task_type": "text-generation", "dataset_type": test.stem, "dataset_name": test.name, "dataset_args": sets}
    about["metric_args"] = {"judge": ", ".join(judges)}
    figures = [(key, title, summary[key]) for key, title in FIGURES.items()]
    figures += [(f"strict_{code}", f"strict safe rate, {code}", rate) for code, rate in summary["strict"].items()]
    fresh = [EvalResult(metric_type=kind, metric_name=name, metric_value=round(value, 2), **about)
             for kind, name, value in figures if value is not None]  # fmt: skip
    others = [result for result in content.data.eval_results or [] if result.dataset_type != test.stem]
    content.data.model_name = content.data.model_name or folder.parent.name
    content.data.eval_results = others + fresh
    write_atomically(card, str(content))
    return card
