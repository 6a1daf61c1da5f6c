"""Seconds and memory of jobs that are run in turn, so that what disturbs the machine disturbs all of them."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

Jobs = dict[str, Callable[[], object]]


def alternate(jobs: Jobs, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Run each job once to warm up, then all of them in turn, `repeats` times: {name: seconds of each round}."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Of two jobs' seconds, round by round: the median, the lowest and the highest.

    >>> ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    return {"median": median(ratios), "low": ratios[0], "high": ratios[-1]}


# --- as they stand in a table ---


def seconds(values: list[float]) -> str:
    return f"{median(values):.3g}"


def spread(values: dict[str, float]) -> str:
    """A ratio with its range.

    >>> spread({"median": 3.0, "low": 2.0, "high": 4.0})
    '3.00 (2.00 to 4.00)'
    """
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"


def gigabytes(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def share(part: float | None, whole: float | None) -> str:
    return "–" if part is None or not whole else f"{part / whole:.2f}"


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
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, or it would count as still in use
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew from here
            self.before = _resident("VmRSS")
        except OSError:
            pass

    def read(self) -> dict[str, float | None]:
        """GB: `peak`, with all that lay in memory; `added`, above what lay there at the start."""
        if self.before is None:
            return {"peak": None, "added": None}
        is_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else _resident("VmHWM")
        return {"peak": peak / 1e9, "added": (peak - self.before) / 1e9}


def peak_memory(job: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """What `HighWater` reads over one run of the job, after another one has made what stays (optimizer state)."""
    job()
    mark = HighWater(device)
    job()
    return mark.read()


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")
