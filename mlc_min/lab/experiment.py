"""One row of a table on the embedded world: train the base model in one way, then evaluate it.

`ROWS` names the ways; `python -m mlc_min` runs four of them once, `python -m mlc_min.lab.ablations` all of them over
several seeds.
"""

import copy
import json
import random
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from mlc_min.evaluation.diagnose import diagnose
from mlc_min.evaluation.generate import CONTROLS, control_reply, first_tokens, generate
from mlc_min.evaluation.judges import judge
from mlc_min.evaluation.metrics import summarize
from mlc_min.evaluation.records import cells, encode, write_records
from mlc_min.examples import Example, encode_response, encode_rows, shuffle_translations
from mlc_min.lab import rivals
from mlc_min.lab.sentences import ALIGNED, EMBEDDED, LANGUAGES, all_replies, answer_text, refusal_text
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.files import write_atomically, write_json
from mlc_min.machinery.log import hardware, versions
from mlc_min.machinery.models import load_model, pick_device
from mlc_min.machinery.rows import Row, only_harmful, read_rows
from mlc_min.train import TrainConfig, fit

# Chosen on the validation split; the README says how, and how they deviate from the paper.
MLC = {"mlc_weight": 6.0, "mlc_tau": 0.5, "mlc_layer": 3}
# The best of λ = 3, 6, 12, 24 on the validation split, for each of the two losses (data/results/README.md).
BEST_MLC = MLC | {"mlc_weight": 12.0}
BEST_COSINE = MLC | {"mlc_weight": 24.0, "consistency": "cosine"}
SHUFFLED = {"shuffle_translations": True}
SEPARATION = MLC | {"separate_weight": 1.0}  # two deviations from the paper that keep prompts apart
CENTRED = MLC | {"center_languages": "running", "extractor": "identity"}
FIRST: dict[str, dict | None] = {
    "base": None, "DPO": {}, "DPO+MLC": MLC, "control: shuffled": MLC | SHUFFLED,
    "MLC λ 12": BEST_MLC, "cosine λ 24": BEST_COSINE, "cosine λ 24, shuffled": BEST_COSINE | SHUFFLED,
    "frozen extractor": MLC | {"extractor": "frozen"}, "no extractor": MLC | {"extractor": "identity"},
    "layer 2 of 4": MLC | {"mlc_layer": 2}, "last layer": MLC | {"mlc_layer": -1},
    "paper's settings": {"mlc_weight": 0.8, "mlc_tau": 0.2, "mlc_layer": -1, "mlc_every": 2},
    "harmful-only DPO": {"harmful_only": True}, "harmful-only DPO+MLC": MLC | {"harmful_only": True},
    **dict.fromkeys(CONTROLS),
}  # fmt: skip
OTHERS = ("en,zh,bn", "en,zh,bn,ru,sw", "en,zh,bn,ru,sw,ja,ur,ps")
WRONG = {f"{share} % wrong": share / 100 for share in (10, 30, 50)}  # prompts with the translations of others
EVERY_LANGUAGE = "DPO in every language"  # the upper bound: replies are translated too
RIVALS = {"DPO, then MPO": rivals.MPO, "DPO, then DCO": rivals.DCO, "refusal vector": rivals.VECTOR}
ASKED = {  # what reviewers of the paper asked for
    EVERY_LANGUAGE: {"batch_size": 32},
    "DPO, 360 steps": {"steps": 360},  # as many more as DPO+MLC takes more time
    **dict.fromkeys(WRONG, MLC),
    **{f"{codes.count(',')} other languages": MLC | {"languages": codes} for codes in OTHERS},
    "separation": SEPARATION, "separation, shuffled": SEPARATION | SHUFFLED,
    "centred": CENTRED, "centred, shuffled": CENTRED | SHUFFLED,
    **{name: {} for name in RIVALS}, "refusal vector": None,
}  # fmt: skip
GRID = {f"τ {tau}, λ {weight:g}": (tau, weight) for tau in (0.1, 0.2, 0.5, 1.0) for weight in (0.5, 2.0, 6.0, 12.0)}
ROWS = FIRST | ASKED | {name: MLC | {"mlc_tau": tau, "mlc_weight": weight} for name, (tau, weight) in GRID.items()}
MAIN = ("base", "DPO", "DPO+MLC", "control: shuffled")
SEEDLESS = ("base", "refusal vector", *CONTROLS)  # nothing is trained, so every seed gives the same
PATHS = ("model", "train", "output", "device")  # of this machine, so not part of a result


