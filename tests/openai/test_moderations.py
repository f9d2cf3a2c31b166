"""/v1/moderations: what may be asked, and OpenAI's shape of the answer."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types import ModerationCreateResponse

from extensions.openai.moderations import MAX_CHARS
from extensions.openai.typing import MAX_INPUTS
from modules.context import build_context
from modules.extensions import load_extensions
from modules.moderation import Moderation
from modules.moderation_examples import CATEGORIES
from modules.settings import Settings
from tests.conftest import AsgiCall, MakeApp, connect, wait_for
from tests.fakes import FakeModelManager
from tests.openai.assertions import assert_error_shape

pytestmark = pytest.mark.anyio

PATH = "/v1/moderations"


class FakeModerator:
    """Finds hate in a text with `hate` in it, and threats in one with `kill`."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.blocks = False
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    async def moderate(self, texts: Sequence[str]) -> Moderation:
        self.texts += texts
        self.begun.set()
        if self.blocks:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        return Moderation("fake", tuple(self._score(text) for text in texts))

    def _score(self, text: str) -> dict[str, float]:
        found = {"hate": "hate" in text, "harassment/threatening": "kill" in text}
        return {name: 0.5 if found.get(name) else 0.125 for name in CATEGORIES}


@pytest.fixture
def moderator() -> FakeModerator:
    return FakeModerator()


@pytest.fixture
def app(manager: FakeModelManager, moderator: FakeModerator) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None)
    settings = Settings(extensions=("openai",))
    extensions = load_extensions(settings)
    context = build_context(settings, manager, app, extensions)  # type: ignore[arg-type]
    extensions.set_up(replace(context, moderation=moderator))  # type: ignore[arg-type]
    return app


async def test_the_shape_of_an_answer(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={"input": ["I hate you", "Hello"]})
    body = response.json()
    assert list(body) == ["id", "model", "results"]
    assert body["id"].startswith("modr-")
    assert body["model"] == "fake"
    hateful, harmless = body["results"]
    for result in (hateful, harmless):
        assert list(result) == [
            "flagged",
            "categories",
            "category_scores",
            "category_applied_input_types",
        ]
        for key in list(result)[1:]:
            assert list(result[key]) == list(CATEGORIES)
        assert set(map(tuple, result["category_applied_input_types"].values())) == {("text",)}
    assert hateful["flagged"] is True
    assert [name for name, is_in in hateful["categories"].items() if is_in] == ["hate"]
    assert hateful["category_scores"]["hate"] == 0.5
    assert harmless["flagged"] is False
    assert not any(harmless["categories"].values())


async def test_it_fits_the_types_of_openais_client(app: FastAPI, client: httpx.AsyncClient) -> None:
    body = (await client.post(PATH, json={"input": "I kill"})).json()
    ModerationCreateResponse.model_validate(body, strict=True)
    async with connect(app) as http_client:
        api = openai.AsyncOpenAI(
            api_key="none", base_url="http://test/v1", http_client=http_client, max_retries=0
        )
        answer = await api.moderations.create(
            input=[{"type": "text", "text": "I kill"}], model="omni-moderation-latest"
        )
    (result,) = answer.results
    assert result.flagged
    assert result.categories.harassment_threatening
    assert result.categories.illicit is False
    assert result.category_scores.illicit_violent == 0.125
    assert result.category_applied_input_types.sexual_minors == ["text"]


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", "b", "a"], ["a", "b", "a"]),
        ([{"type": "text", "text": "a"}], ["a"]),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], ["a\nb"]),
        (" \n", [" \n"]),
    ],
)
async def test_what_may_be_given(
    client: httpx.AsyncClient, moderator: FakeModerator, given: Any, texts: list[str]
) -> None:
    response = await client.post(PATH, json={"input": given, "model": None, "user": "u"})
    assert moderator.texts == texts
    assert len(response.json()["results"]) == len(texts)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "input"),
        ("", "input"),
        ([], "input"),
        (5, "input"),
        ({"type": "text", "text": "a"}, "input"),
        (["a", ""], "input[1]"),
        (["a", 5], "input[1]"),
        (["a", {"type": "text", "text": "b"}], "input[1]"),
        ([{"type": "text", "text": "a"}, "b"], "input[1]"),
        ([{"type": "text", "text": ""}], "input[0].text"),
        ([{"type": "text", "text": 5}], "input[0].text"),
        ([{"type": "text"}], "input[0]"),
        ([[1, 2]], "input[0]"),
        (["a"] * (MAX_INPUTS + 1), "input"),
        ("a" * (MAX_CHARS + 1), "input"),
    ],
)
async def test_what_may_not(
    client: httpx.AsyncClient, moderator: FakeModerator, given: Any, param: str
) -> None:
    assert_error_shape(await client.post(PATH, json={"input": given}), 400, param=param)
    assert moderator.texts == []


async def test_images_are_refused_and_not_passed_over(
    client: httpx.AsyncClient, moderator: FakeModerator
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for given, param in (
        ([image], "input[0]"),
        ([{"type": "text", "text": "a"}, image], "input[1]"),
    ):
        response = await client.post(PATH, json={"input": given})
        assert "image" in assert_error_shape(response, 400, param=param)
    assert moderator.texts == []


async def test_who_leaves_ends_it(app: FastAPI, moderator: FakeModerator) -> None:
    moderator.blocks = True
    call = AsgiCall(app, PATH, {"input": "a"})
    await wait_for(moderator.begun)
    call.disconnect()
    await call.wait()
    assert moderator.cancelled.is_set()


async def test_a_key_is_asked_for(make_app: MakeApp) -> None:
    async with connect(make_app(api_key="secret")) as client:
        response = await client.post(PATH, json={"input": "a"})
    assert_error_shape(response, 401, code="invalid_api_key")


async def test_a_package_that_is_missing(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    async with connect(make_app()) as client:
        response = await client.post(PATH, json={"input": "a"})
    assert "pip install sentence-transformers" in assert_error_shape(
        response, 503, code="package_missing"
    )


async def test_a_classifier_that_is_missing(make_app: MakeApp, tmp_path: Path) -> None:
    async with connect(make_app(moderation_model=str(tmp_path / "none"))) as client:
        response = await client.post(PATH, json={"input": "a"})
    assert "no file or folder" in assert_error_shape(response, 503, code="not_configured")


async def test_no_text_is_logged(
    client: httpx.AsyncClient,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    await client.post(PATH, json={"input": ["I hate marzipan", "marzipan"]})
    await client.post(PATH, json={"input": ["marzipan", 5]})
    assert "marzipan" not in caplog.text
    output = capfd.readouterr()
    assert "marzipan" not in output.out + output.err
