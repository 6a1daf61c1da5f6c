"""Seconds and memory of jobs that are run in turn, so that what disturbs the machine disturbs all of them."""

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from transformers import TrainerCallback

Job = Callable[[], object]


def alternate(jobs: dict[str, Job], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Run each job once to warm up, then all of them in turn, `repeats` times: {name: seconds of each round}."""
    for job in jobs.values():
        job()
    rounds = [{name: timed(job, device) for name, job in jobs.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in jobs}


def timed(job: Job, device: torch.device) -> float:
    """Seconds of one run."""
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Of two jobs' figures, round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


# --- as they stand in a table ---


def seconds(values: list[float]) -> str:
    return f"{median(values):.3g}"


def spread(values: list[float]) -> str:
    """The median, the lowest and the highest.

    >>> spread([2.0, 3.0, 4.0])
    '3.00 (2.00 to 4.00)'
    """
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def gigabytes(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def share(part: float | None, whole: float | None) -> str:
    return gigabytes(part / whole if whole and part is not None else None)


# --- memory ---


class HighWater:
    """Memory from the moment this is made: on CUDA what torch has allocated, on a CPU the process's resident memory,
    by Linux (None elsewhere)."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError, IndexError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, or it would count as still in use
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew from here
            self.before = _resident("VmRSS")

    def read(self) -> dict[str, float | None]:
        """GB: `peak`, with all that lay in memory; `added`, above what lay there at the start."""
        if self.before is None:
            return {"peak": None, "added": None}
        is_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else _resident("VmHWM")
        return {"peak": peak / 1e9, "added": (peak - self.before) / 1e9}


def peak_memory(job: Job, device: torch.device) -> dict[str, float | None]:
    """What `HighWater` reads over one run of the job, after another one has made what stays (optimizer state)."""
    job()
    mark = HighWater(device)
    job()
    return mark.read()


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


# --- in turn with a trainer of somebody else's ---


class InTurn(TrainerCallback):
    """Times each step of the trainer and then a step of ours; the first two steps are a warm-up and for the memory.
    seconds, memory: (theirs, ours)."""

    def __init__(self, job, device: torch.device):
        self.job, self.device = job, device
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self.memory: tuple[float | None, float | None] = (None, None)

    def on_step_begin(self, args, state, control, **kwargs):
        gc.collect()
        if state.global_step == 1:
            self.mark = HighWater(self.device)
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        elapsed = time.perf_counter() - self.start
        if state.global_step == 2:
            self.memory = self.mark.read()["added"], peak_memory(self.job, self.device)["added"]
        if state.global_step <= 2:
            self.job()
            return
        self.seconds[0].append(elapsed)
        self.seconds[1].append(timed(self.job, self.device))
