"""What a person watches and a program reads: each logged step as one line on the screen and one of JSON; and what the
figures were measured on and with."""

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from mlc_min.machinery.errors import refusing
from mlc_min.machinery.files import write_atomically

SHOWN = (
    "step {step:5d}", "loss {loss:7.4f}", "align {align_loss:7.4f}", "acc {accuracy:4.2f}", "margin {margin:6.2f}",
    "mlc {mlc_floor:.3f} < {mlc_loss:.3f} < {mlc_ceiling:.3f}", "(shuffled {mlc_shuffled:.3f})",
    "retrieval {retrieval:4.2f}", "lr {learning_rate:.1e}", "grad {grad_norm:6.2f}",
    "{tokens_per_second:6.0f} tok/s", "{peak_memory_gb:5.1f} GB",
)  # fmt: skip


class MetricsLog:
    """Each logged step as a dict in `history`, as a line on the screen, as a line of a JSON-lines file and, if asked
    for, to TensorBoard."""

    def __init__(self, path: Path | None, start: int, steps: int, quiet: bool, report_to: str, device: torch.device):
        self.path, self.start, self.steps, self.quiet, self.device = path, start, steps, quiet, device
        self.history: list[dict] = []
        self.board = None
        if path is not None:
            self.history = lines_before(path, start) if start else []
            write_atomically(path, "".join(json.dumps(metrics) + "\n" for metrics in self.history))
            if report_to == "tensorboard":
                with refusing("--report_to tensorboard: needs tensorboard; run `pip install tensorboard`", ImportError):
                    from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=start)
        self.started = time.perf_counter()
        self.tokens, self.since = 0, self.started

    def write(self, metrics: dict) -> None:
        """Add speed, memory and times to the figures of a step, and log them."""
        now = time.perf_counter()
        done = metrics["step"] + 1 - self.start
        metrics["tokens_per_second"] = round(self.tokens / max(now - self.since, 1e-9))
        metrics |= {"peak_memory_gb": peak_memory_gb(self.device), "seconds": round(now - self.started, 2)}
        metrics["seconds_left"] = round((now - self.started) / done * (self.steps - metrics["step"] - 1), 1)
        self.tokens, self.since = 0, now
        self.history.append(metrics)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                if value is not None:
                    self.board.add_scalar(name, value, metrics["step"])
            self.board.flush()
        if not self.quiet:
            tqdm.write(log_line(metrics))


def lines_before(path: Path, start: int) -> list[dict]:
    """The log's lines of the steps before `start`, where a resumed run goes on; a last one without its newline was
    being written when the machine stopped. Raises InputError for a line that is none."""
    kept = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], 1):
        with refusing(f"{path}:{number}: not a line of the log; delete it, or the file"):
            metrics = json.loads(line)
            if metrics["step"] < start:
                kept.append(metrics)
    return kept


def log_line(metrics: dict) -> str:
    """One aligned line of the figures that a person watches, those of them that this step has."""
    parts = []
    for part in SHOWN:
        with suppress(KeyError, TypeError):  # not there, or None
            parts.append(part.format_map(metrics))
    minutes, seconds = divmod(round(metrics["seconds_left"]), 60)
    return "  ".join([*parts, f"{minutes:3d}:{seconds:02d} left"])


def peak_memory_gb(device: torch.device) -> float | None:
    """The most memory that this process has held on the device, in 10⁹ bytes; None where that cannot be asked."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def hardware(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    own = "" if device.type == "cpu" else f"{device.type}, "
    return f"{own}{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """{"python", "torch", "transformers": version}."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def git_commit() -> str | None:
    """The commit of this package, with "+ changes" if its files differ from it; None outside of a repository."""
    git = partial(subprocess.check_output, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL, text=True)
    try:
        changes = git(["git", "status", "--porcelain", "--", "."])
        return git(["git", "rev-parse", "HEAD"]).strip() + (" + changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
