"""The rows of the table: a common start in English, and from there equal numbers of steps in different ways."""

import gc
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.evaluation.layers import by_layer, states_by_layer, suggested_layer
from mlc_min.evaluation.metrics import summarize
from mlc_min.evaluation.records import write_records
from mlc_min.examples import Example, Row, encode_rows
from mlc_min.lab.experiment import slug
from mlc_min.lab.published import measure
from mlc_min.lab.published.measure import perplexity
from mlc_min.lab.published.tasks import Task, openings
from mlc_min.machinery.files import save_folder, write_atomically, write_json
from mlc_min.machinery.log import hardware, versions
from mlc_min.machinery.models import load_model
from mlc_min.machinery.rows import json_values
from mlc_min.train import TrainConfig, fit

PAPER = {"mlc_weight": 0.8, "mlc_tau": 0.2, "mlc_layer": -1}
CENTRED = PAPER | {"mlc_weight": 1.0, "extractor": "identity", "center_languages": "running"}
SEPARATE = PAPER | {"separate_weight": 1.0}
SHUFFLED = {"shuffle_translations": True}
START, PLAIN, THRESHOLDS, ANY_LANGUAGE = "English SFT", "SFT goes on", "thresholds", "SFT in every language"
# What each row changes in the further training. None: nothing is trained.
ROWS: dict[str, dict | None] = {
    START: None,
    PLAIN: {},
    "MLC": PAPER,
    "MLC, shuffled": PAPER | SHUFFLED,
    "MLC centred": CENTRED,
    "MLC centred, shuffled": CENTRED | SHUFFLED,
    "MLC + separation": SEPARATE,
    "MLC + separation, shuffled": SEPARATE | SHUFFLED,
    "cosine centred": CENTRED | {"consistency": "cosine"},
    "MLC, middle layer": PAPER | {"mlc_layer": 0},  # 0 stands for the layer that is suggested without labels
    THRESHOLDS: None,
    ANY_LANGUAGE: {"batch_size": 20, "accumulation": 2},  # as many prompts a step as with MLC
    "DPO goes on": {"method": "dpo"},
    "DPO + MLC + separation": SEPARATE | {"method": "dpo"},
}
MAIN = (START, PLAIN, "MLC", "MLC, shuffled", "MLC centred", "MLC centred, shuffled", ANY_LANGUAGE)
FURTHER = {"steps": 40, "batch_size": 4, "learning_rate": 2e-5, "mlc_parts": 4, "log_every": 20}
LABELLED = 2  # prompts of each kind and language that a threshold is set from
PROBES = 20  # validation requests that the layers' figures are of


