"""A training run's whole state in one file, so that a stopped run continues to bit-identical weights (on CPU)."""

import pickle
from dataclasses import asdict
from pathlib import Path

import torch

from mlc_min.machinery.errors import InputError
from mlc_min.machinery.saving import replacing

# What a resumed run may change: none of these touches the arithmetic.
FREE_SETTINGS = (
    "config", "preset", "output", "device", "log_every", "save_every", "resume", "report_to", "reference_cache"
)  # fmt: skip


class Trained:
    """The parameters of a model that are trained; the others come from the model's own folder."""

    def __init__(self, model):
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        own = self.state_dict()
        if set(own) != set(state) or any(own[name].shape != state[name].shape for name in own):
            raise RuntimeError("it holds other parameters than this model trains")
        for name, parameter in own.items():
            parameter.copy_(state[name])


class RandomState:
    """torch's random number generators. Nothing in the loop draws from them; a changed loop might."""

    def state_dict(self) -> dict:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state: dict) -> None:
        torch.set_rng_state(state["cpu"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(path: Path, step: int, config, data: str, **stateful) -> None:
    """Write step, settings, `data` (a hash of the rows) and the state_dict of each of `stateful`, whole or not at all.

    Raises InputError if it cannot be written, a full disk for instance; the checkpoint before it stays.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS}
    state = {"step": step, "settings": settings, "data": data} | {
        name: part.state_dict() for name, part in stateful.items()
    }
    try:
        with replacing(path) as fresh:
            torch.save(state, fresh)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        kept = "the one before it is whole" if path.exists() else "there is none before it"
        raise InputError(f"{path}: step {step} cannot be saved ({reason}); make room; {kept}") from None


def load_checkpoint(path: Path, config, data: str, **stateful) -> int:
    """Restore each of `stateful` in place and return the number of steps done; 0 if there is no file.

    Loads tensors and plain values only, no code. Raises InputError if it is damaged, or of other settings or rows.
    """
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        saved, parts = state["settings"], {name: state[name] for name in stateful}
        for name, value in asdict(config).items():
            if name not in FREE_SETTINGS and saved.get(name) != value:
                raise InputError(
                    f"--{name} {value}: {path} was made with {saved.get(name)}; "
                    "use that, or another --output to start anew"
                )
        if state["data"] != data:
            raise InputError(f"{path}: was made with other rows than {config.train} holds now; use another --output")
        for name, part in stateful.items():
            part.load_state_dict(parts[name])
    except InputError:
        raise
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint ({reason}); delete it to start anew") from None
    return state["step"]
