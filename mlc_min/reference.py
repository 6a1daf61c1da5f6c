"""Log-probs of the responses, and those of the untrained model, computed once and kept on disk.

So no second model stays in memory, the reference cannot drift, and a second run on the same data starts at once.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mlc_min.data import Example, preference_batch
from mlc_min.machinery.models import fingerprint
from mlc_min.machinery.saving import replacing
from mlc_min.preference import sequence_logps
from mlc_min.represent import position_ids


def response_logps(model, head, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums (N,), lengths (N,)) of the responses of a batch of `data.response_batch`."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    states = model.get_decoder()(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=position_ids(batch["attention_mask"]),
        use_cache=False,
    ).last_hidden_state
    return sequence_logps(states, batch["input_ids"], batch["response_mask"], head)


@torch.no_grad()
def reference_logps(model, head, examples: list[Example], pad_id: int, batch_size: int) -> torch.Tensor:
    """(rows, 2): summed log-probs of chosen and rejected under `model` as it is now."""
    columns = []
    for start in tqdm(range(0, len(examples), batch_size), desc="reference", leave=False):
        logps, _ = response_logps(model, head, preference_batch(examples[start : start + batch_size], pad_id))
        columns.append(torch.stack(logps.chunk(2), dim=1))
    return torch.cat(columns)


def cached_reference_logps(
    folder: str, model, head, examples: list[Example], pad_id: int, batch_size: int, dtype: str
) -> torch.Tensor:
    """`reference_logps`, from `folder` if they lie there. The file's name is a hash of the model's weights, of all
    token ids (and so of data, tokenizer and chat template) and of the arithmetic; another of these is another
    file. A damaged file is computed again. An empty `folder` keeps nothing."""
    if not folder:
        return reference_logps(model, head, examples, pad_id, batch_size)
    ids = [[next(iter(e.prompts.values())), e.chosen, e.rejected] for e in examples]
    key = json.dumps([fingerprint(model), str(model.device.type), dtype, batch_size, pad_id, ids])
    path = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    try:
        kept = load_file(path)["logps"]
        if kept.shape == (len(examples), 2) and torch.isfinite(kept).all():
            print(f"reference log-probs from {path}")
            return kept.to(model.device)
    except (OSError, KeyError, SafetensorError):
        pass
    logps = reference_logps(model, head, examples, pad_id, batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        save_file({"logps": logps.cpu()}, fresh)
    return logps
