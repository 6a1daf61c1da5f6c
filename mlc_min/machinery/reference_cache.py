"""The reference's log-probs, kept on disk: a second run of the same model on the same data starts at once."""

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from mlc_min.examples import Example
from mlc_min.loop import batches_of, with_reference
from mlc_min.machinery.errors import first_line
from mlc_min.machinery.files import replacing
from mlc_min.machinery.models import digest, fingerprint


def with_cached_reference(folder: str, model: PreTrainedModel, examples: list[Example], recipe) -> list[Example]:
    """`loop.with_reference`, from `folder` if the log-probs lie there. The file's name is a hash of the model (its
    configuration and all weights), of all token ids (and so of data, tokenizer and chat template) and of the
    arithmetic; another of these is another file. A damaged file is computed again; one that cannot be written is done
    without. An empty `folder` keeps nothing."""
    if folder:
        values = [[fingerprint(model), model.device.type, recipe.dtype, recipe.batch_size]]
        values += [[example.prompt, example.chosen, example.rejected] for example in examples]
        path = Path(folder) / f"{digest(values)}.safetensors"
        with suppress(OSError, KeyError, SafetensorError):
            kept = load_file(path)["logps"]
            if kept.shape == (len(examples), 2) and torch.isfinite(kept).all():
                print(f"reference log-probs from {path}")
                return [replace(e, reference=tuple(pair)) for e, pair in zip(examples, kept.tolist(), strict=True)]
    batches = tqdm(list(batches_of(examples, 4 * recipe.batch_size)), desc="reference", leave=False)
    scored = [example for batch in batches for example in with_reference(model, batch, recipe)]
    if folder:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as fresh:
                save_file({"logps": torch.tensor([example.reference for example in scored])}, fresh)
        except (OSError, SafetensorError) as error:
            print(f"--reference_cache {folder}: nothing kept ({first_line(error)}); the run goes on", file=sys.stderr)
    return scored
