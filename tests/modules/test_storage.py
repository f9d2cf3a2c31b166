"""What is kept for users: files and batches on a real disk, and what is left when a server dies."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.batch_store import COMPLETION_WINDOW, BatchFault, LineResult, TokenCounts
from modules.errors import (
    InvalidRequestError,
    NotConfiguredError,
    ObjectNotFoundError,
    StorageFullError,
)
from modules.settings import PROJECT_ROOT, Settings
from modules.storage import Storage, UserData, open_user_data

pytestmark = pytest.mark.anyio

QUOTA = 100_000


class Clock:
    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def data(folder: Path, clock: Clock) -> Iterator[UserData]:
    opened = open_user_data(folder, QUOTA, clock)
    yield opened
    opened.close()


def open_copy(folder: Path, number: int = 0) -> UserData:
    """What another server would find if this process were killed now."""
    copy = folder.with_name(f"copy {number}")
    shutil.copytree(folder, copy)
    return open_user_data(copy, QUOTA)


def find_contents(folder: Path) -> set[str]:
    return {path.name for path in (folder / "files").iterdir()}


def test_a_file_comes_back_as_it_was(data: UserData, folder: Path) -> None:
    content = bytes(range(256)) * 3
    file = data.files.add("näme.bin", "user_data", content)
    assert data.files.get(file.id) == file
    assert (file.num_bytes, file.filename, file.expires_at) == (768, "näme.bin", None)
    assert data.files.get_path(file.id).read_bytes() == content
    assert open_copy(folder).files.get(file.id) == file


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a\0b", "..", "", "x" * 512, "C:\\a"])
def test_a_name_is_never_a_path(name: str, data: UserData, folder: Path) -> None:
    file = data.files.add(name, "user_data", b"x")
    assert data.files.get(file.id).filename == name
    assert data.files.get_path(file.id).parent == folder / "files"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["kept"]


@pytest.mark.parametrize("name", ["../storage.sqlite3", "", ".", "file-0", "%"])
def test_an_id_that_was_not_given_finds_nothing(name: str, data: UserData) -> None:
    for look in (data.files.get, data.files.get_path, data.files.read, data.files.delete):
        with pytest.raises(ObjectNotFoundError):
            look(name)


def test_only_the_owner_can_read_it(data: UserData, folder: Path) -> None:
    data.files.add("a", "user_data", b"x")
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_what_is_deleted_is_on_the_disk_no_more(data: UserData, folder: Path) -> None:
    file = data.files.add("a secret name", "user_data", b"a secret content")
    data.files.delete(file.id)
    assert data.files.list_page(10) == ([], False)
    assert find_contents(folder) == set()
    for path in folder.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()


def test_results_that_have_become_files_are_kept_nowhere_else(data: UserData, folder: Path) -> None:
    batch = begin_batch(data, 1)
    data.batches.add_result(batch, LineResult(0, "a secret reply", is_error=False))
    output = data.batches.finish(batch, "completed").output_file_id
    data.files.delete(output)
    for path in folder.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()


def test_pages(data: UserData) -> None:
    ids = [data.files.add(str(n), "batch" if n % 2 else "evals", b"").id for n in range(5)]
    newest = [*reversed(ids)]

    def page(*args: object, **options: object) -> tuple[list[str], bool]:
        files, has_more = data.files.list_page(*args, **options)  # type: ignore[arg-type]
        return [file.id for file in files], has_more

    assert page(5) == (newest, False)
    assert page(2) == (newest[:2], True)
    assert page(2, after=newest[1]) == (newest[2:4], True)
    assert page(2, after=newest[3]) == (newest[4:], False)
    assert page(2, is_ascending=True) == (ids[:2], True)
    assert page(9, after=ids[1], is_ascending=True) == (ids[2:], False)
    assert page(9, purpose="batch") == ([newest[1], newest[3]], False)
    data.files.delete(newest[1])
    assert page(2, after=newest[1]) == (newest[2:4], True), "also after one that is gone"


def test_the_quota_is_for_all_together(data: UserData, folder: Path) -> None:
    first = data.files.add("a", "user_data", b"x" * (QUOTA - 10))
    with pytest.raises(StorageFullError, match="10 are left"):
        data.files.add("b", "user_data", b"x" * 11)
    assert find_contents(folder) == {first.id}
    data.files.add("b", "batch", b"x" * 10)
    data.files.delete(first.id)
    data.files.add("c", "user_data", b"x" * (QUOTA - 10))


def test_results_count_as_well(data: UserData) -> None:
    batch = begin_batch(data, 2)
    data.batches.add_result(batch, LineResult(0, "x" * (QUOTA - 100), is_error=False))
    with pytest.raises(StorageFullError):
        data.batches.add_result(batch, LineResult(1, "y" * 101, is_error=False))
    assert data.batches.find_done(batch) == {0}
    data.batches.finish(batch, "completed")
    with pytest.raises(StorageFullError):
        data.files.add("a", "user_data", b"x" * 100)


def test_a_file_is_gone_when_its_time_is_over(data: UserData, folder: Path, clock: Clock) -> None:
    file = data.files.add("a", "user_data", b"x", expires_in=3600)
    kept = data.files.add("b", "user_data", b"x")
    assert file.expires_at == int(clock.time) + 3600
    clock.time += 3599
    data.files.remove_expired()
    assert data.files.get(file.id) == file
    clock.time += 1
    with pytest.raises(ObjectNotFoundError):
        data.files.get(file.id)
    assert data.files.list_page(5) == ([kept], False)
    data.files.remove_expired()
    assert find_contents(folder) == {kept.id}


def test_what_a_batch_reads_stays_until_its_end(data: UserData, folder: Path, clock: Clock) -> None:
    file = data.files.add("a", "batch", b"lines", expires_in=3600)
    batch = data.batches.create("/v1/completions", file.id)
    with pytest.raises(InvalidRequestError, match=batch.id):
        data.files.delete(file.id)
    clock.time += 3600
    data.files.remove_expired()
    assert data.files.read(file.id) == b"lines"
    data.batches.finish(batch.id, "cancelled")
    data.files.remove_expired()
    assert find_contents(folder) == set()


def test_what_was_half_written_when_a_server_died_is_swept_away(
    data: UserData, folder: Path
) -> None:
    file = data.files.add("a", "user_data", b"x")
    data.files.write([b"no row yet"])
    (folder / "files" / "file-1.part").write_bytes(b"half")
    (folder / "files" / "notes.txt").write_bytes(b"somebody's own")
    copy = open_copy(folder)
    path = copy.files.get_path(file.id)
    assert {p.name for p in path.parent.iterdir()} == {file.id, "notes.txt"}


def test_a_failed_write_leaves_nothing(data: UserData, folder: Path) -> None:
    def fail() -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        data.files.write(fail())
    assert find_contents(folder) == set()


# Batches


def begin_batch(data: UserData, num_lines: int) -> str:
    file = data.files.add("in", "batch", b"")
    batch = data.batches.create("/v1/completions", file.id, {"a": "b"}, 3600)
    return data.batches.begin(batch.id, num_lines).id


def result(line: int, is_error: bool = False, text: str = "") -> LineResult:
    return LineResult(line, f"line {line}{text}", is_error, TokenCounts(3, 1, 2), "tiny")


def read_file(data: UserData, file_id: str | None) -> list[str]:
    assert file_id is not None
    return data.files.read(file_id).decode().splitlines()


def test_a_batch_from_its_beginning_to_its_end(data: UserData, clock: Clock) -> None:
    file = data.files.add("in", "batch", b"")
    batch = data.batches.create("/v1/completions", file.id, {"a": "b"}, 3600)
    assert (batch.status, batch.expires_at - batch.created_at) == ("validating", COMPLETION_WINDOW)
    assert data.batches.get(batch.id) == batch
    clock.time += 1
    assert data.batches.begin(batch.id, 4).status == "in_progress"
    for line in (2, 0, 3, 1):
        data.batches.add_result(batch.id, result(line, is_error=line == 3))
    running = data.batches.get(batch.id)
    assert (running.num_total, running.num_completed, running.num_failed) == (4, 3, 1)
    assert running.tokens == TokenCounts(12, 4, 8)
    clock.time += 1
    done = data.batches.finish(batch.id, "completed")
    first = int(batch.created_at)
    assert done.times == {
        **{"in_progress": first + 1, "finalizing": first + 2, "completed": first + 2}
    }
    assert (done.status, done.model, done.metadata) == ("completed", "tiny", {"a": "b"})
    assert read_file(data, done.output_file_id) == ["line 0", "line 1", "line 2"]
    assert read_file(data, done.error_file_id) == ["line 3"]
    output = data.files.get(done.output_file_id or "")
    assert (output.purpose, output.expires_at) == ("batch_output", first + 2 + 3600)
    assert data.batches.list_unfinished() == []


def test_a_batch_without_failures_has_no_error_file(data: UserData) -> None:
    batch = begin_batch(data, 1)
    data.batches.add_result(batch, result(0))
    done = data.batches.finish(batch, "completed")
    assert done.output_file_id and done.error_file_id is None


def test_a_batch_that_cannot_be_run(data: UserData) -> None:
    file = data.files.add("in", "batch", b"")
    batch = data.batches.create("/v1/completions", file.id)
    faults = [BatchFault("invalid_line", "No.", 3, "method"), BatchFault("empty_file", "None.")]
    failed = data.batches.finish(batch.id, "failed", faults)
    assert (failed.status, failed.faults) == ("failed", tuple(faults))
    assert failed.output_file_id is failed.error_file_id is None


def test_cancelling(data: UserData) -> None:
    batch = begin_batch(data, 2)
    assert data.batches.cancel(batch).status == "cancelling"
    assert data.batches.cancel(batch).status == "cancelling", "as often as one likes"
    data.batches.add_result(batch, result(0))
    data.batches.add_results(batch, [result(0, True), result(1, True)])
    done = data.batches.finish(batch, "completed")
    assert done.status == "cancelled"
    assert read_file(data, done.output_file_id) == ["line 0"]
    assert read_file(data, done.error_file_id) == ["line 1"]
    with pytest.raises(InvalidRequestError, match="cancelled cannot be"):
        data.batches.cancel(batch)


def test_one_that_is_cancelled_before_it_has_begun_stays_so(data: UserData) -> None:
    file = data.files.add("in", "batch", b"")
    batch = data.batches.create("/v1/completions", file.id)
    data.batches.cancel(batch.id)
    begun = data.batches.begin(batch.id, 5)
    assert (begun.status, begun.num_total) == ("cancelling", 5)


@pytest.mark.parametrize("purpose", ["user_data", "batch_output"])
def test_only_files_for_batches_are_read(purpose: str, data: UserData) -> None:
    file = data.files.add("in", purpose, b"")
    for file_id in (file.id, "file-none"):
        with pytest.raises(InvalidRequestError) as caught:
            data.batches.create("/v1/completions", file_id)
        assert type(caught.value) is InvalidRequestError
        assert caught.value.param == "input_file_id"


def test_pages_of_batches(data: UserData) -> None:
    newest = [begin_batch(data, 1) for _ in range(3)][::-1]
    page, has_more = data.batches.list_page(2)
    assert ([batch.id for batch in page], has_more) == (newest[:2], True)
    page, has_more = data.batches.list_page(2, after=newest[1])
    assert ([batch.id for batch in page], has_more) == (newest[2:], False)
    assert [batch.id for batch in data.batches.list_unfinished()] == newest[::-1]


def test_whenever_it_is_killed_each_line_has_its_first_result_once(
    data: UserData, folder: Path
) -> None:
    """Results come in any order and more than once; of some moments, what would be found then."""
    draw = random.Random(1)
    batch = begin_batch(data, 40)
    expected: dict[int, str] = {}
    for number in range(120):
        line = draw.randrange(40)
        added = result(line, is_error=line % 5 == 0, text=f", try {number}")
        data.batches.add_result(batch, added)
        expected.setdefault(line, added.content)
        if number % 15 == 0:
            copy = open_copy(folder, number)
            assert copy.batches.find_done(batch) == expected.keys()
            done = copy.batches.finish(batch, "completed")
            files = (done.output_file_id, done.error_file_id)
            found = [line for file_id in files if file_id for line in read_file(copy, file_id)]
            right = [expected[line] for line in sorted(expected)]
            assert sorted(found) == sorted(right)
            assert (done.num_completed + done.num_failed) == len(expected)
            if done.output_file_id:
                outputs = read_file(copy, done.output_file_id)
                assert outputs == [line for line in right if line in outputs], "in order"


@pytest.mark.parametrize("moment", ["write", "insert"])
def test_killed_while_files_are_made_of_results(
    moment: str, data: UserData, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = begin_batch(data, 2)
    data.batches.add_results(batch, [result(0), result(1, is_error=True)])
    copies: list[UserData] = []

    def die(*args: object) -> None:
        copies.append(open_copy(folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(data.files, moment, die)
    with pytest.raises(KeyboardInterrupt):
        data.batches.finish(batch, "completed")
    (copy,) = copies
    assert copy.batches.get(batch).status == "finalizing"
    assert [found.id for found in copy.batches.list_unfinished()] == [batch]
    done = copy.batches.finish(batch, "completed")
    assert read_file(copy, done.output_file_id) == ["line 0"]
    assert read_file(copy, done.error_file_id) == ["line 1"]
    files, _ = copy.files.list_page(10)
    assert [file.purpose for file in files] == ["batch_output", "batch_output", "batch"]


# The folder


def make_storage(folder: Path, **options: object) -> Storage:
    return Storage(Settings(user_data_dir=folder, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_error", [False, True])
def test_results_that_could_not_be_made_files_leave_no_content(
    is_error: bool, data: UserData, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = data.files.add("in", "batch", b"x")
    batch = data.batches.create("/v1/completions", file.id)
    data.batches.begin(batch.id, 2)
    data.batches.add_results(
        batch.id, [LineResult(0, "good", is_error=False), LineResult(1, "bad", is_error=True)]
    )
    name = "write" if is_error else "insert"
    work = getattr(data.files, name)
    num_calls = 0

    def fail_at_the_second(*args: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise OSError("full")
        return work(*args)

    monkeypatch.setattr(data.files, name, fail_at_the_second)
    with pytest.raises(OSError, match="full"):
        data.batches.finish(batch.id, "completed")
    assert find_contents(folder) == {file.id}
    assert data.batches.finish(batch.id, "completed").output_file_id
    assert len(find_contents(folder)) == 3


def test_an_upload_that_could_not_be_noted_leaves_no_content(
    data: UserData, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise sqlite3.OperationalError("full")

    monkeypatch.setattr(data.files, "insert", fail)
    with pytest.raises(sqlite3.OperationalError):
        data.files.add("a", "user_data", b"x")
    assert find_contents(folder) == set()


async def test_looking_makes_nothing(folder: Path) -> None:
    storage = make_storage(folder / "deep")
    assert await storage.read(lambda data: data.files.list_page(5)) == ([], False)
    with pytest.raises(ObjectNotFoundError):
        await storage.read(lambda data: data.batches.get("batch_1"))
    storage.close()
    assert not folder.exists()


async def test_writing_makes_the_folder_and_the_next_server_finds_what_was_written(
    folder: Path,
) -> None:
    storage = make_storage(folder / "deep")
    file = await storage.write(lambda data: data.files.add("a", "user_data", b"x"))
    storage.close()
    assert not (folder / "deep" / "storage.sqlite3-wal").exists(), "it was closed in order"
    later = make_storage(folder / "deep")
    assert await later.read(lambda data: data.files.get(file.id)) == file
    later.close()


async def test_two_servers_do_not_share_a_folder(folder: Path) -> None:
    first = make_storage(folder)
    file = await first.write(lambda data: data.files.add("a", "user_data", b"x"))
    second = make_storage(folder)
    with pytest.raises(NotConfiguredError, match="in use by another server.*--user-data-dir"):
        await second.read(lambda data: data.files.get(file.id))
    first.close()
    assert await second.read(lambda data: data.files.get(file.id)) == file
    second.close()


async def test_nor_do_two_processes_and_a_dead_one_holds_nothing(folder: Path) -> None:
    script = (
        "import pathlib, sys; from modules.storage import open_user_data\n"
        "data = open_user_data(pathlib.Path(sys.argv[1]), 1000)\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=PROJECT_ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    storage = make_storage(folder)
    with pytest.raises(NotConfiguredError, match="in use by another server"):
        await storage.read(lambda data: data.files.list_page(5))
    process.kill()
    process.communicate()
    assert await storage.read(lambda data: data.files.list_page(5)) == ([], False)
    storage.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can lend itself to another user")
async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        storage = make_storage(tmp_path / "kept")
        for look in (storage.read, storage.write):
            with pytest.raises(NotConfiguredError, match="--user-data-dir"):
                await look(lambda data: data.files.list_page(5))
    finally:
        os.seteuid(0)


async def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    storage = make_storage(tmp_path / "kept")
    for look in (storage.read, storage.write):
        with pytest.raises(NotConfiguredError, match="--user-data-dir"):
            await look(lambda data: data.files.list_page(5))
    assert (tmp_path / "kept").read_text() == "mine"


async def test_a_broken_database_is_an_error_that_says_which(folder: Path) -> None:
    folder.mkdir()
    (folder / "storage.sqlite3").write_bytes(b"something else" * 1000)
    storage = make_storage(folder)
    with pytest.raises(Exception, match="storage.sqlite3 cannot be used: file is not a database"):
        await storage.read(lambda data: data.files.list_page(5))


def test_it_is_on_the_disk_when_it_is_said_to_be(data: UserData) -> None:
    def ask(name: str) -> object:
        return data.database.execute(f"PRAGMA {name}").fetchone()[0]

    assert isinstance(data.database, sqlite3.Connection)
    assert (ask("journal_mode"), ask("synchronous"), ask("locking_mode")) == ("wal", 2, "exclusive")
