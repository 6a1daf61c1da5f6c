"""Saves that are whole or not there: write beside the target, then rename."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give the path of a file beside the target to write; it takes the target's place when the block ends well, and is
    removed when it does not."""
    path = Path(path)
    fresh = path.with_name(f".{path.name}.new")
    try:
        yield fresh
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


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
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    write(fresh)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