@dataclass
class World:
    """The base model, its data and one split to evaluate on, loaded once."""

    base: object
    tokenizer: object
    train_rows: list[Row]
    test_rows: list[Row]
    languages: tuple[str, ...]  # of test_rows
    split: str
    folder: Path  # of the base model

    @classmethod
    def load(
        cls, split: str = "test", device: str = "auto", test_rows: int | None = None, folder: Path = EMBEDDED
    ) -> "World":
        """test_rows: so many harmful and so many harmless rows only, for a quick look. folder: the world of another
        base model, made from the same lexicon."""
        check_test_rows(test_rows)
        own = folder / "lexicon.json"
        if not own.exists() or own.read_bytes() != (EMBEDDED / "lexicon.json").read_bytes():
            raise InputError(f"--bases {folder}: its lexicon.json is not that of {EMBEDDED}; see lab.toy_world")
        base, tokenizer = load_model(folder / "model", pick_device(device))
        languages = ALIGNED if split == "train" else LANGUAGES  # training rows do not have the unseen ones
        rows = read_rows(EMBEDDED / f"{split}.jsonl", languages)
        if test_rows:
            kinds = ([row for row in rows if row.extra["harmful"] == kind] for kind in (True, False))
            rows = [row for kind in kinds for row in kind[:test_rows]]
        train_rows = read_rows(EMBEDDED / "train.jsonl", ALIGNED, ("chosen", "rejected"))
        return cls(base, tokenizer, train_rows, rows, languages, split, folder)


def check_test_rows(count: int | None) -> None:
    if count is not None and count < 1:
        raise InputError(f"--test_rows {count}: must be at least 1 (prompts of each kind)")


def slug(name: str) -> str:
    """A row's name as that of its folder.

    >>> slug("paper's settings"), slug("control: shuffled")
    ('papers-settings', 'control-shuffled')
    """
    return re.sub(r"[^\w+-]+", "-", name.replace("'", ""))


def settings_of(name: str, seed: int, **settings) -> dict | None:
    """All settings of a row's training but paths and device; None if it has no training."""
    if ROWS[name] is None:
        return None
    config = TrainConfig(seed=seed, **(settings | ROWS[name]))
    return {key: value for key, value in vars(config).items() if key not in PATHS}


def in_language(row: Row, code: str) -> Row:
    """A training row in one language alone, its replies too."""

    def reply(text: str) -> str:
        meaning = all_replies()[text]
        if meaning.verdict == "refusal":
            return refusal_text(code)
        return answer_text(code, *meaning.combination, text == answer_text("en", *meaning.combination, True))

    return replace(row, prompts={code: row.prompts[code]}, chosen=reply(row.chosen), rejected=reply(row.rejected))


def in_every_language(world: World, rows: list[Row], config: TrainConfig) -> dict[str, list[Example]]:
    """The rows in each aligned language, replies too."""
    own = {code: [in_language(row, code) for row in rows] for code in ALIGNED}
    return {code: encode_rows(own[code], world.tokenizer, (code,), config.max_length)[0] for code in ALIGNED}


def examples_of(world: World, name: str, config: TrainConfig) -> list[Example]:
    """The training examples of a row."""
    rows = only_harmful(world.train_rows, config.train) if config.harmful_only else world.train_rows
    if name == EVERY_LANGUAGE:
        return [example for own in in_every_language(world, rows, config).values() for example in own]
    examples = encode_rows(rows, world.tokenizer, config.language_list, config.max_length)[0]
    if name in WRONG:
        chosen = random.Random(config.seed).sample(range(len(examples)), round(WRONG[name] * len(examples)))
        wrong = shuffle_translations([examples[i] for i in chosen], config.seed)
        for i, example in zip(chosen, wrong, strict=True):
            examples[i] = example
    return examples


