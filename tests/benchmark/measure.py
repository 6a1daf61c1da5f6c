"""Seconds and memory of jobs that are run in turn, so that what disturbs the machine disturbs all of them."""

import ctypes
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

Job = Callable[[], object]
CARDS = (24, 48, 80)  # GB of memory
# Multiplications and additions a second in dense bfloat16, as published by the maker, by a part of the card's name.
PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def alternate(jobs: dict[str, Job], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Run each job once to warm up, then all of them in turn, `repeats` times: {name: seconds of each round}."""
    for job in jobs.values():
        job()
    rounds = [{name: timed(job, device) for name, job in jobs.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in jobs}


def timed(job: Job, device: torch.device) -> float:
    """Seconds of one run."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    gc.collect()
    wait()
    start = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - start


def measured(jobs: dict[str, Job], at) -> tuple[dict, dict, dict]:
    """Of each job: the seconds by `alternate`, and the GB by `memory`, at the peak and added. Takes the jobs out of
    `jobs`: what one alone holds, such as a reference model, does not count against the next."""
    times, peaks, added = alternate(jobs, at.repeats, at.device), {}, {}
    for name in list(jobs):
        jobs[name]()  # after others have run
        peaks[name], added[name] = memory(jobs.pop(name), at.device)
    return times, peaks, added


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Of two jobs' figures, round by round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def fresh(device: torch.device, limit: float = math.inf) -> None:
    """Give back what nobody holds any more, and from here on let torch have so many GB of the card's memory at most."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * limit / torch.cuda.mem_get_info()[1]))


def spread(values: list[float]) -> str:
    """The median, the lowest and the highest.

    >>> spread([2.0, 3.0, 4.0])
    '3.00 (2.00 to 4.00)'
    """
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def share(part: float | None, whole: float | None = 1.0) -> str:
    """part / whole, where both are known."""
    return "–" if part is None or not whole else f"{part / whole:.2f}"


def utilisation(operations: float, times: list[float], device: torch.device) -> tuple[str, float]:
    """10¹² operations a second, in words, and their share of the card's peak, 0 if PEAK does not have the card."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    rate = operations / median(times)
    part = rate / next((peak for card, peak in PEAK.items() if card in name), math.inf)
    return f"{rate / 1e12:.2g}" + (f" ({100 * part:.0f} %)" if part else ""), part


def memory(job: Job, device: torch.device) -> tuple[float | None, float | None]:
    """GB over one run of the job: the peak, with all that lay in memory, and how far that is above what lay there
    before. On CUDA what torch has allocated, on a CPU the process's resident memory, by Linux (None elsewhere)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, or it would count as still in use
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew from here
            before = _resident("VmRSS")
        except (OSError, IndexError):
            return None, None
        job()
        peak = _resident("VmHWM")
    return peak / 1e9, (peak - before) / 1e9


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])
