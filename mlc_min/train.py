"""The single training script: an English-only SFT, DPO, SimPO or ORPO loss, plus λ times the MLC loss.

    python -m mlc_min.train                                        # the embedded model, about 1 minute
    python -m mlc_min.train --model <folder or Hub id> --train rows.jsonl --output runs/mine    # --preset paper

It reads, calls and writes; the loop itself is in `loop.py`.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.consistency import BrokenDown
from mlc_min.evaluation.diagnose import probe_figures
from mlc_min.evaluation.model_card import record_of, save_run
from mlc_min.examples import Example, Row, encode_rows, shuffle_translations
from mlc_min.loop import Run, arithmetic, train, with_reference
from mlc_min.machinery import models
from mlc_min.machinery.centring import CentredByLanguage
from mlc_min.machinery.checkpoint import config_date, identity_of, last_good, restore, save_checkpoint, stop_requests
from mlc_min.machinery.errors import InputError, refusing, run_command
from mlc_min.machinery.files import usable_folder, write_json
from mlc_min.machinery.log import MetricsLog
from mlc_min.machinery.reference_cache import with_cached_reference
from mlc_min.machinery.rows import only_harmful, read_rows
from mlc_min.machinery.settings import TrainConfig, parse_settings
from mlc_min.states import resolve_layer

PROBES = 16  # rows that the diagnostics look at, the same ones on each logged step


# --- a whole training: the loop, with its log and its checkpoints ---


def fit(
    config: TrainConfig, model: PreTrainedModel, examples: list[Example], output: Path | None = None,
    quiet: bool = False, stop: Sequence[int] = (),
) -> tuple[nn.Module, list[dict]]:  # fmt: skip
    """Train `model` in place. Returns (extractor, list of figures, one dict per logged step).

    `output`: a folder for train_log.jsonl, one line per logged step, and checkpoint.pt, written every `save_every`
    steps, at the end, and when `stop`, the signals that came, is not empty, which ends with SystemExit. Examples
    without reference log-probs get them here if the method needs any.
    Raises InputError for a layer or a name to freeze that the model does not have, and for a loss or gradient that is
    not finite, naming the step, the rows and the last checkpoint.
    """
    check_layer(config, model)
    # Dropout would make policy and reference differ at step 0, where the DPO loss must be log 2.
    model.eval()
    models.freeze(model, config.freeze)
    checkpoint = path = None
    identity = {}
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        checkpoint, path = output / "checkpoint.pt", output / "train_log.jsonl"
        identity = identity_of(config, model, examples)
    if config.method == "dpo" and examples[0].reference is None:
        examples = with_reference(model, examples, config)
    if config.gradient_checkpointing:
        models.checkpoint_activations(model)
    probe = [example for example in examples if len(example.prompts) > 1]
    probe = probe[:: math.ceil(len(probe) / PROBES)] if probe else []
    if config.shuffle_translations:
        with refusing("…", ValueError):
            examples = shuffle_translations(examples, config.seed)
    run = Run.start(model, config)
    if config.mlc_weight and config.center_languages != "no":
        run.extractor = centred(config, run, examples)
    saved_at = restore(checkpoint, run, config, identity) if checkpoint and config.resume else None
    log = MetricsLog(path, run.step, config.steps, quiet, config.report_to, model.device)
    name = config.method + ("+mlc" if config.mlc_weight else "")
    steps, last = train(run, examples, config), config.steps - 1
    try:
        for step in tqdm(range(run.step, config.steps), name, config.steps, False, disable=quiet, initial=run.step):
            is_logged = step % config.log_every == 0 or step == last
            shown = {}
            if is_logged and probe:  # before the step, as its losses are; what breaks here the step itself will name
                with suppress(BrokenDown), arithmetic(model, config):
                    shown = probe_figures(model, run.extractor, probe, config)
            figures = next(steps) | shown
            rows, uses_mlc = figures.pop("rows"), figures.pop("uses_mlc")
            log.tokens += sum(token_count(row, config.method, uses_mlc) for row in rows)
            if step == 0 and config.method == "dpo":
                check_start(figures["align_loss"].item(), config)
            if is_logged:
                log.write({key: value.item() if torch.is_tensor(value) else value for key, value in figures.items()})
            asked = list(stop)  # looked at once, so that no stop goes without its checkpoint
            if checkpoint and (asked or (config.save_every and run.step % config.save_every == 0)):
                save_checkpoint(checkpoint, run, config, identity)
                saved_at = run.step
            if asked:
                print(f"stopped after step {step}; {last_good(checkpoint)}", file=sys.stderr)
                sys.exit(128 + asked[-1])
    except BrokenDown as error:
        raise InputError(f"{error}, or lower --learning_rate; {last_good(checkpoint)}") from None
    if checkpoint and saved_at != run.step:  # so that what was trained is not lost if the model cannot be saved
        try:
            save_checkpoint(checkpoint, run, config, identity)
        except InputError as error:
            print(f"warning: {error}", file=sys.stderr)
    return run.extractor, log.history


def centred(config: TrainConfig, run: Run, examples: list[Example]) -> nn.Module:
    """The extractor of states centred by language, which needs every language in every row."""
    languages = len(config.language_list)
    for example in examples:
        if len(example.prompts) < languages:
            raise InputError(f"{example.where}: lacks a language, and --center_languages needs all; --missing skip")
    if config.batch_size < 2:
        raise InputError("--center_languages: needs a --batch_size of at least 2; one prompt is its own mean")
    hidden_size = run.model.config.get_text_config().hidden_size
    return CentredByLanguage(run.extractor, config.center_languages, languages, hidden_size).to(run.model.device)


def check_layer(config: TrainConfig, model: PreTrainedModel) -> None:
    """Raises InputError for a layer that the model does not have."""
    with refusing("--mlc_layer: …", ValueError):
        resolve_layer(model, config.mlc_layer)


def check_start(loss: float, config: TrainConfig) -> None:
    """Raises InputError unless DPO starts where policy and reference agree: the reference is then not the model that is
    trained. The loss is log 2 there, but for the rounding of padded batches."""
    allowed = 0.1 if config.dtype == "bfloat16" else 0.01
    if not abs(loss - math.log(2)) <= allowed:
        advice = "the reference log-probs are those of another model; delete the files in --reference_cache"
        raise InputError(f"step 0: the DPO loss is {loss:.4f} and not log 2 = 0.6931: {advice}")


def token_count(example: Example, method: str, uses_mlc: bool) -> int:
    """Tokens of a row that go through the model in one step, padding not counted."""
    responses = [example.chosen] if method == "sft" else [example.chosen, example.rejected]
    count = sum(len(example.prompt) + len(response) for response in responses)
    return count + uses_mlc * sum(map(len, example.prompts.values()))


# --- the command ---


def select_rows(config: TrainConfig) -> tuple[list[Row], dict[str, int]]:
    """Read the rows by the settings' policies; returns them and the count of what was found.

    Raises InputError for a row that is not as it should be and may not be left out, or if none is left.
    """
    languages = config.language_list
    responses = ("chosen",) if config.method == "sft" else ("chosen", "rejected")
    needed, optional = ((), responses) if config.missing == "skip" else (responses, ())
    lenient = config.missing != "error" or not config.mlc_weight  # without MLC no translation is needed
    rows = read_rows(config.train, languages, needed, languages[:1] if lenient else None, optional)
    if config.harmful_only:
        rows = only_harmful(rows, config.train)
    counts = {"read": len(rows), "lacking_translations": sum(len(row.prompts) < len(languages) for row in rows)}
    rows = [row for row in rows if all(getattr(row, name) for name in responses)]
    counts["lacking_responses"] = counts["read"] - len(rows)
    if config.mlc_weight and config.missing == "skip":
        rows = [row for row in rows if len(row.prompts) == len(languages)]
    if not rows:
        raise InputError(f"{config.train}: no row has all of --languages {config.languages}; try --missing present")
    return rows, counts


def fitting_examples(config: TrainConfig, rows: list[Row], tokenizer: Tokenizer, counts: dict) -> list[Example]:
    """Encode the rows that fit into --max_length; adds to `counts` how many did and why the others did not.

    Raises InputError if one does not and --too_long is "error", or if none does.
    """
    with refusing("…", ValueError):  # a system text that the template has no place for
        examples, left_out = encode_rows(rows, tokenizer, config.language_list, config.max_length)
    counts |= {f"{name}_too_long": len(where) for name, where in left_out.items()} | {"used": len(examples)}
    too_long = left_out["prompt"] + left_out["response"]
    if too_long and config.too_long == "error":
        raise InputError(f"{too_long[0]}: longer than --max_length {config.max_length}; raise it, or --too_long skip")
    print(
        f"{config.train}: {counts['read']} rows, {len(examples)} used; {counts['lacking_translations']} lack some "
        f"translation, {counts['lacking_responses']} a response (--missing {config.missing}); left out as longer than "
        f"{config.max_length} tokens: {counts['prompt_too_long']} by the prompt alone, "
        f"{counts['response_too_long']} with the response"
    )
    if not examples:
        raise InputError(f"--max_length {config.max_length}: no row fits; raise it")
    return examples


def settle_arithmetic(config: TrainConfig, device: torch.device) -> None:
    """What `--dtype auto` is on the device. And on CUDA `--preset paper` lets float32 matrix products round to TF32,
    several times as fast; the figures of the embedded model are made without."""
    if config.dtype == "auto":
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    is_fast = device.type == "cuda" and config.preset == "paper"
    torch.set_float32_matmul_precision("high" if is_fast else "highest")


def main() -> None:
    config = parse_settings(__doc__)
    print(config.described())
    device = models.pick_device(config.device)
    settle_arithmetic(config, device)
    rows, counts = select_rows(config)
    # Adapters are float32 of their own; weights that are not trained may stay in bfloat16, half the memory.
    weights = torch.bfloat16 if config.lora and config.dtype == "bfloat16" else torch.float32
    model, tokenizer = models.load_model(config.model, device, weights, config.attention, config.chat_template)
    check_layer(config, model)
    tokenizer.template_date = config_date(config)
    examples = fitting_examples(config, rows, tokenizer, counts)
    embeddings = model.get_input_embeddings().weight.shape[0]
    for example in examples:
        sequences = filter(None, [*example.prompts.values(), example.chosen, example.rejected])
        models.check_ids(sequences, tokenizer, embeddings, example.where)
    models.check_logits(model, examples[0].prompt, f"--model {config.model}")
    if config.epochs:
        config.steps = math.ceil(config.epochs * len(examples) / (config.batch_size * config.accumulation))
    record = record_of(config, device, counts)
    output = usable_folder(config.output, "--output", sum(p.nbytes for p in model.parameters()))
    if config.method == "dpo":  # before the adapters, of which the reference has none
        examples = with_cached_reference(config.reference_cache, model, examples, config)
    if config.lora:
        torch.manual_seed(config.seed)  # of the adapters' start
        model = models.add_adapters(model, config.lora, config.lora_alpha)
    write_json(output / "run.json", record)
    with stop_requests() as stop:
        extractor, history = fit(config, model, examples, output, stop=stop)
    if config.lora and models.is_adapter_folder(config.model):
        # The new adapters would be loaded onto the model below the old ones: so what is saved is the whole model.
        model, record["settings"]["lora"] = model.merge_and_unload(), 0
        print(f"{output}/model: whole weights and no adapters, since {config.model} holds adapters itself")
    save_run(config, model, tokenizer, extractor, record, history)
    if not config.save_every:
        (output / "checkpoint.pt").unlink(missing_ok=True)  # it was there in case the save failed
    print(f"saved {output}/model and {output}/train_log.jsonl")


if __name__ == "__main__":
    run_command(main)
