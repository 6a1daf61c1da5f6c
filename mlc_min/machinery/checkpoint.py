"""A training run's whole state in one file, so that a stopped run continues to bit-identical weights (on CPU)."""

import copy
import datetime
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from mlc_min.examples import Example
from mlc_min.loop import Run
from mlc_min.machinery.errors import InputError, refusing
from mlc_min.machinery.files import replacing
from mlc_min.machinery.models import digest, fingerprint
from mlc_min.machinery.settings import FREE_SETTINGS

STATEFUL = ("extractor", "optimizer", "scheduler")
DAMAGED = "not a whole checkpoint (…); delete it to start anew"


def trained_parameters(model) -> dict[str, torch.Tensor]:
    """The parameters of a model that are trained; the others come from the model's own folder."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def identity_of(config, model, examples: list[Example]) -> dict[str, str]:
    """What must be the same when a run goes on: the model as it was loaded, and the rows as token ids, which change
    with the tokenizer and the chat template too; and the date that they were made with."""
    rows = digest([example.prompts, example.chosen, example.rejected] for example in examples)
    return {"model": fingerprint(model), "rows": rows, "date": config_date(config).isoformat()}


def config_date(config) -> datetime.date:
    """The day that a chat template writes into prompts: today's, and in a run that goes on the one it began on."""
    state = read_checkpoint(Path(config.output) / "checkpoint.pt") if config.resume else None
    return datetime.date.fromisoformat(state["identity"]["date"]) if state else datetime.date.today()


def save_checkpoint(path: Path, run: Run, config, identity: dict[str, str]) -> None:
    """Write the run, its settings, its identity and torch's random state, whole or not at all.

    Raises InputError if it cannot be written, a full disk for instance; the checkpoint before it stays.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS}
    state = {"step": run.step, "settings": settings, "identity": identity}
    state["model"] = {name: p.detach() for name, p in trained_parameters(run.model).items()}
    state |= {name: getattr(run, name).state_dict() for name in STATEFUL}
    # Nothing in the loop draws from these; a changed loop might.
    state["random"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    kept = "the one before it is whole" if path.exists() else "there is none before it"
    failure = f"{path}: step {run.step} cannot be saved (…); make room; {kept}"
    with refusing(failure, OSError, RuntimeError), replacing(path) as fresh:
        torch.save(state, fresh)


def read_checkpoint(path: Path) -> dict | None:
    """What `save_checkpoint` wrote, None if there is no file; tensors and plain values only, no code, and from the disk
    as they are used. Raises InputError if it is damaged."""
    if not path.exists():
        return None
    with refusing(f"{path}: {DAMAGED}"):
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if not all(name in state for name in ("step", "settings", "identity", "model", "random", *STATEFUL)):
            raise KeyError("something is missing in it")
        return state


def restore(path: Path, run: Run, config, identity: dict[str, str]) -> int | None:
    """Put a checkpoint's state into the run; returns its step, None if there is no checkpoint. Raises InputError if it
    is damaged, or of other settings, model or rows."""
    state = read_checkpoint(path)
    if state is None:
        return None
    with refusing(f"{path}: {DAMAGED}", RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        for name, value in asdict(config).items():
            before = state["settings"].get(name)
            if name not in FREE_SETTINGS and before != value:
                advice = "use that, or another --output to start anew"
                raise InputError(f"--{name} {value}: {path} was made with {before}; {advice}")
        others = {"model": f"another model than {config.model} is", "rows": f"other rows than {config.train} holds"}
        for name, meaning in others.items():
            if state["identity"].get(name) != identity[name]:
                raise InputError(f"{path}: was made with {meaning} now; use another --output to start anew")
        if set(state["model"]) != set(trained_parameters(run.model)):
            raise RuntimeError("it holds other parameters than this model trains")
        run.model.load_state_dict(state["model"], strict=False)  # what is not trained is not among them
        for name in STATEFUL:
            getattr(run, name).load_state_dict(copy.deepcopy(state[name]))  # the file must not stay in use
        torch.set_rng_state(state["random"]["cpu"])
        if len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        run.step = state["step"]
        return run.step


def last_good(path: Path | None) -> str:
    """Where a run can go on from, in words. path: of its checkpoint, None if it writes none."""
    if path is None or not path.exists():
        return "no checkpoint was saved"
    return f"the last good checkpoint is {path}, step {read_checkpoint(path)['step']}; --resume true continues from it"


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Within the block, SIGTERM and Ctrl-C are noted in the list and do nothing else, so that a step ends whole; a
    second Ctrl-C interrupts at once. Where signals cannot be caught (another thread), nothing changes."""
    asked, before = [], {}

    def note(number, frame) -> None:
        if number == signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)

    with suppress(ValueError):
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
