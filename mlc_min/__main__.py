"""The main job: align a small multilingual model in English only, without and with MLC, and compare.

    python -m mlc_min          # see the README for time, hardware and the figures to expect

Trains three copies of the embedded base model on the same English preference pairs: DPO; DPO + MLC on the
prompts' translations; and the control, DPO + MLC with the translations shuffled among the prompts. Prints
one table on test requests none of them was trained on, in any language or phrasing.
"""

import argparse
import copy
import json
import os
import platform
import time
from pathlib import Path

import torch
import transformers

from mlc_min.data import encode_rows, read_rows
from mlc_min.diagnose import diagnose
from mlc_min.errors import run_command
from mlc_min.models import load_model, pick_device
from mlc_min.report import LEGEND, plot_refusals, text_table
from mlc_min.safety import evaluate, summarize
from mlc_min.saving import replacing, write_atomically
from mlc_min.sentences import ALIGNED, EMBEDDED, LANGUAGES
from mlc_min.train import TrainConfig, train

# Chosen on the validation split; the README says how, and how they deviate from the paper.
MLC = {"mlc_weight": 6.0, "mlc_tau": 0.5, "mlc_layer": 3}
MODELS = {
    "base": None,
    "DPO": {},
    "DPO+MLC": MLC,
    "control: shuffled": MLC | {"shuffle_translations": True},
}
# The official runs' settings of the loss, for comparison: what they give on a model this small.
PAPER = {"DPO+MLC, paper's λ τ layer": {"mlc_weight": 0.8, "mlc_tau": 0.2, "mlc_layer": -1, "mlc_every": 2}}


def demo(
    output: Path,
    seed: int,
    device: str = "auto",
    split: str = "test",
    test_rows: int | None = None,
    paper: bool = False,
    **settings,
) -> dict:
    """Run the main job; returns and saves what `table.json` holds. settings: other values for TrainConfig.

    output gets table.json, table.txt, generations.jsonl (every reply with its verdict), train_log.jsonl and
    refusals.png. split: "test"; "validation" to choose settings by; or "train". test_rows: use this many rows of each
    kind only, for a quick look. paper: one row more, MLC with the paper's λ, τ, layer and rhythm.
    """
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    torch_device = pick_device(device)
    languages = ALIGNED if split == "train" else LANGUAGES  # training rows do not have the unseen ones
    rows = read_rows(EMBEDDED / f"{split}.jsonl", languages)
    if test_rows:
        kinds = ([r for r in rows if r.extra["harmful"] == kind] for kind in (True, False))
        rows = [r for kind in kinds for r in kind[:test_rows]]
    meanings = list({tuple(r.extra["combination"]): r for r in rows}.values())  # one row per combination
    base, tokenizer = load_model(EMBEDDED / "model", torch_device)
    train_rows = read_rows(EMBEDDED / "train.jsonl", ALIGNED, ("chosen", "rejected"))
    examples, _ = encode_rows(train_rows, tokenizer, ALIGNED, TrainConfig.max_length)
    results, summaries = {}, {}
    with (
        replacing(output / "generations.jsonl") as generations_path,
        replacing(output / "train_log.jsonl") as log_path,
        open(generations_path, "w", encoding="utf-8") as generations,
        open(log_path, "w", encoding="utf-8") as log,
    ):
        for name, choices in (MODELS | PAPER if paper else MODELS).items():
            model = copy.deepcopy(base)
            config, last = None, None
            if choices is not None:
                config = TrainConfig(seed=seed, device=device, **(choices | settings))
                print(f"\n{name}: {config.steps} steps on {len(examples)} rows", flush=True)
                _, history = train(config, model, tokenizer, examples)
                for metrics in history:
                    log.write(json.dumps({"model": name, **metrics}) + "\n")
                # The latest value of each figure: with mlc_every > 1 the last step need not have them all.
                last = {name: value for metrics in history for name, value in metrics.items()}
            records = evaluate(model, tokenizer, rows, languages)
            for record in records:
                generations.write(json.dumps({"model": name, **record}, ensure_ascii=False) + "\n")
            summaries[name] = summarize(records)
            results[name] = {
                "settings": None if config is None else {k: v for k, v in vars(config).items() if k not in PATHS},
                "last_step": last,
                **summaries[name],
                "diagnostics": diagnose(model, tokenizer, meanings, ALIGNED, MLC["mlc_layer"], MLC["mlc_tau"]),
            }
    table = {
        "seed": seed,
        "split": split,
        "prompts_per_language": len(rows),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "hardware": hardware(torch_device),
        "versions": versions(),
        "models": results,
    }
    text = text_table(summaries)
    plot_refusals({name: [summary] for name, summary in summaries.items()}, output / "refusals.png")
    write_atomically(output / "table.txt", f"{text}\n\n{LEGEND}\n")
    write_atomically(output / "table.json", json.dumps(table, indent=1) + "\n")  # last: it says that all is done
    print(f"\n{text}\n\n{LEGEND}\n\n{table['minutes']} minutes on {table['hardware']}; saved in {output}/")
    return table


PATHS = ("model", "train", "output", "device")  # of this machine, so not part of a result


def hardware(device: torch.device) -> str:
    """What the figures were measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlc_min", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/demo"), help="folder for the results (default: runs/demo)")
    add("--seed", type=int, default=0, help="of the row order, the extractor and the shuffling (default: 0)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--steps", type=int, default=TrainConfig.steps, help=f"of each training (default: {TrainConfig.steps})")
    add("--split", choices=("test", "validation", "train"), default="test", help="rows to evaluate on (default: test)")
    add("--test_rows", type=int, help="harmful and harmless prompts per language, for a quick look (default: all)")
    add("--paper", action="store_true", help="one row more: MLC with the paper's λ, τ, layer and rhythm")
    arguments = parser.parse_args()
    print("expected time: about 3 minutes on 2 CPU cores", flush=True)
    demo(**vars(arguments))


if __name__ == "__main__":
    run_command(main)
