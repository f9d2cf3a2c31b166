"""/v1/batches over the app: from the upload to the output, and all the ways in which it may end."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types import Batch

from extensions.openai import batch_runner
from extensions.openai.batch_lines import (
    MAX_FAULTS,
    MAX_LINE_BYTES,
    MAX_LINES,
    NUM_BLANKS,
    RawLine,
    find_faults,
    split_lines,
)
from modules.batch_store import COMPLETION_WINDOW, BatchStore
from modules.context import Context, build_context
from modules.errors import CapabilityError
from modules.extensions import load_extensions
from modules.settings import Settings
from modules.storage import Storage
from tests.conftest import connect, wait_for
from tests.fakes import FakeEngine, FakeModelManager
from tests.openai.assertions import assert_error_object, assert_error_shape
from tests.openai.test_clients import assert_no_extra_fields

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
END = ("completed", "failed", "cancelled", "expired")


@dataclass
class Served:
    """A server in this process, as `server.py` runs one."""

    context: Context
    client: httpx.AsyncClient

    async def upload(self, lines: list[Any] | bytes, purpose: str = "batch") -> str:
        content = lines if isinstance(lines, bytes) else "\n".join(map(json.dumps, lines)).encode()
        answer = await self.client.post(
            "/v1/files", data={"purpose": purpose}, files={"file": ("in.jsonl", content)}
        )
        return str(answer.json()["id"])

    async def create(self, file_id: str, endpoint: str = TEXT, **fields: Any) -> dict[str, Any]:
        body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
        answer = await self.client.post("/v1/batches", json={**body, **fields})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def start(self, lines: list[Any] | bytes, endpoint: str = TEXT) -> str:
        return str((await self.create(await self.upload(lines), endpoint))["id"])

    async def get(self, batch_id: str) -> dict[str, Any]:
        return dict((await self.client.get(f"/v1/batches/{batch_id}")).json())

    async def wait(
        self, batch_id: str, is_reached: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while not is_reached(batch := await self.get(batch_id)):
                await asyncio.sleep(0.001)
        return batch

    async def wait_until(self, is_reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not is_reached():
                await asyncio.sleep(0.001)

    async def finish(self, batch_id: str) -> dict[str, Any]:
        return await self.wait(batch_id, lambda batch: batch["status"] in END)

    async def read(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        answer = await self.client.get(f"/v1/files/{file_id}/content")
        return [json.loads(line) for line in answer.text.splitlines()]


Serve = Callable[..., Any]


@pytest.fixture
def serve(manager: FakeModelManager, tmp_path: Path) -> Serve:
    """Each with the same folder, as after a restart."""

    @asynccontextmanager
    async def serve(
        now: Callable[[], float] | None = None, **settings: Any
    ) -> AsyncIterator[Served]:
        known = Settings(
            **{"extensions": ("openai",), "user_data_dir": tmp_path / "kept", **settings}
        )
        app = FastAPI()
        extensions = load_extensions(known)
        context = build_context(known, manager, app, extensions)
        if now is not None:
            context = replace(context, storage=Storage(known, now))
        extensions.set_up(context)
        services = [asyncio.ensure_future(run()) for run in context.services]
        async with connect(app) as client:
            yield Served(context, client)
        for service in services:
            service.cancel()
        ends = await asyncio.gather(*services, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        context.storage.close()

    return serve


@pytest.fixture
async def served(serve: Serve) -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


def line(custom_id: str, url: str = TEXT, **body: Any) -> dict[str, Any]:
    prompt = {"prompt": custom_id} if url == TEXT else {"messages": [{"role": "user"} | body]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**prompt, **body}}


async def test_openai_client(served: Served, engine: FakeEngine) -> None:
    api = openai.AsyncOpenAI(
        api_key="none", base_url="http://test/v1", http_client=served.client, max_retries=0
    )
    for text in ("one", "two"):
        engine.enqueue(text)
    lines = [line(name, CHAT, content="Hi", role="user") for name in ("a", "b")]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = await api.files.create(file=("in.jsonl", content), purpose="batch")
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    batch = await api.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"project": "tests"},
        output_expires_after=expiry,
    )
    assert batch.status == "validating"
    assert batch.expires_at == batch.created_at + 24 * 3600
    await served.finish(batch.id)
    done = await api.batches.retrieve(batch.id)
    assert_no_extra_fields(done)
    Batch.model_validate(done.model_dump(), strict=True)
    assert done.status == "completed"
    assert done.request_counts is not None and done.request_counts.completed == 2
    assert (done.metadata, done.model, done.errors) == ({"project": "tests"}, "tiny", None)
    assert done.usage is not None and done.usage.output_tokens == 8
    assert done.usage.total_tokens == done.usage.input_tokens + 8
    assert done.in_progress_at and done.finalizing_at and done.completed_at
    assert done.output_file_id and done.error_file_id is None
    output = await api.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output"
    assert output.expires_at == output.created_at + 3600
    answers = [json.loads(x) for x in (await api.files.content(output.id)).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["a", "b"]
    for answer in answers:
        assert list(answer) == ["id", "custom_id", "response", "error"]
        assert answer["id"].startswith("batch_req_") and answer["error"] is None
        assert list(answer["response"]) == ["status_code", "request_id", "body"]
        assert answer["response"]["status_code"] == 200
        openai.types.chat.ChatCompletion.model_validate(answer["response"]["body"], strict=True)
    texts = {a["response"]["body"]["choices"][0]["message"]["content"] for a in answers}
    assert texts == {"one", "two"}
    assert [found.id async for found in api.batches.list(limit=1)] == [batch.id]
    assert all(request.is_background for request in engine.requests)


async def test_what_somebody_waits_for_is_not_in_the_background(
    served: Served, engine: FakeEngine
) -> None:
    await served.client.post(TEXT, json={"prompt": "Hi"})
    assert [request.is_background for request in engine.requests] == [False]


async def test_the_output_is_in_the_order_of_the_input_and_errors_are_apart(
    served: Served,
) -> None:
    names = [str(n) for n in range(30)]
    lines = [line(name, temperature=-1 if n % 7 == 3 else 1) for n, name in enumerate(names)]
    lines[5]["body"]["stream"] = True
    lines[6]["body"] = {}
    lines[8]["body"]["prompt"] = "x" * 5000
    batch = await served.finish(await served.start(lines))
    assert batch["request_counts"] == {"total": 30, "completed": 23, "failed": 7}
    output, errors = [await served.read(batch[f"{kind}_file_id"]) for kind in ("output", "error")]
    failed = ["3", "5", "6", "8", "10", "17", "24"]
    assert [item["custom_id"] for item in errors] == failed
    assert [item["custom_id"] for item in output] == [n for n in names if n not in failed]
    found = [item["response"]["body"] for item in errors]
    assert {item["response"]["status_code"] for item in errors} == {400}
    assert all(item["error"] is None for item in errors)
    for body, (param, code) in zip(
        found[:4],
        [
            *[("temperature", None), ("stream", None), ("prompt", None)],
            ("prompt", "context_length_exceeded"),
        ],
        strict=True,
    ):
        assert_error_object(body, 400, param=param, code=code)


async def test_embeddings(serve: Serve) -> None:
    url = "/v1/embeddings"
    texts = ["The cat sits outside.", "Shares fell on Monday."]
    lines = [
        {"custom_id": text, "method": "POST", "url": url, "body": {"input": text, "dimensions": 8}}
        for text in texts
    ]
    lines.append({**lines[0], "custom_id": "empty", "body": {"input": ""}})
    async with serve(embedding_model="all-MiniLM-L6-v2") as served:
        batch = await served.finish(await served.start(lines, url))
        output = await served.read(batch["output_file_id"])
        (error,) = await served.read(batch["error_file_id"])
        answer = await served.client.post(url, json=lines[0]["body"])
        served.context.embeddings.close()
    assert [item["custom_id"] for item in output] == texts
    vectors = [item["response"]["body"]["data"][0]["embedding"] for item in output]
    assert vectors[0] == pytest.approx(answer.json()["data"][0]["embedding"], abs=1e-4)
    assert len(vectors[1]) == 8
    assert batch["model"] == "all-MiniLM-L6-v2" and batch["usage"]["input_tokens"] == 14
    assert_error_object(error["response"]["body"], 400, param="input")


async def test_a_fault_of_the_server_is_one_of_that_line(
    served: Served, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.enqueue("x", error=ValueError("a secret prompt"))
    batch = await served.finish(await served.start([line("a"), line("b")]))
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (error,) = await served.read(batch["error_file_id"])
    assert error["response"]["status_code"] == 500
    assert "secret" not in json.dumps(error) + caplog.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": "file-1"}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds"),
    ],
)
async def test_batches_that_make_no_sense(
    fields: dict[str, Any], param: str, served: Served
) -> None:
    file_id = await served.upload([line("a")])
    body = {"input_file_id": file_id, "endpoint": TEXT, "completion_window": "24h", **fields}
    answer = await served.client.post("/v1/batches", json=body)
    assert_error_shape(answer, 400, param=param)
    assert (await served.client.get("/v1/batches")).json()["data"] == []


async def test_batches_that_are_not_there(served: Served) -> None:
    for method, path in (("GET", "batch_1"), ("POST", "batch_1/cancel")):
        answer = await served.client.request(method, f"/v1/batches/{path}")
        assert_error_shape(answer, 404, param="batch_id")
    for query, param in (({"limit": 101}, "limit"), ({"after": "x"}, "after")):
        answer = await served.client.get("/v1/batches", params=query)
        assert_error_shape(answer, 400, param=param)


async def test_an_input_that_is_not_in_order(served: Served) -> None:
    good = line("a")
    content = [
        *[
            good,
            {**good, "custom_id": "b", "url": CHAT},
            {**good, "custom_id": "c", "method": "GET"},
        ],
        *[{**good, "custom_id": ""}, {k: v for k, v in good.items() if k != "custom_id"}],
        *[{**good, "custom_id": "d", "body": "Hi"}, good, 5],
    ]
    text = "\n".join(map(json.dumps, content)) + "\n\n{broken\n" + '{"custom_id": NaN}\n'
    batch = await served.finish(await served.start(text.encode()))
    assert batch["status"] == "failed" and batch["failed_at"]
    assert batch["output_file_id"] is batch["error_file_id"] is None
    assert batch["errors"]["object"] == "list"
    faults = [(f["line"], f["code"], f["param"]) for f in batch["errors"]["data"]]
    assert faults == [
        (2, "mismatched_url", "url"),
        (3, "invalid_line", "method"),
        (4, "invalid_line", "custom_id"),
        (5, "invalid_line", "custom_id"),
        (6, "invalid_line", "body"),
        (7, "duplicate_custom_id", "custom_id"),
        (8, "invalid_line", None),
        (10, "invalid_json_line", None),
        (11, "invalid_json_line", None),
    ]
    assert "line 1" in batch["errors"]["data"][5]["message"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
async def test_an_empty_input(content: bytes, served: Served) -> None:
    batch = await served.finish(await served.start(content))
    assert [fault["code"] for fault in batch["errors"]["data"]] == ["empty_file"]


def test_how_much_may_be_in_an_input() -> None:
    text = json.dumps(line("a"))
    many = split_lines("\n".join([text] * (MAX_LINES + 1)).encode())
    (fault,) = find_faults(many, TEXT)
    assert fault.code == "too_many_lines"
    assert len(find_faults(many[:-1], TEXT)) == MAX_FAULTS
    one = split_lines(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert find_faults(one, TEXT) == []


def test_how_long_a_line_may_be() -> None:
    start, end = json.dumps(line("a", suffix="|")).encode().split(b"|")
    longest = start + b"x" * (MAX_LINE_BYTES - len(start + end)) + end
    assert find_faults(split_lines(longest), TEXT) == []
    longer = longest.replace(b'"a"', b'"bc"', 1)
    found = find_faults(split_lines(b"\n".join([longest, b"", longer, b"{"])), TEXT)
    assert [(f.code, f.line) for f in found] == [("line_too_long", 3), ("invalid_json_line", 4)]


def test_no_more_lines_are_made_than_can_be_run() -> None:
    tracemalloc.start()
    try:
        assert split_lines(b"\n" * 5_000_000) == []
        assert len(split_lines(b"1\n" * 1_000_000)) == MAX_LINES + 1
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()


def test_lines_keep_their_numbers() -> None:
    blanks = b" " * (NUM_BLANKS + 5)
    content = b"\xef\xbb\xbf a\n\n\t\r\n b \r\n" + blanks + b"\n" + blanks + b"c\n\nd"
    lines = [(0, b" a"), (3, b" b \r"), (5, blanks + b"c"), (7, b"d")]
    assert split_lines(content) == [RawLine(*line) for line in lines]


async def test_long_lines_are_not_parsed_on_the_event_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_here: dict[str, bool] = {}
    parse = batch_runner.parse_line

    def note(raw: RawLine) -> Any:
        parsed = parse(raw)
        is_here[parsed.custom_id] = threading.current_thread() is threading.main_thread()
        return parsed

    monkeypatch.setattr(batch_runner, "parse_line", note)
    lines = [line("short"), line("long", prompt="x" * batch_runner.MAX_PARSED_AT_ONCE)]
    await served.finish(await served.start(lines))
    assert is_here == {"short": True, "long": False}


async def test_inputs_are_checked_one_at_a_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    checked = []

    def wait(lines: list[RawLine], endpoint: str) -> Any:
        checked.append(lines)
        assert go_on.wait(20)
        return find_faults(lines, endpoint)

    monkeypatch.setattr(batch_runner, "find_faults", wait)
    ids = [await served.start([line(name)]) for name in "abc"]
    await served.wait_until(lambda: bool(checked))
    for _ in range(20):  # the others would have begun
        await served.get(ids[0])
    assert len(checked) == 1
    go_on.set()
    assert [(await served.finish(name))["status"] for name in ids] == ["completed"] * 3


async def test_what_is_left_out_is_written_in_pieces(
    serve: Serve, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    add = BatchStore.add_results

    def note(store: BatchStore, batch_id: str, results: Any) -> None:
        sizes.append(len(results))
        add(store, batch_id, results)

    engine.enqueue("x", blocks=True)
    engine.enqueue("x", blocks=True)
    async with serve(max_num_seqs=1) as served:
        batch_id = await served.start([line(str(number)) for number in range(2500)])
        await wait_for(engine.blocked)
        monkeypatch.setattr(BatchStore, "add_results", note)
        await served.client.post(f"/v1/batches/{batch_id}/cancel")
        batch = await served.finish(batch_id)
    assert sizes == [1000, 1000, 500]
    assert batch["request_counts"] == {"total": 2500, "completed": 0, "failed": 2500}


async def test_a_file_that_a_batch_reads_cannot_be_deleted(
    served: Served, engine: FakeEngine
) -> None:
    engine.enqueue("x", blocks=True)
    file_id = await served.upload([line("a")])
    batch_id = (await served.create(file_id))["id"]
    await wait_for(engine.blocked)
    answer = await served.client.delete(f"/v1/files/{file_id}")
    assert batch_id in assert_error_shape(answer, 400, param="file_id")
    await served.client.post(f"/v1/batches/{batch_id}/cancel")
    await served.finish(batch_id)
    assert (await served.client.delete(f"/v1/files/{file_id}")).status_code == 200


async def start_and_block(served: Served, engine: FakeEngine) -> str:
    """Of four lines one is done, and two are being answered. `served` runs one at a time."""
    engine.enqueue("one")
    for _ in range(2):
        engine.enqueue("half", blocks=True)
    batch_id = await served.start([line(name) for name in "abcd"])
    await served.wait(batch_id, lambda batch: batch["request_counts"]["completed"] == 1)
    await served.wait_until(lambda: len(engine._waiting) == 2)
    return batch_id


async def test_cancelling_in_the_middle(serve: Serve, engine: FakeEngine) -> None:
    async with serve(max_num_seqs=1) as served:
        batch_id = await start_and_block(served, engine)
        answer = (await served.client.post(f"/v1/batches/{batch_id}/cancel")).json()
        assert answer["status"] == "cancelling" and answer["cancelling_at"]
        batch = await served.finish(batch_id)
        assert batch["status"] == "cancelled" and batch["cancelled_at"]
        assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
        (done,) = await served.read(batch["output_file_id"])
        errors = await served.read(batch["error_file_id"])
        assert {done["custom_id"], *(e["custom_id"] for e in errors)} == set("abcd")
        assert {error["error"]["code"] for error in errors} == {"batch_cancelled"}
        assert {error["response"] for error in errors} == {None}
        assert engine.aborted and not engine._open_ids, "nothing goes on"
        answer = await served.client.post(f"/v1/batches/{batch_id}/cancel")
        assert_error_shape(answer, 400, param="batch_id")


async def test_a_batch_goes_on_after_a_restart(serve: Serve, engine: FakeEngine) -> None:
    async with serve(max_num_seqs=1) as served:
        batch_id = await start_and_block(served, engine)
    num_asked = len(engine.requests)
    async with serve(max_num_seqs=1) as served:
        batch = await served.finish(batch_id)
        assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
        output = await served.read(batch["output_file_id"])
    assert [item["custom_id"] for item in output] == list("abcd")
    assert len(engine.requests) == num_asked + 3, "what was done is not done again"
    texts = [item["response"]["body"]["choices"][0]["text"] for item in output]
    assert sorted(texts) == ["ok", "ok", "ok", "one"]


async def test_one_that_was_to_be_cancelled_is_after_a_restart(
    serve: Serve, engine: FakeEngine
) -> None:
    async with serve(max_num_seqs=1) as served:
        batch_id = await start_and_block(served, engine)
    async with serve_without_services(serve) as served:
        answer = await served.client.post(f"/v1/batches/{batch_id}/cancel")
        assert answer.json()["status"] == "cancelling"
    async with serve() as served:
        batch = await served.finish(batch_id)
    assert batch["status"] == "cancelled"
    assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}


@asynccontextmanager
async def serve_without_services(serve: Serve) -> AsyncIterator[Served]:
    """As it is in the moment before they start, or after a fault of theirs."""
    async with serve() as served:
        served.context.services.clear()
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__qualname__", "") == "BatchRunner.run":
                task.cancel()
        yield served


async def test_the_window_ends(serve: Serve, engine: FakeEngine) -> None:
    time = 1_000_000.0
    async with serve(lambda: time, max_num_seqs=1) as served:
        batch_id = await start_and_block(served, engine)
    time += COMPLETION_WINDOW
    async with serve(lambda: time) as served:
        batch = await served.finish(batch_id)
        errors = await served.read(batch["error_file_id"])
        assert len(await served.read(batch["output_file_id"])) == 1
    assert (batch["status"], batch["expired_at"]) == ("expired", int(time))
    assert {error["error"]["code"] for error in errors} == {"batch_expired"}
    assert len(errors) == 3


async def test_the_window_ends_in_the_middle(serve: Serve, engine: FakeEngine) -> None:
    time = 1_000_000.0
    async with serve(lambda: time, max_num_seqs=1) as served:
        batch_id = await start_and_block(served, engine)
    time += COMPLETION_WINDOW - 1  # a moment is left
    engine.blocked.clear()
    engine.aborted.clear()
    for _ in range(3):
        engine.enqueue("x", blocks=True)
    async with serve(lambda: time) as served:
        await wait_for(engine.blocked)
        batch = await served.finish(batch_id)
    assert batch["status"] == "expired"
    assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    assert engine.aborted


async def test_while_there_is_no_model_a_batch_waits(
    serve: Serve,
    engine: FakeEngine,
    manager: FakeModelManager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited = threading.Event()
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds == batch_runner.RETRY_SECONDS:
            waited.set()
        await sleep(0)

    monkeypatch.setattr(batch_runner.asyncio, "sleep", note)
    model, manager.model = manager.model, None
    async with serve() as served:
        batch_id = await served.start([line("a"), line("b", temperature=-1)])
        await wait_for(waited)
        counts = (await served.get(batch_id))["request_counts"]
        assert counts["completed"] == 0
        manager.model = model
        batch = await served.finish(batch_id)
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}


async def test_the_quota_ends_a_batch_and_keeps_what_there_is(
    serve: Serve, engine: FakeEngine
) -> None:
    for text in ("x" * 400, "y" * 2000, "z" * 2000):
        engine.enqueue(text)
    async with serve(max_num_seqs=1, storage_quota=3000 / 2**30) as served:
        batch = await served.finish(await served.start([line(n, max_tokens=9999) for n in "ab"]))
        assert batch["status"] == "failed"
        assert [fault["code"] for fault in batch["errors"]["data"]] == ["storage_quota_exceeded"]
        assert len(await served.read(batch["output_file_id"])) == 1
        (error,) = await served.read(batch["error_file_id"])
        assert error["error"]["code"] == "batch_failed"


async def test_an_input_that_somebody_has_taken_away(
    serve: Serve, engine: FakeEngine, tmp_path: Path
) -> None:
    async with serve(max_num_seqs=1) as served:
        batch_id = await start_and_block(served, engine)
    for path in (tmp_path / "kept" / "files").iterdir():
        path.unlink()
    async with serve() as served:
        batch = await served.finish(batch_id)
        assert batch["status"] == "failed"
        assert [fault["code"] for fault in batch["errors"]["data"]] == ["file_not_found"]
        assert len(await served.read(batch["output_file_id"])) == 1


async def test_batches_run_one_after_the_other_and_are_checked_at_once(
    serve: Serve, engine: FakeEngine
) -> None:
    async with serve(max_num_seqs=1) as served:
        first = await start_and_block(served, engine)
        wrong = await served.start(b"{")
        assert (await served.finish(wrong))["status"] == "failed"
        second = await served.start([line("e")])
        batch = await served.wait(second, lambda batch: batch["status"] == "in_progress")
        assert batch["request_counts"] == {"total": 1, "completed": 0, "failed": 0}
        page = (await served.client.get("/v1/batches", params={"limit": 2})).json()
        assert [found["id"] for found in page["data"]] == [second, wrong]
        assert page["has_more"] and page["last_id"] == wrong
        await served.client.post(f"/v1/batches/{first}/cancel")
        assert (await served.finish(second))["status"] == "completed"
        assert (await served.finish(first))["status"] == "cancelled"


async def test_one_that_waits_for_its_turn_can_be_cancelled(
    serve: Serve, engine: FakeEngine
) -> None:
    async with serve(max_num_seqs=1) as served:
        first = await start_and_block(served, engine)
        second = await served.start([line("e")])
        await served.wait(second, lambda batch: batch["status"] == "in_progress")
        await served.client.post(f"/v1/batches/{second}/cancel")
        batch = await served.finish(second)
        assert batch["request_counts"] == {"total": 1, "completed": 0, "failed": 1}
        assert (await served.get(first))["status"] == "in_progress"


async def test_a_second_server_on_the_folder_runs_nothing_until_the_first_has_ended(
    serve: Serve,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(batch_runner, "RETRY_SECONDS", 0.01)
    async with serve(max_num_seqs=1) as first:
        batch_id = await start_and_block(first, engine)
        num_asked = len(engine.requests)
        second_server = serve(max_num_seqs=1)
        second = await second_server.__aenter__()
        answer = await second.client.get(f"/v1/batches/{batch_id}")
        message = assert_error_shape(answer, 503, code="not_configured")
        assert "in use by another server" in message
        await second.wait_until(lambda: "Batches do not run" in caplog.text)
        assert len(engine.requests) == num_asked
    batch = await second.finish(batch_id)
    await second_server.__aexit__(None, None, None)
    assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
    assert caplog.text.count("Batches do not run") == 1, "it is said once"


async def test_nothing_is_made_by_a_server_that_nobody_uploads_to(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve() as served:
        assert (await served.client.get("/v1/batches")).json()["data"] == []
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("error", [CapabilityError("no space"), RuntimeError("secret")])
async def test_a_batch_goes_on_once_what_stopped_it_is_over(
    error: Exception,
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(batch_runner, "RETRY_SECONDS", 0.01)
    finish = BatchStore.finish
    num_tries = 0

    def fail_at_first(*args: Any) -> Any:
        nonlocal num_tries
        num_tries += 1
        if num_tries < 4:
            raise error
        return finish(*args)

    monkeypatch.setattr(BatchStore, "finish", fail_at_first)
    batch = await served.finish(await served.start([line("a")]))
    assert batch["status"] == "completed"
    assert num_tries == 4
    said = caplog.text.count("Batches do not run: no space") + caplog.text.count("RuntimeError")
    assert said == 1, "it is said once"
    assert "secret" not in caplog.text


async def test_one_that_a_fault_has_stopped_can_be_cancelled(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "RETRY_SECONDS", 3600)
    finish = BatchStore.finish
    failed = threading.Event()

    def fail_once(*args: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise sqlite3.OperationalError("disk is full")
        return finish(*args)

    monkeypatch.setattr(BatchStore, "finish", fail_once)
    batch_id = await served.start([line("a")])
    await wait_for(failed)
    await served.wait_until(lambda: not is_any_running())
    await served.client.post(f"/v1/batches/{batch_id}/cancel")
    batch = await served.finish(batch_id)
    assert batch["status"] == "cancelled"
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


def is_any_running() -> bool:
    names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return "BatchRunner._run_batch" in names
