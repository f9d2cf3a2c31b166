"""Storage: the folder for what users ask this server to keep, and the one thread that works in it.

It is made when something is written for the first time, is readable by its owner only, and belongs
to one server at a time: the lock of the database is held for as long as it is open.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from modules.batch_store import SCHEMA, BatchStore
from modules.errors import CapabilityError, NotConfiguredError
from modules.file_store import FileStore
from modules.settings import Settings
from modules.worker import Worker

Result = TypeVar("Result")

DATABASE = "storage.sqlite3"
FILES = "files"
GIB = 2**30
CLOSE_SECONDS = 5


@dataclass(frozen=True, slots=True)
class UserData:
    """What is kept, for one thread at a time."""

    files: FileStore
    batches: BatchStore
    database: sqlite3.Connection

    def close(self) -> None:
        self.database.close()


class Storage:
    """For the event loop. What is asked of it raises NotConfiguredError where there is no folder to
    be had, and CapabilityError when the disk fails.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.time) -> None:
        self._folder = settings.user_data_dir
        self._quota = int(settings.storage_quota * GIB)
        self.now = now
        self._user_data: UserData | None = None
        self._worker = Worker("storage", self._open)

    async def write(self, work: Callable[[UserData], Result]) -> Result:
        """What `work` makes of the folder, which is made if need be."""
        with _explain_faults(self._folder):
            return await self._worker.run(work)

    async def read(self, work: Callable[[UserData], Result]) -> Result:
        """The same; but a folder in which nothing was ever written stays as it is, and is empty."""
        with _explain_faults(self._folder):
            if await asyncio.to_thread((self._folder / DATABASE).exists):
                return await self._worker.run(work)
            return await asyncio.to_thread(self._read_nothing, work)

    def close(self) -> None:
        """Let others have the folder. Waits for what is being written."""
        if self._user_data is not None:
            with suppress(CapabilityError, TimeoutError):
                self._worker.submit(UserData.close).result(CLOSE_SECONDS)
        self._worker.close()

    def _open(self) -> UserData:
        with _explain_faults(self._folder):
            self._user_data = open_user_data(self._folder, self._quota, self.now)
        return self._user_data

    def _read_nothing(self, work: Callable[[UserData], Result]) -> Result:
        _check_place(self._folder)
        database = sqlite3.connect(":memory:")
        try:
            database.executescript(SCHEMA)
            return work(_build(database, self._folder, self._quota, self.now))
        finally:
            database.close()


def open_user_data(folder: Path, quota: int, now: Callable[[], float] = time.time) -> UserData:
    """Raises NotConfiguredError if another process has it open, and OSError and sqlite3.Error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / FILES).mkdir(mode=0o700, exist_ok=True)
    database = _open_database(folder / DATABASE)
    user_data = _build(database, folder, quota, now)
    user_data.files.sweep()
    user_data.files.remove_expired()
    return user_data


def _build(
    database: sqlite3.Connection, folder: Path, quota: int, now: Callable[[], float]
) -> UserData:
    files = FileStore(database, folder / FILES, quota, now)
    return UserData(files, BatchStore(database, files, now), database)


def _open_database(path: Path) -> sqlite3.Connection:
    with suppress(FileExistsError):  # what SQLite adds beside it gets the same permissions
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    # One thread at a time, but not always the same: a worker's thread ends when it is idle.
    database = sqlite3.connect(path, timeout=1, check_same_thread=False)
    try:
        # The first of them decides that the lock, once taken, is kept; the system gives it back if
        # this process dies, however.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        # A result that is lost in a power failure would be computed, and maybe paid for, twice.
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA secure_delete = ON")
        database.executescript(SCHEMA)
    except sqlite3.OperationalError as error:
        database.close()
        if "locked" not in str(error):
            raise
        message = f"{path.parent} is in use by another server. {_ADVICE}"
        raise NotConfiguredError(message) from error
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_ADVICE = "Start this one with --user-data-dir and a folder of its own."


@contextmanager
def _explain_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSALS:
            raise _build_refusal(folder) from error
        raise CapabilityError(f"{folder} cannot be used: {error.strerror}.") from error
    except sqlite3.Error as error:
        raise CapabilityError(f"{folder / DATABASE} cannot be used: {error}.") from error


def _check_place(folder: Path) -> None:
    """Raises NotConfiguredError if it could not be made. Does not try."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise _build_refusal(folder)


def _build_refusal(folder: Path) -> NotConfiguredError:
    return NotConfiguredError(
        f"Files and batches are kept in a folder, and {folder} cannot be written. Start the server "
        "with --user-data-dir and a folder that can."
    )
