"""The extensions that come with the server, through HTTP."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml
from fastapi import FastAPI

from modules.engine.async_engine import AsyncEngine
from modules.engine.engine import Engine, EngineConfig
from modules.errors import ExtensionError
from modules.extensions import FOLDER, load_extensions
from modules.hooks import HOOKS
from modules.loaded_model import LoadedModel
from modules.settings import Settings
from tests.conftest import MakeApp, connect
from tests.engine.conftest import CONFIGS
from tests.engine.conftest import build_model as build_tiny
from tests.fakes import VOCAB_SIZE, FakeEngine, FakeModelManager
from tests.openai.assertions import read_events

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def with_extension(make_app: MakeApp, name: str, **params: Any) -> FastAPI:
    return make_app(extensions=(name, "openai"), extension_params={name: params})


async def post(app: FastAPI, url: str, **body: Any) -> dict[str, Any]:
    async with connect(app) as client:
        response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def last_prompt(engine: FakeEngine) -> str:
    return bytes(i for i in engine.requests[-1].prompt_token_ids if i < 256).decode()


def test_each_is_tested_here() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*/script.py")}
    assert folders == {"openai", "example", "character_bias", "long_replies", "dictionary"}


# example


def test_the_example_has_every_hook() -> None:
    assert all(load_extensions(Settings(extensions=("example",))).has(hook) for hook in HOOKS)


async def test_the_example_changes_no_answer(
    make_app: MakeApp, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [*user("One"), {"role": "assistant", "content": "Two"}, *user("Three")]
    bodies = {
        CHAT: [{"messages": talk, "seed": 1}, {"messages": talk, "mode": "chat"}],
        TEXT: [{"prompt": "Hi", "seed": 1}, {"prompt": [72, 105], "logprobs": 1}],
    }
    answers = []
    for app in (make_app(), with_extension(make_app, "example", greeting="Hello there.")):
        answers.append([await post(app, url, **body) for url in bodies for body in bodies[url]])
    assert capsys.readouterr().out == "Hello there.\n"
    for answer in (answer for own in answers for answer in own):
        del answer["id"], answer["created"]
    assert answers[0] == answers[1]
    half = len(engine.requests) // 2
    without, beside = engine.requests[:half], engine.requests[half:]
    for a, b in zip(without, beside, strict=True):
        assert replace(a, request_id="") == replace(b, request_id="")


# character_bias


async def test_character_bias(make_app: MakeApp, engine: FakeEngine) -> None:
    app = with_extension(make_app, "character_bias", **{"bias string": " *smiles* "})
    engine.enqueue(" Hello!")
    answer = await post(app, CHAT, messages=user("Hi"))
    assert last_prompt(engine).endswith("assistant\n*smiles*")
    assert answer["choices"][0]["message"]["content"] == "Hello!"
    await post(app, CHAT, messages=user("Hi"), mode="chat", bot_name="Ann", character="None")
    assert last_prompt(engine).endswith("\nAnn: *smiles*")
    await post(app, TEXT, prompt="Hi")
    assert last_prompt(engine) == "Hi"


async def test_character_bias_may_be_off(make_app: MakeApp, engine: FakeEngine) -> None:
    for params in ({"activate": False}, {"bias string": " "}):
        app = with_extension(make_app, "character_bias", **params)
        await post(app, CHAT, messages=user("Hi"))
        assert last_prompt(engine).endswith("assistant\n")


# long_replies


@pytest.fixture
def ending_model(model: LoadedModel, manager: FakeModelManager) -> Iterator[LoadedModel]:
    """A tiny real model of which every second token ends a reply."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = VOCAB_SIZE
    ends = frozenset(range(0, VOCAB_SIZE, 2)) - {ord("\n")}
    engine_config = EngineConfig(max_model_len=256, num_cache_tokens=512, eos_token_ids=ends)
    bridge = AsyncEngine(Engine(build_tiny("tiny", {"tiny": config}), engine_config))
    manager.model = replace(model, engine=bridge, max_model_len=256, eos_token_ids=ends)
    yield manager.model
    bridge.stop()


