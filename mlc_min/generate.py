"""Replies from a model: longest prompts first, in left-padded batches, greedy unless asked otherwise.

Every finished batch goes to a journal file, so that a run that was stopped goes on where it was.
"""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from mlc_min.examples import end_of_turn, pad
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.models import fingerprint
from mlc_min.machinery.saving import write_atomically


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    journal: Path | None = None,
) -> list[dict]:
    """One dict per tokenised prompt, in their order: reply (str), ended (bool: False if it was cut off).

    Greedy (temperature 0) replies do not depend on the batch size, on a CPU in float32 to the letter. Padding is
    on the left: with right padding a decoder would continue after pad tokens. The longest prompts come first, so
    that a batch too large for the memory fails at once. The model's own generation settings (a sampling
    temperature, a repetition penalty) are not used: models are compared under the same rule.

    journal: a file that every finished batch is appended to. If it is there already, what it holds is not
    generated again; the caller deletes it when the result is safe elsewhere. Raises InputError if it was made by
    another model, from other prompts or with other settings.
    """
    model.eval()
    if temperature:
        torch.manual_seed(seed)
    ends = end_tokens(model, tokenizer)
    key = {"model": fingerprint(model), "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]}
    key |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    done = {} if journal is None else read_journal(journal, key)
    sampling = {} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    rule = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    rule.update(**sampling)
    own, model.generation_config = model.generation_config, rule
    try:
        waiting = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: -len(prompts[i]))
        progress = tqdm(total=len(prompts), initial=len(done), desc="generate", unit="reply", leave=False)
        for start in range(0, len(waiting), batch_size):
            indices = waiting[start : start + batch_size]
            batch = pad([prompts[i] for i in indices], side="left")
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            output = model.generate(**batch)
            fresh = {}
            for i, row in zip(indices, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                length = next((n for n, token in enumerate(row) if token in ends), None)
                reply = tokenizer.decode(row[:length], skip_special_tokens=True)
                fresh[i] = {"reply": reply, "ended": length is not None}
            if journal is not None:
                with open(journal, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"index": i} | r, ensure_ascii=False) + "\n" for i, r in fresh.items())
            done |= fresh
            progress.update(len(indices))
    finally:
        model.generation_config = own
    progress.close()
    return [done[i] for i in range(len(prompts))]


def end_tokens(model, tokenizer) -> list[int]:
    """The tokens that end a reply: what the chat template writes after one, and what the model says itself."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({end_of_turn(tokenizer), *own})


def read_journal(path: Path, key: dict) -> dict[int, dict]:
    """What the journal holds, {prompt index: {"reply", "ended"}}; starts the file if there is none.

    A last line without its newline was being written when the run was stopped, and is dropped.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    if not whole:
        write_atomically(path, json.dumps(key) + "\n")
        return {}
    try:
        found, *entries = map(json.loads, whole.split(b"\n"))
        done = {entry["index"]: {"reply": entry["reply"], "ended": entry["ended"]} for entry in entries}
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: not a whole journal of replies; delete it to start anew") from None
    if found != key:
        other = ", ".join(name for name in key if not isinstance(found, dict) or found.get(name) != key[name])
        raise InputError(f"{path}: was begun with other {other}; delete it to start anew, or use another --output")
    write_atomically(path, whole.decode("utf-8") + "\n")
    return done
