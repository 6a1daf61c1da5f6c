"""What a person watches and a program reads: each logged step as one line on the screen and one of JSON."""

import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from mlc_min.machinery.errors import InputError
from mlc_min.machinery.files import write_atomically

TIMES = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_gb")  # differ from run to run


class MetricsLog:
    """Each logged step as a dict in `history`, as a line on the screen, as a line of a JSON-lines file and, if asked
    for, to TensorBoard."""

    def __init__(self, path: Path | None, start: int, steps: int, quiet: bool, report_to: str, device: torch.device):
        self.path, self.start, self.steps, self.quiet, self.device = path, start, steps, quiet, device
        self.history: list[dict] = []
        self.board = None
        if path is not None:
            # A resumed run keeps the lines up to its checkpoint; the steps after it are done again.
            self.history = [metrics for metrics in whole_lines(path) if metrics["step"] < start] if start else []
            write_atomically(path, "".join(json.dumps(metrics) + "\n" for metrics in self.history))
            if report_to == "tensorboard":
                try:
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError:
                    message = "--report_to tensorboard: needs tensorboard; run `pip install tensorboard`"
                    raise InputError(message) from None
                self.board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=start)
        self.started = time.perf_counter()
        self.tokens, self.since = 0, self.started

    def write(self, metrics: dict) -> None:
        now = time.perf_counter()
        done = metrics["step"] + 1 - self.start
        metrics["tokens_per_second"] = round(self.tokens / max(now - self.since, 1e-9))
        metrics["peak_memory_gb"] = peak_memory_gb(self.device)
        metrics["seconds"] = round(now - self.started, 2)
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


def whole_lines(path: Path) -> list[dict]:
    """The log's lines; a last one that was being written when the machine stopped is left out.

    Raises InputError for any other that is none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            if type(found["step"]) is not int:
                raise ValueError
            metrics.append(found)
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise InputError(f"{path}:{number}: not a line of the log; delete it, or the file") from None
    return metrics


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


def log_line(metrics: dict) -> str:
    """One aligned line of the figures that a person watches."""
    line = f"step {metrics['step']:5d}  loss {metrics['loss']:7.4f}  align {metrics['align_loss']:7.4f}"
    if "accuracy" in metrics:
        line += f"  acc {metrics['accuracy']:4.2f}  margin {metrics['margin']:6.2f}"
    if "mlc_loss" in metrics:
        line += f"  mlc {metrics['mlc_floor']:.3f} < {metrics['mlc_loss']:.3f} < {metrics['mlc_ceiling']:.3f}"
        if "mlc_shuffled" in metrics:
            line += f"  (shuffled {metrics['mlc_shuffled']:.3f})  retrieval {metrics['retrieval']:4.2f}"
    line += f"  lr {metrics['learning_rate']:.1e}  grad {metrics['grad_norm']:6.2f}"
    minutes, seconds = divmod(round(metrics["seconds_left"]), 60)
    line += f"  {metrics['tokens_per_second']:6.0f} tok/s"
    if metrics["peak_memory_gb"] is not None:
        line += f"  {metrics['peak_memory_gb']:5.1f} GB"
    return line + f"  {minutes:3d}:{seconds:02d} left"