def steered(world: World, model):
    """The context in which the model refuses more, by a vector from the English training prompts."""
    kinds = ([row for row in world.train_rows if row.extra["harmful"] is kind] for kind in (True, False))
    prompts = (encode(rows, world.tokenizer, ("en",)) for rows in kinds)
    return rivals.steered(model, rivals.refusal_vector(model, *prompts))


def evaluate(
    model, tokenizer, rows: list[Row], languages: tuple[str, ...], max_new_tokens: int = 48, batch_size: int = 256
) -> list[dict]:
    """Generate and judge every row of the embedded world in every language, in memory; returns the judged records."""
    records = cells(rows, languages)
    replies = generate(model, tokenizer, encode(rows, tokenizer, languages), max_new_tokens, batch_size)
    return judge([record | reply for record, reply in zip(records, replies, strict=True)], "exact")


def run(world: World, name: str, seed: int, folder: Path, **settings) -> dict:
    """Train and evaluate one row of `ROWS`; returns what result.json in `folder` holds, written last.

    The folder also gets verdicts.jsonl (every reply with its verdict) and train_log.jsonl. settings: other values for
    TrainConfig. Diagnostics are on raw states at the layer where the row's MLC loss works, one phrasing of each
    combination, in the aligned languages.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    config, last, diagnostics = None, None, None
    if name in CONTROLS:
        replies = [record | control_reply(name, record) for record in cells(world.test_rows, world.languages)]
        records = judge(replies, "exact")
    else:
        model = copy.deepcopy(world.base)
        if ROWS[name] is not None:
            config = TrainConfig(**settings_of(name, seed, **settings))
            config.check()
            examples = examples_of(world, name, config)
            print(f"\n{name}, seed {seed}: {config.steps} steps on {len(examples)} rows", flush=True)
            _, history = fit(config, model, examples)
            write_atomically(folder / "train_log.jsonl", "".join(json.dumps(metrics) + "\n" for metrics in history))
            # The latest value of each figure: with mlc_every > 1 the last step need not have them all.
            last = {key: value for metrics in history for key, value in metrics.items()}
            if name in RIVALS:
                rivals.go_on(model, RIVALS[name], in_every_language(world, world.train_rows, config), config)
        with steered(world, model) if name == "refusal vector" else nullcontext():
            records = evaluate(model, world.tokenizer, world.test_rows, world.languages)
            refusal = encode_response(world.tokenizer, refusal_text("en"))[0]  # its symbol, the same in all languages
            scores = first_tokens(model, encode(world.test_rows, world.tokenizer, world.languages), refusal)
        records = [record | {"log_odds": round(score, 4)} for record, (score, _) in zip(records, scores, strict=True)]
        meanings = list({tuple(row.extra["combination"]): row for row in world.test_rows}.values())
        layer = MLC["mlc_layer"] if config is None or not config.mlc_weight else config.mlc_layer
        diagnostics = diagnose(model, world.tokenizer, meanings, ALIGNED, layer, MLC["mlc_tau"])
    write_records(folder / "verdicts.jsonl", [{"model": name, **record, "judge": "exact"} for record in records])
    result = {
        "seed": None if name in SEEDLESS else seed, "base": world.folder.name,
        "split": world.split, "prompts_per_language": len(world.test_rows),
        "seconds": round(time.perf_counter() - started), "hardware": hardware(world.base.device),
        "versions": versions(), "settings": settings_of(name, seed, **settings), "rival": RIVALS.get(name),
        "last_step": last, "summary": summarize(records, ALIGNED), "diagnostics": diagnostics,
    }  # fmt: skip
    write_json(folder / "result.json", result)
    return result
