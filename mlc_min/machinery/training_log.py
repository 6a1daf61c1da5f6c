"""What a person watches and a program reads: each logged step as one line on the screen and one of JSON."""

import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from mlc_min.machinery.errors import InputError
from mlc_min.machinery.saving import write_atomically

TIMES = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_gb")  # differ from run to run


class MetricsLog:
    """Each logged step as a dict in `history`, as a line on the screen, as a line of a JSON-lines file and, if asked
    for, to TensorBoard."""

    def __init__(self, path: Path | None, start: int, steps: int, quiet: bool, report_to: str = "none"):
        self.path, self.start, self.steps, self.quiet = path, start, steps, quiet
        self.history: list[dict] = []
        self.board = None
        if path is not None:
            # A resumed run keeps the lines up to its checkpoint; the steps after it are done again.
            if start and path.exists():
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                self.history = [metrics for metrics in lines if metrics["step"] < start]
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

    def write(self, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        done = metrics["step"] + 1 - self.start
        metrics["tokens_per_second"] = round(self.tokens / max(now - self.since, 1e-9))
        metrics["peak_memory_gb"] = round(peak_memory_gb(), 2)
        metrics["seconds"] = round(now - self.started, 2)
        metrics["seconds_left"] = round((now - self.started) / done * (self.steps - metrics["step"] - 1), 1)
        self.tokens, self.since = 0, now
        self.history.append(metrics)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, metrics["step"])
            self.board.flush()
        if not self.quiet:
            tqdm.write(log_line(metrics))


def peak_memory_gb() -> float:
    """The most memory this process has held, in 10⁹ bytes: of the GPU if one is used, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows has none
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def log_line(metrics: dict[str, float]) -> str:
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
    line += f"  {metrics['tokens_per_second']:6.0f} tok/s  {metrics['peak_memory_gb']:5.1f} GB"
    return line + f"  {minutes:3d}:{seconds:02d} left"
