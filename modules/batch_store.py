"""BatchStore: batches of requests, how far each has come, and the results that it has so far.

A line of a batch is done once its result is a row here, and then for ever: it is never run again,
whatever happens to the server. When all are, the rows become files, in one transaction. What is in
a line, and how it is run, is not known here.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from modules.errors import InvalidRequestError, ObjectNotFoundError
from modules.file_store import IS_UNFINISHED, UNFINISHED, Content, FileStore, forget, make_id

# Seconds that a batch may take: OpenAI's only completion window.
COMPLETION_WINDOW = 24 * 60 * 60

FinalStatus = Literal["completed", "cancelled", "expired", "failed"]


@dataclass(frozen=True, slots=True)
class BatchFault:
    """Why a batch cannot be run; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class TokenCounts:
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LineResult:
    """`line` counts from 0; `content` is what a line of the output will be."""

    line: int
    content: str
    is_error: bool
    tokens: TokenCounts = TokenCounts()
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    id: str
    endpoint: str
    input_file_id: str
    metadata: Mapping[str, str] | None
    output_seconds: int | None
    """After so many, its files expire."""
    status: str
    created_at: int
    expires_at: int
    times: Mapping[str, int] = field(default_factory=dict)
    """When it came into each status since."""
    faults: tuple[BatchFault, ...] = ()
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_result_bytes: int = 0
    """Of results that are no file yet."""
    tokens: TokenCounts = TokenCounts()
    model: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def is_unfinished(self) -> bool:
        return self.status in UNFINISHED