@dataclass
class Bench:
    """What all rows share: the model's place, the task, the split that is looked at, and where results go."""

    model: str
    chat_template: str | None
    attention: str | None
    device: torch.device
    task: Task
    split: str
    output: Path

    @property
    def rows(self) -> list[Row]:
        return getattr(self.task, self.split)

    def load(self, path: str | Path):
        return load_model(path, self.device, attention=self.attention, chat_template=self.chat_template)

    def folder(self, name: str, seed: int) -> Path:
        return self.output / f"{slug(name)}-seed-{seed}"

    def base_texts(self) -> dict[str, list]:
        """The untrained model's own texts in the tested languages, made once."""
        path = self.output / "base.json"
        if not path.exists():
            model, tokenizer = self.load(self.model)
            wanted = {code: texts for code, texts in openings().items() if code in self.task.tested}
            texts = measure.own_texts(model, tokenizer, wanted)
            states = states_by_layer(model, tokenizer, self.probes(), self.task.languages)
            write_json(path, {"texts": texts, "perplexity": perplexity(model, texts), "layers": by_layer(states)})
        return json.loads(path.read_text(encoding="utf-8"))["texts"]

    def probes(self) -> list[Row]:
        rows = self.task.validation
        return rows[:: max(1, len(rows) // PROBES)]


def settings_of(bench: Bench, name: str, seed: int, changes: dict, layers: int) -> TrainConfig:
    """The settings of a row's training; `layers` of the model, of which the lower half stays as it is after the start.

    Raises InputError for a setting out of its bounds."""
    shared = {"method": "sft", "freeze": "embed_tokens", "seed": seed, "languages": ",".join(bench.task.languages)}
    if name == START:
        config = TrainConfig(**(shared | bench.task.start))
    else:
        frozen = ",".join(["embed_tokens", *(f"layers.{k}." for k in range(layers // 2))])
        config = TrainConfig(**(shared | {"freeze": frozen} | FURTHER | (ROWS[name] or {}) | changes))
    config.check()
    return config


def run(bench: Bench, name: str, seed: int, changes: dict) -> dict:
    """Train and measure one row, or read its result.json if it is there already; result.json is written last."""
    folder = bench.folder(name, seed)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if name != START and not (bench.folder(START, seed) / "model").exists():
        run(bench, START, seed, changes)  # what the row starts from; it was not needed where the start was known
    started, texts = time.perf_counter(), bench.base_texts()
    folder.mkdir(parents=True, exist_ok=True)
    gc.collect()  # the model of the row before
    if name == THRESHOLDS:
        records, settings, figures = by_thresholds(bench, seed), {"seed": seed, "labelled": 2 * LABELLED}, {}
    else:
        model, tokenizer, settings = trained(bench, name, seed, changes)
        records = measure.examine(model, tokenizer, bench.task, bench.rows)
        states = states_by_layer(model, tokenizer, bench.probes(), bench.task.languages)
        figures = {"perplexity": perplexity(model, texts), "layers": by_layer(states)}
        if name == START:  # for the thresholds
            if bench.split == "validation":
                labelled = records
            else:
                labelled = measure.examine(model, tokenizer, bench.task, bench.task.validation)
            write_records(folder / "validation.jsonl", labelled)
    # Without the prompts, which are somebody else's texts.
    write_records(folder / "records.jsonl", [{k: v for k, v in r.items() if k != "prompt"} for r in records])
    result = {
        "row": name, "seed": seed, "data": bench.task.name, "split": bench.split, "settings": settings,
        "seconds": round(time.perf_counter() - started), "hardware": hardware(bench.device),
        "versions": versions(), "summary": summarize(records, bench.task.languages), **figures,
    }  # fmt: skip
    write_json(folder / "result.json", result)
    return result


def trained(bench: Bench, name: str, seed: int, changes: dict) -> tuple[PreTrainedModel, Tokenizer, dict]:
    """(model, tokenizer, the settings that matter) of a row, trained from the base model or from the start's folder.
    The start is saved for the other rows, and read again if it is there."""
    folder, start = bench.folder(name, seed), bench.folder(START, seed) / "model"
    model, tokenizer = bench.load(start if start.exists() else bench.model)
    layers = model.config.get_text_config().num_hidden_layers
    config = settings_of(bench, name, seed, changes, layers)
    if (ROWS[name] or {}).get("mlc_layer") == 0:
        seen = bench.task.train[:: len(bench.task.train) // PROBES]
        figures = by_layer(states_by_layer(model, tokenizer, seen, bench.task.languages))
        config.mlc_layer = suggested_layer(figures, layers // 2 + 1)  # below it nothing would learn
    if name != START or not start.exists():
        examples = examples_of(bench.task, tokenizer, config, name == ANY_LANGUAGE)
        print(f"\n{name}, seed {seed}: {config.steps} steps of {config.batch_size * config.accumulation}", flush=True)
        _, history = fit(config, model, examples)
        write_atomically(folder / "train_log.jsonl", "".join(json.dumps(figures) + "\n" for figures in history))
    if not start.exists():
        save_folder(start, lambda new: (model.save_pretrained(new), tokenizer.save_pretrained(new)))
    shown = ("steps", "batch_size", "accumulation", "learning_rate", "freeze", *(ROWS[name] or {}), *changes, "seed")
    return model.eval(), tokenizer, {key: getattr(config, key) for key in shown}


def examples_of(task: Task, tokenizer: Tokenizer, config: TrainConfig, is_any_language: bool) -> list[Example]:
    """The training rows; in any language: each translation a row of its own with the same English reply."""
    if not is_any_language:
        return encode_rows(task.train, tokenizer, task.languages, config.max_length)[0]
    alone = [(code, replace(row, prompts={code: row.prompts[code]})) for row in task.train for code in task.languages]
    return [e for code, row in alone for e in encode_rows([row], tokenizer, (code,), config.max_length)[0]]


def by_thresholds(bench: Bench, seed: int) -> list[dict]:
    """The start's records, judged anew: refused where the log-odds exceed the language's threshold, halfway between
    the means of a few labelled harmful and harmless prompts in that language (of validation, drawn by the seed)."""
    start = bench.folder(START, seed)
    labelled, records = (
        [record for record, _ in json_values(start / file)] for file in ("validation.jsonl", "records.jsonl")
    )
    draw, thresholds = random.Random(seed), {}
    for code in bench.task.tested:
        means = []
        for kind in (True, False):
            scores = [r["log_odds"] for r in labelled if r["language"] == code and r["harmful"] is kind]
            means.append(fmean(draw.sample(scores, LABELLED)))
        thresholds[code] = fmean(means)
    decided = []
    for record in records:
        kept = {k: v for k, v in record.items() if k not in ("reply_language", "correct")}
        refused = record["log_odds"] > thresholds[record["language"]]
        decided.append(kept | {"verdict": "refusal" if refused else "compliance"})
    return decided
