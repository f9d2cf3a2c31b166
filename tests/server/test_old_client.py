"""openai 0.28 against the real server: the calls that the user's document lists."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modules.settings import PROJECT_ROOT

from .conftest import Server

pytestmark = pytest.mark.server

PROGRAM = Path(__file__).with_name("old_client.py")
CLIENT_FOLDER = PROJECT_ROOT / ".venv" / "openai-0.28"
MODEL = "SmolLM2-135M-Instruct"

Results = dict[str, Any]


@pytest.fixture(scope="module")
def results(server: Server) -> Results:
    assert CLIENT_FOLDER.is_dir(), "the old client is missing: python3 start.py test installs it"
    result = subprocess.run(
        [sys.executable, str(PROGRAM), f"{server.url}/v1"],
        env={**os.environ, "PYTHONPATH": str(CLIENT_FOLDER)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    answers: Results = json.loads(result.stdout)
    return answers


def test_it_is_the_old_client(results: Results) -> None:
    assert results["version"] == "0.28.1"


def test_models(results: Results) -> None:
    ids = [model["id"] for model in results["Model.list"]["data"]]
    assert ids[0] == MODEL
    assert "gpt-3.5-turbo" in ids
    assert results["Model.retrieve"]["id"] == "org/any"


def test_engines(results: Results) -> None:
    engines = {engine["id"]: engine["ready"] for engine in results["Engine.list"]["data"]}
    assert engines[MODEL] is True
    assert engines["gpt-3.5-turbo"] is False
    assert results["Engine.retrieve"] == {
        "id": MODEL,
        "object": "engine",
        "owner": "user",
        "ready": True,
    }


def test_generate(results: Results) -> None:
    answer = results["Engine.generate"]
    assert answer["data"][0]["text"]
    assert answer["usage"]["completion_tokens"] <= 5


@pytest.mark.parametrize("call", ["Completion.create", "Completion.create(engine)"])
def test_completions(results: Results, call: str) -> None:
    assert results[call]["object"] == "text_completion"
    assert results[call]["model"] == MODEL
    assert results[call]["choices"][0]["text"]


def test_chats(results: Results) -> None:
    assert results["ChatCompletion.create"]["choices"][0]["message"]["content"]
    deltas = [chunk["choices"][0]["delta"] for chunk in results["ChatCompletion.create(stream)"]]
    assert "".join(delta.get("content", "") for delta in deltas)


def test_embeddings(results: Results) -> None:
    """The client asks for base64, and has made numbers of it."""
    cat, kitten = (item["embedding"] for item in results["Embedding.create"]["data"])
    assert len(cat) == len(kitten) == 384
    assert sum(a * b for a, b in zip(cat, kitten, strict=True)) > 0.4
    (alone,) = results["Engine.embeddings"]["data"]
    assert alone["embedding"] == pytest.approx(cat, abs=1e-5)


def test_searches(results: Results) -> None:
    ranked = results["search"]["data"]
    assert [item["document"] for item in ranked][0] == 0
    assert [item["score"] for item in ranked] == sorted([i["score"] for i in ranked], reverse=True)


def test_moderations(results: Results) -> None:
    threat, harmless = results["Moderation.create"]["results"]
    assert threat["flagged"] is True
    assert threat["categories"]["harassment/threatening"] is True
    assert harmless["flagged"] is False


def test_images(results: Results) -> None:
    counts = [len(answer["data"]) for answer in results["Image"]]
    assert counts == [2, 1, 1]
    for answer in results["Image"]:
        for image in answer["data"]:
            assert base64.b64decode(image["b64_json"]).startswith(b"\x89PNG")


def test_audio(results: Results) -> None:
    audio = results["Audio"]
    for answer in (audio["transcript"], audio["translation"]):
        assert "walk along the river" in answer["text"]
    assert audio["vtt"].startswith("WEBVTT\n\n00:00:00.000 --> ")


def test_edits_are_gone(results: Results) -> None:
    edit = results["Edit.create"]
    assert edit["status"] == 410
    assert "/v1/chat/completions" in edit["message"]


def test_files(results: Results) -> None:
    files = results["File"]
    created = files["created"]
    assert (created["filename"], created["purpose"]) == ("kept.jsonl", "fine-tune")
    assert created["id"] in [file["id"] for file in files["listed"]["data"]]
    assert files["content"] == '{"text": "kept"}'
    assert files["deleted"] == {"id": created["id"], "object": "file", "deleted": True}


def test_nothing_is_fine_tuned(results: Results) -> None:
    answer = results["FineTune.create"]
    assert answer["status"] == 400
    assert "trains no models" in answer["message"]
