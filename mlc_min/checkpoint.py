"""A training run's whole state in one file, so that a stopped run continues to bit-identical weights (on CPU)."""

import pickle
from dataclasses import asdict
from pathlib import Path

import torch

from mlc_min.errors import InputError
from mlc_min.saving import replacing

# What a resumed run may change: none of these touches the arithmetic.
FREE_SETTINGS = ("output", "device", "log_every", "save_every", "resume")


def save_checkpoint(path: Path, step: int, config, **stateful) -> None:
    """Write step, settings and the state_dict of each of `stateful`, whole or not at all."""
    settings = {k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS}
    state = {"step": step, "settings": settings} | {name: part.state_dict() for name, part in stateful.items()}
    with replacing(path) as fresh:
        torch.save(state, fresh)


def load_checkpoint(path: Path, config, **stateful) -> int:
    """Restore each of `stateful` in place and return the number of steps done; 0 if there is no file.

    Loads tensors and plain values only, no code. Raises InputError if the file is damaged or of other settings.
    """
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        saved, parts = state["settings"], {name: state[name] for name in stateful}
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint ({reason}); delete it to start anew") from None
    for name, value in asdict(config).items():
        if name not in FREE_SETTINGS and saved.get(name) != value:
            raise InputError(
                f"--{name} {value}: {path} was made with {saved.get(name)}; use that, or another --output to start anew"
            )
    for name, part in stateful.items():
        part.load_state_dict(parts[name])
    return state["step"]
