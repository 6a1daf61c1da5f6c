"""Saves that are whole or not there, after a power cut too: write beside the target, bring it to the disk, rename."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlc_min.machinery.errors import InputError, refusing

DATA = Path(__file__).resolve().parents[2] / "data"  # of the checkout; a package that was copied elsewhere has none
EMBEDDED = Path(os.environ.get("MLC_MIN_WORLD") or DATA / "embedded")  # or another that `lab.toy_world` made


def shipped(path: str | Path) -> Path:
    """The path; raises InputError where the repository's data, or the world of MLC_MIN_WORLD, are not there."""
    path = Path(path)
    if DATA not in EMBEDDED.parents and EMBEDDED in (path, *path.parents) and not (EMBEDDED / "lexicon.json").exists():
        raise InputError(f"MLC_MIN_WORLD={EMBEDDED}: no lexicon.json there; copy that of data/embedded or data/large")
    if DATA in path.parents and not DATA.is_dir():
        raise InputError(f"{path}: installed without the repository's data; clone it and run `pip install -e .` there")
    return path


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only on its way there."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give the path of a file or folder beside the target to write; it takes the target's place when the block ends
    well, and is removed when it does not."""
    path = Path(path)
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        yield fresh
        for part in [*fresh.rglob("*"), fresh]:
            sync(part)
        if fresh.is_dir() and path.exists():  # only a file can be replaced in one step
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.replace(fresh, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # leaves a file alone
        fresh.unlink(missing_ok=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: str | Path, text: str) -> None:
    """Replace the file's content by `text` (UTF-8); a crash in between leaves the old file as it was."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    """Replace the file's content by `value` as indented JSON."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def save_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside the target, then swap it in whole: a crash before that leaves the old one."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as fresh:
        shutil.rmtree(fresh, ignore_errors=True)  # of a crash
        fresh.mkdir()
        write(fresh)


def usable_folder(folder: str | Path, flag: str, needed: int = 0) -> Path:
    """The folder, made if need be and tried by writing a file: before hours of work and not after them.

    Raises InputError if that cannot be done, or if there is no room for the `needed` bytes; with the flag that the
    folder was given by.
    """
    folder = Path(folder)
    with refusing(f"{flag} {folder}: cannot be written to (…); give another folder", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    free = shutil.disk_usage(folder).free
    if free < needed:
        room = f"{free / 1e9:.1f} GB are free and {needed / 1e9:.1f} needed"
        raise InputError(f"{flag} {folder}: {room}; make room, or give another folder")
    return folder
