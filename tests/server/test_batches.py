"""Batches on the real server: killed in the middle, or stopped there, and started again."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from .conftest import Server

pytestmark = pytest.mark.server

NUM_LINES = 500
WAIT_SECONDS = 240.0
URL = "/v1/completions"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def restart(start_server: type[Server], folder: Path) -> Iterator[Any]:
    def restart() -> tuple[Server, openai.OpenAI]:
        flags = ("--api", "--max-model-len", "256", "--user-data-dir", str(folder))
        server = start_server(*flags).wait_until_ready()
        return server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    return restart


def build_input() -> bytes:
    lines = [
        {
            "custom_id": f"question {number}",
            "method": "POST",
            "url": URL,
            "body": {"prompt": f"{number} +", "max_tokens": 2, "seed": number},
        }
        for number in range(NUM_LINES)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def start(api: openai.OpenAI) -> str:
    file = api.files.create(file=("in.jsonl", build_input()), purpose="batch")
    batch = api.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    return batch.id


def wait(api: openai.OpenAI, batch_id: str, num_done: int) -> Batch:
    """Until so many lines are done, or the batch is."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        batch = api.batches.retrieve(batch_id)
        assert batch.request_counts is not None
        if batch.request_counts.completed >= num_done or batch.completed_at:
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)


def read_output(api: openai.OpenAI, batch: Batch) -> list[dict[str, Any]]:
    assert batch.output_file_id is not None
    text = api.files.content(batch.output_file_id).text
    return [json.loads(line) for line in text.splitlines()]


def read_results(folder: Path) -> dict[int, dict[str, Any]]:
    """Of a server that is dead: line → what it had answered."""
    with closing(sqlite3.connect(folder / "storage.sqlite3")) as database:
        rows = database.execute("SELECT line, content FROM results").fetchall()
    return {line: json.loads(content) for line, content in rows}


def test_killed_and_stopped_in_the_middle_each_line_is_answered_once(
    restart: Any, folder: Path
) -> None:
    server, api = restart()
    batch_id = start(api)
    wait(api, batch_id, NUM_LINES // 4)
    server.process.kill()
    server.wait_until_dead()
    killed = read_results(folder)
    assert NUM_LINES // 4 <= len(killed) < NUM_LINES, "it was in the middle"

    server, api = restart()
    wait(api, batch_id, NUM_LINES // 2)
    server.stop()
    assert "rror" not in server.output
    stopped = read_results(folder)
    assert NUM_LINES // 2 <= len(stopped) < NUM_LINES, "it was in the middle"

    server, api = restart()
    batch = wait(api, batch_id, NUM_LINES + 1)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES, 0)
    assert batch.error_file_id is None
    output = read_output(api, batch)
    assert [line["custom_id"] for line in output] == [f"question {n}" for n in range(NUM_LINES)]
    for before in (killed, stopped):
        assert {line: output[line] for line in before} == before, "the very same answers"
    assert len({line["response"]["body"]["id"] for line in output}) == NUM_LINES
    assert "question" not in server.output
