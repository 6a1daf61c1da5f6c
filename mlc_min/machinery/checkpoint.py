"""A training run's whole state in one file, so that a stopped run continues to bit-identical weights (on CPU)."""

import copy
import pickle
from dataclasses import asdict
from pathlib import Path

import torch

from mlc_min.loop import Run
from mlc_min.machinery.errors import InputError, first_line
from mlc_min.machinery.files import replacing

# What a resumed run may change: none of these touches the arithmetic.
FREE_SETTINGS = (
    "config", "preset", "output", "device", "log_every", "save_every", "resume", "report_to", "reference_cache"
)  # fmt: skip
STATEFUL = ("extractor", "optimizer", "scheduler")


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
    try:
        with replacing(path) as fresh:
            torch.save(state, fresh)
    except (OSError, RuntimeError) as error:
        kept = "the one before it is whole" if path.exists() else "there is none before it"
        raise InputError(f"{path}: step {run.step} cannot be saved ({first_line(error)}); make room; {kept}") from None


def read_checkpoint(path: Path) -> dict | None:
    """What `save_checkpoint` wrote, None if there is no file; tensors and plain values only, no code, and from the disk
    as they are used. Raises InputError if it is damaged."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if not all(name in state for name in ("step", "settings", "identity", "model", "random", *STATEFUL)):
            raise KeyError("something is missing in it")
        return state
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a whole checkpoint ({first_line(error)}); delete it to start anew") from None


def restore(path: Path, state: dict, run: Run, config, identity: dict[str, str]) -> None:
    """Put a checkpoint's state into the run. Raises InputError if it is of other settings, model or rows."""
    try:
        for name, value in asdict(config).items():
            if name not in FREE_SETTINGS and state["settings"].get(name) != value:
                raise InputError(
                    f"--{name} {value}: {path} was made with {state['settings'].get(name)}; "
                    "use that, or another --output to start anew"
                )
        for name, meaning in (
            ("model", f"from another model than {config.model} is now"),
            ("rows", f"with other rows than {config.train} holds now"),
        ):
            if state["identity"].get(name) != identity[name]:
                raise InputError(f"{path}: was made {meaning}; use another --output to start anew")
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
    except InputError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a whole checkpoint ({first_line(error)}); delete it to start anew") from None