async def count(app: FastAPI, **body: Any) -> list[int]:
    """Tokens of ten replies."""
    wishes = [{"prompt": "Hi", "max_tokens": 60, "seed": seed, **body} for seed in range(10)]
    answers = [await post(app, TEXT, **wish) for wish in wishes]
    return [answer["usage"]["completion_tokens"] for answer in answers]


async def test_long_replies(make_app: MakeApp, ending_model: LoadedModel) -> None:
    assert max(await count(make_app())) < 30
    for name, value, expected in (("min_length", 40, 41), ("activate", False, 1)):
        app = with_extension(make_app, "long_replies", **{name: value})
        counts = await count(app)
        assert min(counts) in (expected, expected + 1)
        assert max(counts) < expected + 30
    assert max(await count(with_extension(make_app, "long_replies"), max_tokens=5)) == 5


async def test_long_replies_avoid_line_breaks(make_app: MakeApp, ending_model: LoadedModel) -> None:
    body = {"prompt": "Hi", "seed": 1, "max_tokens": 30, "ignore_eos": True}
    body["logit_bias"] = {"10": 4}  # a model that likes them
    texts = []
    for app in (make_app(), with_extension(make_app, "long_replies")):
        answer = await post(app, TEXT, **body, n=5)
        texts.append("".join(choice["text"] for choice in answer["choices"]))
    without, long = (text.count("\n") for text in texts)
    assert long < without / 3


# dictionary


async def test_dictionary(make_app: MakeApp, engine: FakeEngine) -> None:
    app = with_extension(make_app, "dictionary")
    engine.enqueue("Hello, FRIEND! I'm here. I want 2 apples, an apple_pie and water.")
    talk = [
        {"role": "system", "content": "Hola means hello."},
        *user("Veo agua"),
        {"role": "assistant", "content": "Bueno."},
        *user("HOLA, Mundo! Yo quiero holas."),
    ]
    answer = await post(app, CHAT, messages=talk)
    expected = "Hola, AMIGO! I'm aquí. yo quiero 2 apples, an apple_pie y agua."
    assert answer["choices"][0]["message"]["content"] == expected
    prompt = last_prompt(engine)
    assert "HELLO, World! I want holas." in prompt
    assert "See water" in prompt
    assert "Good." in prompt
    assert "Hola means hello." in prompt


async def test_dictionary_of_completions_and_streams(make_app: MakeApp, engine: FakeEngine) -> None:
    engine.enqueue("red house")
    async with connect(with_extension(make_app, "dictionary")) as client:
        response = await client.post(TEXT, json={"prompt": "la casa", "stream": True})
    *events, done = read_events(response.text)
    assert [event["choices"][0]["text"] for event in events] == ["rojo casa", ""]
    assert last_prompt(engine) == "la house"


async def test_dictionary_may_be_off(make_app: MakeApp, engine: FakeEngine) -> None:
    app = with_extension(make_app, "dictionary", activate=False)
    engine.enqueue("house")
    answer = await post(app, CHAT, messages=[*user("casa"), *user("hola")])
    assert answer["choices"][0]["message"]["content"] == "house"
    assert "casa" in last_prompt(engine)


def test_the_dictionary_goes_both_ways() -> None:
    words = yaml.safe_load((FOLDER / "dictionary" / "spanish.yaml").read_text("utf-8"))
    assert len(words) > 100
    assert all(isinstance(word, str) and word for pair in words.items() for word in pair)
    assert len(set(words.values())) == len(words)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("klingon", "no dictionary named 'klingon'.* Known: spanish"),
        ("../example/script", "no dictionary named"),
    ],
)
def test_a_dictionary_that_is_not_there(make_app: MakeApp, name: str, message: str) -> None:
    with pytest.raises(ExtensionError, match=f"extension dictionary cannot be set up: .*{message}"):
        with_extension(make_app, "dictionary", dictionary=name)
