"""Rows of the experiment side by side: each in a process with one thread, so that the figures do not depend on how many
cores there are."""

import argparse
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partialmethod
from multiprocessing import active_children, get_context
from os import cpu_count

import torch
from tqdm import tqdm

from mlc_min.lab.experiment import World, run, slug

_world = cache(World.load)  # a row copies the base model before it is trained


def one(name: str, arguments: argparse.Namespace, line: int | None = None) -> dict:
    """The result of one row by the main job's flags, see `experiment.run`. line: where its progress bars are shown."""
    if line is not None:
        tqdm.__init__ = partialmethod(tqdm.__init__, position=line)
    world = _world(arguments.split, arguments.device, arguments.test_rows)
    return run(world, name, arguments.seed, arguments.output / slug(name), steps=arguments.steps)


def side_by_side(names: list[str], arguments: argparse.Namespace) -> dict[str, dict]:
    """{name: result of `one`}, as many at a time as there are cores."""
    with ProcessPoolExecutor(min(len(names), cpu_count() or 1), get_context("spawn"), _alone) as pool:
        try:
            return dict(zip(names, pool.map(one, names, [arguments] * len(names), range(len(names))), strict=True))
        except BaseException:  # the others would go on for minutes
            for child in active_children():
                child.terminate()
            raise


def _alone() -> None:
    """One thread; and Ctrl-C is left to the process that started this one."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