_TOKENS = [row.name for row in fields(TokenCounts)]
_COLUMNS = [row.name for row in fields(Batch) if row.name != "tokens"] + _TOKENS
_JSON = ("metadata", "times", "faults")

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    num_bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER
);
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, {", ".join(_COLUMNS[1:])});
CREATE TABLE IF NOT EXISTS results (
    batch_id TEXT NOT NULL, line INTEGER NOT NULL, is_error INTEGER NOT NULL,
    content TEXT NOT NULL, PRIMARY KEY (batch_id, line)
) WITHOUT ROWID;
"""


class BatchStore:
    """For one thread at a time."""

    def __init__(
        self,
        database: sqlite3.Connection,
        files: FileStore,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._db = database
        self._files = files
        self._now = now

    def create(
        self,
        endpoint: str,
        input_file_id: str,
        metadata: Mapping[str, str] | None = None,
        output_seconds: int | None = None,
    ) -> Batch:
        """Raises InvalidRequestError if there is no such file for batches."""
        self._check_input(input_file_id)
        created_at = int(self._now())
        batch = Batch(
            id=make_id("batch_"),
            endpoint=endpoint,
            input_file_id=input_file_id,
            metadata=metadata,
            output_seconds=output_seconds,
            status="validating",
            created_at=created_at,
            expires_at=created_at + COMPLETION_WINDOW,
        )
        marks = ", ".join("?" * len(_COLUMNS))
        with self._db:
            self._db.execute(
                f"INSERT INTO batches ({', '.join(_COLUMNS)}) VALUES ({marks})", _to_row(batch)
            )
        return batch

    def _check_input(self, file_id: str) -> None:
        try:
            purpose = self._files.get(file_id).purpose
        except ObjectNotFoundError as error:
            raise InvalidRequestError(str(error), "input_file_id") from None
        if purpose != "batch":
            message = f"The file was uploaded for {purpose}; a batch reads one whose purpose is "
            raise InvalidRequestError(f"{message}batch.", "input_file_id")

    def get(self, batch_id: str) -> Batch:
        """Raises ObjectNotFoundError."""
        row = self._select("WHERE id = ?", (batch_id,)).fetchone()
        if row is None:
            raise ObjectNotFoundError("batch", batch_id)
        return _to_batch(row)

    def list_page(self, limit: int, after: str | None = None) -> tuple[list[Batch], bool]:
        """At most `limit` of them, the newest first, and whether there are more."""
        condition = "WHERE :after IS NULL OR id < :after ORDER BY id DESC LIMIT :limit"
        rows = self._select(condition, {"after": after, "limit": limit + 1}).fetchall()
        return [_to_batch(row) for row in rows[:limit]], len(rows) > limit

    def list_unfinished(self) -> list[Batch]:
        """The oldest first."""
        rows = self._select(f"WHERE {IS_UNFINISHED} ORDER BY id", ()).fetchall()
        return [_to_batch(row) for row in rows]

    def begin(self, batch_id: str, num_total: int) -> Batch:
        """Its input is in order; one that has been cancelled meanwhile stays so."""
        with self._db:
            self._db.execute("UPDATE batches SET num_total = ? WHERE id = ?", (num_total, batch_id))
            if self.get(batch_id).status == "validating":
                self._enter(batch_id, "in_progress")
        return self.get(batch_id)

    def cancel(self, batch_id: str) -> Batch:
        """Ask for its end. Raises InvalidRequestError if it has come to one."""
        batch = self.get(batch_id)
        if batch.status in ("validating", "in_progress"):
            with self._db:
                self._enter(batch_id, "cancelling")
        elif batch.status != "cancelling":
            message = f"A batch that is {batch.status} cannot be cancelled."
            raise InvalidRequestError(message, "batch_id")
        return self.get(batch_id)

    def find_done(self, batch_id: str) -> frozenset[int]:
        """The lines that have a result."""
        rows = self._db.execute("SELECT line FROM results WHERE batch_id = ?", (batch_id,))
        return frozenset(line for (line,) in rows)

    def add_results(self, batch_id: str, results: Iterable[LineResult]) -> None:
        """A line that has one keeps it."""
        with self._db:
            for result in results:
                self._add(batch_id, result)

    def add_result(self, batch_id: str, result: LineResult) -> None:
        """Raises StorageFullError."""
        self._files.check_quota(len(result.content.encode()))
        self.add_results(batch_id, [result])

    def _add(self, batch_id: str, result: LineResult) -> None:
        inserted = self._db.execute(
            "INSERT OR IGNORE INTO results (batch_id, line, is_error, content) VALUES (?, ?, ?, ?)",
            (batch_id, result.line, result.is_error, result.content),
        )
        if not inserted.rowcount:
            return
        counts = {
            "num_failed" if result.is_error else "num_completed": 1,
            "num_result_bytes": len(result.content.encode()),
            **{name: getattr(result.tokens, name) for name in _TOKENS},
        }
        added = ", ".join(f"{name} = {name} + {number}" for name, number in counts.items())
        self._db.execute(
            f"UPDATE batches SET {added}, model = COALESCE(model, ?) WHERE id = ?",
            (result.model, batch_id),
        )

    def finish(
        self, batch_id: str, status: FinalStatus, faults: Iterable[BatchFault] = ()
    ) -> Batch:
        """Make files of the results, and end it; all at once, or not at all. One that is to be
        cancelled is, even if nothing was left to be done.
        """
        batch = self.get(batch_id)
        if batch.status == "cancelling":
            status = "cancelled"
        if status == "completed" and batch.status == "in_progress":
            with self._db:
                self._enter(batch_id, "finalizing")
        contents: dict[str, Content] = {}
        try:
            for kind, is_error in {"output": False, "error": True}.items():
                if self._has_results(batch_id, is_error):
                    contents[kind] = self._files.write(self._read_lines(batch_id, is_error))
            self._end(batch, status, faults, contents)
        except BaseException:
            for content in contents.values():
                self._files.discard(content)
            raise
        forget(self._db)
        return self.get(batch_id)

    def _end(
        self,
        batch: Batch,
        status: FinalStatus,
        faults: Iterable[BatchFault],
        contents: Mapping[str, Content],
    ) -> None:
        batch_id = batch.id
        with self._db:
            for kind, content in contents.items():
                name = f"{batch_id}_{kind}.jsonl"
                self._files.insert(content, name, "batch_output", batch.output_seconds)
                self._db.execute(
                    f"UPDATE batches SET {kind}_file_id = ? WHERE id = ?", (content.id, batch_id)
                )
            self._db.execute("DELETE FROM results WHERE batch_id = ?", (batch_id,))
            self._db.execute("UPDATE batches SET num_result_bytes = 0 WHERE id = ?", (batch_id,))
            self._set_faults(batch_id, faults)
            self._enter(batch_id, status)

    def _has_results(self, batch_id: str, is_error: bool) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM results WHERE batch_id = ? AND is_error = ?)"
        return bool(self._db.execute(query, (batch_id, is_error)).fetchone()[0])

    def _read_lines(self, batch_id: str, is_error: bool) -> Iterator[bytes]:
        rows = self._db.execute(
            "SELECT content FROM results WHERE batch_id = ? AND is_error = ? ORDER BY line",
            (batch_id, is_error),
        )
        return (f"{content}\n".encode() for (content,) in rows)

    def _enter(self, batch_id: str, status: str) -> None:
        times = {**self.get(batch_id).times, status: int(self._now())}
        self._db.execute(
            "UPDATE batches SET status = ?, times = ? WHERE id = ?",
            (status, json.dumps(times), batch_id),
        )

    def _set_faults(self, batch_id: str, faults: Iterable[BatchFault]) -> None:
        self._db.execute("UPDATE batches SET faults = ? WHERE id = ?", (_to_json(faults), batch_id))

    def _select(self, condition: str, values: Any) -> sqlite3.Cursor:
        return self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM batches {condition}", values)


def _to_json(faults: Iterable[BatchFault]) -> str:
    return json.dumps([[getattr(f, row.name) for row in fields(BatchFault)] for f in faults])


def _to_row(batch: Batch) -> list[Any]:
    values: dict[str, Any] = {
        "metadata": json.dumps(batch.metadata),
        "times": json.dumps(batch.times),
        "faults": _to_json(batch.faults),
        **{name: getattr(batch.tokens, name) for name in _TOKENS},
    }
    return [values[name] if name in values else getattr(batch, name) for name in _COLUMNS]


def _to_batch(row: tuple[Any, ...]) -> Batch:
    values = dict(zip(_COLUMNS, row, strict=True))
    values |= {name: json.loads(values[name]) for name in _JSON}
    values["faults"] = tuple(BatchFault(*fault) for fault in values["faults"])
    tokens = TokenCounts(**{name: values.pop(name) for name in _TOKENS})
    return Batch(**values, tokens=tokens)
