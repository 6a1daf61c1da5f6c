"""Replies: from a model, longest prompts first, in left-padded batches, greedy unless asked otherwise, or their first
tokens alone; or of a control, which needs no model and shows what the figures mean.

Every finished batch goes to a journal file, so that a run that was stopped goes on where it was.
"""

import hashlib
import json
import math
import random
from contextlib import suppress
from datetime import date
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.examples import end_of_turn, pad
from mlc_min.loop import batches_of
from mlc_min.machinery.errors import InputError, refusing
from mlc_min.machinery.files import EMBEDDED, shipped, write_atomically
from mlc_min.machinery.models import digest, fingerprint
from mlc_min.states import last_token_states, vocabulary_logits

CONTROLS = ("always-refuse", "gibberish")


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, batch_size: int,
    temperature: float = 0.0, seed: int = 0, journal: Path | None = None,
) -> list[dict]:  # fmt: skip
    """One dict per tokenised prompt, in their order: reply (str), ended (bool: False if it was cut off).

    Greedy (temperature 0) replies do not depend on the batch size, on a CPU in float32 to the letter. Padding is
    on the left: with right padding a decoder would continue after pad tokens. The longest prompts come first, so
    that a batch too large for the memory fails at once. The model's own generation settings (a sampling
    temperature, a repetition penalty) are not used: models are compared under the same rule. Sampled replies depend on
    the seed, the batch size and the kind of device: each batch has a random state of its own.

    journal: a file that every finished batch is appended to. What an earlier run with the same model, prompts and
    settings has left in it is not generated again, and the replies are those of a run that was never stopped; the
    caller deletes it when the result is safe elsewhere. Raises InputError if it is of another run, and for a model
    whose logits are NaN.
    """
    model.eval()
    ends, done = end_tokens(model, tokenizer), {}
    if prompts and model(torch.tensor([prompts[0]], device=model.device)).logits.isnan().any():
        name = model.config._name_or_path
        raise InputError(f"{name}: the logits are NaN; the weights are broken, or too large for their dtype")
    if journal is not None:
        key = {"model": fingerprint(model), "prompts": digest(prompts)}
        key |= {"end_tokens": ends, "max_new_tokens": max_new_tokens, "temperature": temperature}
        if temperature:
            key |= {"seed": seed, "batch_size": batch_size, "device": model.device.type}
        done = read_journal(journal, key, getattr(tokenizer, "template_date", None))
    rule = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    if temperature:
        rule.update(do_sample=True, temperature=temperature, top_k=0)
    own, model.generation_config = model.generation_config, rule
    try:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in tqdm(range(0, len(order), batch_size), desc="generate", unit="batch", leave=False):
            indices = order[start : start + batch_size]
            if done.keys() >= set(indices):
                continue
            if temperature:  # of this batch alone, so that it does not matter which ones are done already
                torch.manual_seed(int(hashlib.sha256(f"{seed} {start}".encode()).hexdigest()[:16], 16))
            batch = pad([prompts[i] for i in indices], side="left")
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            tokens = model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()
            for i, row in zip(indices, tokens, strict=True):
                length = next((n for n, token in enumerate(row) if token in ends), None)
                reply = tokenizer.decode(row[:length], skip_special_tokens=True)
                done[i] = {"reply": reply, "ended": length is not None}
            if journal is not None:
                with open(journal, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"index": i} | done[i], ensure_ascii=False) + "\n" for i in indices)
    finally:
        model.generation_config = own
    return [done[i] for i in range(len(prompts))]


@torch.no_grad()
def first_tokens(model: PreTrainedModel, prompts: list[list[int]], token: int) -> list[tuple[float, int]]:
    """Of each prompt: log-odds of this first token of a reply, log p - log(1 - p), and the likeliest first token."""
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for batch in tqdm(list(batches_of(order, 32)), "first tokens", leave=False):
        logits = vocabulary_logits(model, last_token_states(model, **pad([prompts[i] for i in batch]))).double()
        likeliest, own = logits.argmax(-1).tolist(), logits[:, token].clone()
        logits[:, token] = -math.inf
        log_odds = (own - logits.logsumexp(-1)).tolist()
        found |= dict(zip(batch, zip(log_odds, likeliest, strict=True), strict=True))
    return [found[i] for i in range(len(prompts))]


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a reply: what the chat template writes after one, and what the model says itself."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({end_of_turn(tokenizer), *own})


def keep_date(tokenizer: Tokenizer, journal: Path) -> None:
    """Let the chat template write the date on which the journal, if there is one, was begun: after midnight the prompts
    would else be others."""
    # suppressed: there is no journal, or one that `generate` will refuse
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        tokenizer.template_date = date.fromisoformat(json.loads(journal.read_bytes().partition(b"\n")[0])["date"])


def read_journal(path: Path, key: dict, template_date: date | None) -> dict[int, dict]:
    """What the journal holds, {prompt index: {"reply", "ended"}}; starts the file if there is none.

    The first line is the key, and the date that the chat template wrote, which is in the prompts already. A last line
    without its newline was being written when the run was stopped, and is dropped.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    if not whole:
        write_atomically(path, json.dumps(key | {"date": template_date and template_date.isoformat()}) + "\n")
        return {}
    with refusing(f"{path}: not a whole journal of replies; delete it to start anew"):
        found, *entries = map(json.loads, whole.split(b"\n"))
        found.pop("date", None)
        done = {entry["index"]: {"reply": entry["reply"], "ended": entry["ended"]} for entry in entries}
    if found != key:
        other = ", ".join(name for name in {**key, **found} if found.get(name) != key.get(name))
        raise InputError(f"{path}: was begun with other {other}; delete it to start anew, or use another --output")
    write_atomically(path, whole.decode("utf-8") + "\n")
    return done


def control_reply(control: str, record: dict) -> dict:
    """Reply to a record's prompt. always-refuse: a refusal, in the prompt's language where the embedded world has one,
    else in English; gibberish: the prompt's letters in random order, always the same."""
    if control == "always-refuse":
        return {"reply": refusals().get(record["language"], refusals()["en"]), "ended": True}
    letters = list(record["prompt"])
    random.Random(record["prompt"]).shuffle(letters)
    return {"reply": "".join(letters), "ended": True}


@cache
def refusals() -> dict[str, str]:
    """{language: the refusal of the embedded world}."""
    lexicon = json.loads(shipped(EMBEDDED / "lexicon.json").read_text(encoding="utf-8"))
    return {code: f"{lexicon['refusal_symbol']} {own['refusal']}" for code, own in lexicon["languages"].items()}
