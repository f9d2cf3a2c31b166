"""FileStore: files that users upload and results that are made for them, until they are deleted.

A file is a row of the database and a content beside it, under its id: the name that a user gave is
data, never a path. A content is whole on the disk before its row is there, and its row is gone
before the content is; what has no row is swept away when the folder is opened.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from modules.errors import InvalidRequestError, ObjectNotFoundError, StorageFullError

UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
"""States of batches whose input is still needed."""
IS_UNFINISHED = f"status IN {UNFINISHED}"

IS_ALIVE = "(expires_at IS NULL OR expires_at > :now)"
COLUMNS = "id, filename, purpose, num_bytes, created_at, expires_at"


@dataclass(frozen=True, slots=True)
class StoredFile:
    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    """Seconds since 1970, as all times here."""
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """One that is on the disk, whole, under its id."""

    id: str
    num_bytes: int


def make_id(prefix: str) -> str:
    """Ids sort by the time that they were made at, so that a list can go on after one of them even
    if what it stood for is gone.
    """
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


class FileStore:
    """For one thread at a time."""

    def __init__(
        self,
        database: sqlite3.Connection,
        folder: Path,
        quota: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`quota` is in bytes, for all files and all results of batches."""
        self._db = database
        self._folder = folder
        self._quota = quota
        self._now = now

    def add(
        self, filename: str, purpose: str, content: bytes, expires_in: int | None = None
    ) -> StoredFile:
        """`expires_in` is in seconds. Raises StorageFullError."""
        self.remove_expired()
        self.check_quota(len(content))
        written = self.write([content])
        try:
            with self._db:
                return self.insert(written, filename, purpose, expires_in)
        except BaseException:
            self.discard(written)
            raise

    def write(self, chunks: Iterable[bytes]) -> Content:
        """A content without a row: `insert` makes a file of it."""
        name = make_id("file-")
        partial = self._folder / f"{name}.part"
        try:
            num_bytes = _write_whole(partial, chunks)
            partial.rename(self._folder / name)
            _sync_folder(self._folder)
        except BaseException:
            partial.unlink(missing_ok=True)
            (self._folder / name).unlink(missing_ok=True)
            raise
        return Content(name, num_bytes)

    def discard(self, content: Content) -> None:
        """One that no file was made of."""
        (self._folder / content.id).unlink(missing_ok=True)

    def insert(
        self, content: Content, filename: str, purpose: str, expires_in: int | None = None
    ) -> StoredFile:
        """Inside the caller's transaction."""
        created_at = int(self._now())
        expires_at = None if expires_in is None else created_at + expires_in
        row = (content.id, filename, purpose, content.num_bytes, created_at, expires_at)
        self._db.execute(f"INSERT INTO files ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", row)
        return StoredFile(*row)

    def get(self, file_id: str) -> StoredFile:
        """Raises ObjectNotFoundError."""
        row = self._db.execute(
            f"SELECT {COLUMNS} FROM files WHERE id = :id AND {IS_ALIVE}",
            {"id": file_id, "now": self._now()},
        ).fetchone()
        if row is None:
            raise ObjectNotFoundError("file", file_id)
        return StoredFile(*row)

    def get_path(self, file_id: str) -> Path:
        """Where the content is. Raises ObjectNotFoundError, also if somebody has taken it away."""
        path = self._folder / self.get(file_id).id
        if not path.is_file():
            raise ObjectNotFoundError("file", file_id)
        return path

    def read(self, file_id: str) -> bytes:
        """What a batch reads, even if its time is over. Raises ObjectNotFoundError."""
        row = self._db.execute("SELECT 1 FROM files WHERE id = ?", (file_id,)).fetchone()
        path = self._folder / file_id
        if row is None or not path.is_file():
            raise ObjectNotFoundError("file", file_id)
        return path.read_bytes()

    def list_page(
        self,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        is_ascending: bool = False,
    ) -> tuple[list[StoredFile], bool]:
        """At most `limit` of them, and whether there are more."""
        order, comparison = ("ASC", ">") if is_ascending else ("DESC", "<")
        rows = self._db.execute(
            f"SELECT {COLUMNS} FROM files WHERE {IS_ALIVE}"
            f" AND (:after IS NULL OR id {comparison} :after)"
            f" AND (:purpose IS NULL OR purpose = :purpose) ORDER BY id {order} LIMIT :limit",
            {"now": self._now(), "after": after, "purpose": purpose, "limit": limit + 1},
        ).fetchall()
        return [StoredFile(*row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str) -> None:
        """Raises ObjectNotFoundError, and InvalidRequestError while a batch reads it."""
        self.get(file_id)
        reader = self._db.execute(
            f"SELECT id FROM batches WHERE input_file_id = ? AND {IS_UNFINISHED}", (file_id,)
        ).fetchone()
        if reader is not None:
            message = f"The batch {reader[0]} still reads this file. Wait for it, or cancel it."
            raise InvalidRequestError(message, "file_id")
        self._remove([file_id])

    def remove_expired(self) -> None:
        """All whose time is over, but for those that a batch still reads."""
        rows = self._db.execute(
            "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN"
            f" (SELECT input_file_id FROM batches WHERE {IS_UNFINISHED})",
            (self._now(),),
        ).fetchall()
        self._remove([file_id for (file_id,) in rows])

    def sweep(self) -> None:
        """Remove contents without a row: what was being written, or deleted, when a server died."""
        known = {file_id for (file_id,) in self._db.execute("SELECT id FROM files")}
        for path in self._folder.iterdir():
            if path.name.startswith("file-") and path.name not in known:
                path.unlink()

    def check_quota(self, num_bytes: int) -> None:
        """Raises StorageFullError if there is no room for so many more."""
        (num_used,) = self._db.execute(
            "SELECT (SELECT TOTAL(num_bytes) FROM files)"
            " + (SELECT TOTAL(num_result_bytes) FROM batches)"
        ).fetchone()
        if num_used + num_bytes > self._quota:
            raise StorageFullError(num_bytes, max(0, self._quota - int(num_used)))

    def _remove(self, file_ids: list[str]) -> None:
        if not file_ids:
            return
        with self._db:
            self._db.executemany("DELETE FROM files WHERE id = ?", [(name,) for name in file_ids])
        for file_id in file_ids:
            (self._folder / file_id).unlink(missing_ok=True)
        forget(self._db)


def forget(database: sqlite3.Connection) -> None:
    """Leave nothing of deleted rows in the log: in the database, they are written over."""
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _write_whole(path: Path, chunks: Iterable[bytes]) -> int:
    """Until it is on the disk; the number of bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.writelines(chunks)
        num_bytes = file.tell()
        file.flush()
        os.fsync(descriptor)
    return num_bytes


def _sync_folder(folder: Path) -> None:
    """Make a renaming last; systems without folders that can be opened have no need of it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
