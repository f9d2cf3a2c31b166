"""Folders that are made of a user's files once and used from then on: `models/.converted`.

What is in them is up to the caller; here is where they are, and that none is ever half there.
"""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER = ".converted"


def to_folder_name(stem: str, key: str) -> str:
    """Another `key`, another folder."""
    return f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def convert_once(
    target: Path, write: Callable[[Path], None], on_progress: Callable[[str], None]
) -> None:
    """Have `write` fill a new folder, which is moved to `target` when it is complete.

    If `target` is there, nothing happens. Conversions take turns, also among processes; one that is
    killed leaves nothing that could be taken for a model.
    """
    if target.is_dir():
        return
    root = target.parent
    root.mkdir(parents=True, exist_ok=True)
    with _turn(root, on_progress):
        _remove_leftovers(root)
        if not target.is_dir():
            _fill(target, write)


def _turn(root: Path, on_progress: Callable[[str], None]) -> AbstractContextManager[object]:
    """The lock of the folder, held until the end of the `with`, or of the process."""
    lock = FileLock(root / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        on_progress("Waiting for another conversion to end")
        return lock.acquire()


def _remove_leftovers(root: Path) -> None:
    """Only for the one who holds the lock: whoever wrote these is dead."""
    for folder in root.glob("*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _fill(target: Path, write: Callable[[Path], None]) -> None:
    work = target.with_name(target.name + ".tmp")
    work.mkdir()
    try:
        write(work)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
