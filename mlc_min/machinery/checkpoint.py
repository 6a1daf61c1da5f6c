"""A training run's whole state in one file, so that a stopped run continues to bit-identical weights (on CPU)."""

import copy
import signal
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from mlc_min.loop import Run
from mlc_min.machinery.errors import InputError, refusing
from mlc_min.machinery.files import replacing

# What a resumed run may change: none of these touches the arithmetic.
FREE_SETTINGS = (
    "config", "preset", "output", "device", "log_every", "save_every", "resume", "report_to", "reference_cache"
)  # fmt: skip
STATEFUL = ("extractor", "optimizer", "scheduler")
DAMAGED = "not a whole checkpoint (…); delete it to start anew"


def trained_parameters(model) -> dict[str, torch.Tensor]:
    """The parameters of a model that are trained; the others come from the model's own folder."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(path: Path, run: Run, config, identity: dict[str, str]) -> None:
    """Write the run, its settings, its `identity` and torch's random state, whole or not at all.

    identity: of model, rows and date, which must be the same when the run goes on.
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


def restore(path: Path, state: dict, run: Run, config, identity: dict[str, str]) -> None:
    """Put a checkpoint's state into the run. Raises InputError if it is of other settings, model or rows."""
    with refusing(f"{path}: {DAMAGED}", RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        for name, value in asdict(config).items():
            before = state["settings"].get(name)
            if name not in FREE_SETTINGS and before != value:
                advice = "use that, or another --output to start anew"
                raise InputError(f"--{name} {value}: {path} was made with {before}; {advice}")
        kinds = {"model": f"from another model than {config.model}", "rows": f"with other rows than {config.train}"}
        for name, meaning in kinds.items():
            if state["identity"].get(name) != identity[name]:
                raise InputError(f"{path}: was made {meaning} is now; use another --output to start anew")
        own = trained_parameters(run.model)
        if set(own) != set(state["model"]) or any(own[name].shape != p.shape for name, p in state["model"].items()):
            raise RuntimeError("it holds other parameters than this model trains")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state["model"][name])
        for name in STATEFUL:
            getattr(run, name).load_state_dict(copy.deepcopy(state[name]))  # the file must not stay in use
        torch.set_rng_state(state["random"]["cpu"])
        if len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        run.step = state["step"]


class StopRequest:
    """Within the block, SIGTERM and Ctrl-C set `signal` and do nothing else, so that a step ends whole; a second
    Ctrl-C interrupts at once. Where signals cannot be caught (another thread), nothing changes."""

    def __init__(self):
        self.signal, self.before = 0, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ValueError):
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
