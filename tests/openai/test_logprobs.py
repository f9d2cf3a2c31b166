"""Log-probabilities on the wire: of which tokens, in which shape, in which chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from extensions.openai.logprobs import make_text_reader
from modules.engine.outputs import TokenOutput
from modules.loaded_model import LoadedModel
from modules.text_generation import TextDelta
from modules.vocabulary import Vocabulary
from tests.conftest import connect
from tests.fakes import IM_END, IM_START, FakeEngine
from tests.modules.test_vocabulary import SPELLED
from tests.openai.assertions import MESSAGES, assert_error_shape, read_events

pytestmark = pytest.mark.anyio

NOTHING = -9999.0


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def complete(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    answer = await post(client, "/v1/completions", {"prompt": "Hi", **body})
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


async def chat(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    answer = await post(client, "/v1/chat/completions", {"messages": MESSAGES, **body})
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


async def stream(client: httpx.AsyncClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The choices of all chunks."""
    response = await client.post(path, json={"stream": True, **body})
    chunks = [event for event in read_events(response.text) if event != "[DONE]"]
    return [choice for chunk in chunks for choice in chunk["choices"]]


# Chats


async def test_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("ab", logprob=-0.5)
    (choice,) = await chat(client, logprobs=True, top_logprobs=2)
    a = {"token": "a", "logprob": -0.5, "bytes": [97]}
    b = {"token": "b", "logprob": -0.5, "bytes": [98]}
    assert choice["logprobs"] == {
        "content": [
            {**a, "top_logprobs": [a, {**b, "logprob": -1.5}]},
            {**b, "top_logprobs": [b, {"token": "c", "logprob": -1.5, "bytes": [99]}]},
        ],
        "refusal": None,
    }
    assert engine.requests[0].params.num_logprobs == 2


@pytest.mark.parametrize("body", [{}, {"logprobs": False}, {"logprobs": None, "top_logprobs": 0}])
async def test_nobody_asks(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any]
) -> None:
    (choice,) = await chat(client, **body)
    assert choice["logprobs"] is None
    assert engine.requests[0].params.num_logprobs is None


async def test_alternatives_need_logprobs(client: httpx.AsyncClient) -> None:
    for body in ({"top_logprobs": 1}, {"logprobs": False, "top_logprobs": 5}):
        response = await client.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
        assert_error_shape(response, 400, param="top_logprobs")


@pytest.mark.parametrize(
    ("path", "field", "values"),
    [
        ("/v1/completions", "logprobs", [-1, 21, 1.5, True, "1"]),
        ("/v1/chat/completions", "logprobs", [1, "true"]),
        ("/v1/chat/completions", "top_logprobs", [-1, 21, 1.5, True, "1"]),
    ],
)
async def test_ranges(client: httpx.AsyncClient, path: str, field: str, values: list[Any]) -> None:
    for value in values:
        body = {"prompt": "a", "messages": MESSAGES, "logprobs": True, field: value}
        assert_error_shape(await client.post(path, json=body), 400, param=field)


async def test_a_character_in_parts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for _ in range(2):
        engine.enqueue("é!")
    content = (await chat(client, logprobs=True))[0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [33]]
    assert [entry["token"] for entry in content] == ["\ufffd", "\ufffd", "!"]
    logprobs = (await complete(client, logprobs=0))[0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!", "<|im_end|>"]
    assert logprobs["text_offset"] == [0, 0, 1, 2]


async def test_what_is_impossible_is_still_a_number(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for _ in range(2):
        engine.enqueue("a", logprob=float("-inf"))
    (entry,) = (await chat(client, logprobs=True, top_logprobs=1))[0]["logprobs"]["content"]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (NOTHING, NOTHING)
    logprobs = (await complete(client, logprobs=1, max_tokens=1))[0]["logprobs"]
    assert (logprobs["token_logprobs"], logprobs["top_logprobs"]) == ([NOTHING], [{"a": NOTHING}])


async def test_no_reply_has_no_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("")
    (choice,) = await chat(client, logprobs=True)
    assert choice["logprobs"] == {"content": [], "refusal": None}


async def test_the_space_that_a_reply_loses_is_a_token(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for _ in range(2):
        engine.enqueue("  a")
    (choice,) = await chat(client, logprobs=True)
    assert choice["message"]["content"] == "a"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [" ", " ", "a"]
    path = "/v1/chat/completions"
    choices = await stream(client, path, messages=MESSAGES, logprobs=True)
    tokens = [
        [entry["token"] for entry in (c["logprobs"] or {}).get("content", ())] for c in choices
    ]
    assert tokens == [[], [" "], [" "], ["a"], []]


# Completions


async def test_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("ab", logprob=-0.5)
    (choice,) = await complete(client, logprobs=2, max_tokens=2)
    assert choice["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}],
        "text_offset": [0, 1],
    }
    assert not engine.requests[0].params.prompt_logprobs


async def test_zero_alternatives(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Only the token that was taken."""
    engine.enqueue("a")
    logprobs = (await complete(client, logprobs=0, max_tokens=1))[0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -1.0}]


async def test_special_tokens_take_no_place(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for skips, offsets in ((True, [0, 1, 1]), (False, [0, 1, 13])):
        engine.enqueue((97, IM_START, 98))
        body = {"logprobs": 0, "max_tokens": 3, "skip_special_tokens": skips}
        (choice,) = await complete(client, **body)
        assert choice["logprobs"]["tokens"] == ["a", "<|im_start|>", "b"]
        assert choice["logprobs"]["text_offset"] == offsets
        assert choice["text"][offsets[2] :] == "b"


async def test_the_end_is_a_token_of_a_completion(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """As with OpenAI: who asks for one token gets one, whatever it is."""
    engine.enqueue("", logprob=-0.25)
    logprobs = (await complete(client, logprobs=0, max_tokens=1))[0]["logprobs"]
    assert (logprobs["tokens"], logprobs["token_logprobs"]) == (["<|im_end|>"], [-0.25])


async def test_tokens_up_to_a_stop_string(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("abcdef")
    (choice,) = await complete(client, logprobs=0, stop="cd")
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


# Prompts


async def test_echo(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("c", logprob=-0.5)
    (choice,) = await complete(client, prompt="éb", echo=True, logprobs=1, max_tokens=1)
    assert choice["text"] == "ébc"
    assert choice["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"bytes:\\xa9": -0.5}, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 0, 1, 2],
    }


async def test_prompts_are_scored_without_a_reply(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"prompt": [[97, 98], [99, IM_END, 100]], "n": 2, "max_tokens": 0}
    answer = await post(client, "/v1/completions", {**body, "echo": True, "logprobs": 0})
    choices = answer["choices"]
    assert [choice["text"] for choice in choices] == ["ab", "ab", "cd", "cd"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 4
    tokens = [choice["logprobs"]["tokens"] for choice in choices]
    assert tokens == [["a", "b"]] * 2 + [["c", "<|im_end|>", "d"]] * 2
    assert choices[3]["logprobs"]["text_offset"] == [0, 1, 1]
    assert answer["usage"]["completion_tokens"] == 0


async def test_special_tokens_that_a_text_spells(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"prompt": "a<|im_end|>b", "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = await complete(client, **body)
    assert choice["text"] == "a<|im_end|>b"
    assert choice["logprobs"]["text_offset"] == [0, 1, 11]


async def test_echo_alone_scores_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    (choice,) = await complete(client, echo=True, max_tokens=1)
    assert choice["logprobs"] is None
    assert not engine.requests[0].params.prompt_logprobs


async def test_the_best_are_chosen_by_their_replies(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for text, logprob in (("a", -3.0), ("b", -1.0), ("c", -2.0)):
        engine.enqueue(text, logprob=logprob)
    body = {"echo": True, "logprobs": 0, "best_of": 3, "n": 2, "max_tokens": 1}
    choices = await complete(client, **body)
    assert [choice["text"] for choice in choices] == ["Hib", "Hic"]
    assert [c["logprobs"]["token_logprobs"] for c in choices] == [[None, -1, -1], [None, -2, -2]]


async def test_a_model_that_cannot_score_a_prompt(
    client: httpx.AsyncClient, manager: Any, model: LoadedModel
) -> None:
    manager.model = replace(model, continues_prompt=False)
    body = {"prompt": "a", "echo": True, "logprobs": 0}
    response = await client.post("/v1/completions", json=body)
    assert "probabilities" in assert_error_shape(response, 400, param="echo")


def test_offsets_where_a_text_gets_a_space() -> None:
    tokenizer = SPELLED["sentencepiece"][0]()
    read = make_text_reader(Vocabulary(tokenizer, len(tokenizer)), skip_special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(["<unk>", "▁a", "b", "▁a"])
    outputs = tuple(TokenOutput("x", i, is_prompt=True) for i in ids)
    logprobs = read(TextDelta(0, "ab a", outputs))
    assert logprobs is not None
    assert logprobs["text_offset"] == [0, 0, 1, 2]
    logprobs = read(TextDelta(0, "b", (TokenOutput("x", ids[2], logprob=-1.0),)))
    assert logprobs is not None
    assert logprobs["text_offset"] == [4]


# Streams

REPLIES = ("Hé 🙂\n", "stop: now then", "")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("echo", [False, True])
async def test_a_stream_says_the_same_as_a_whole(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, echo: bool
) -> None:
    is_chat = "chat" in path
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, "n": 3, "stop": "now"}
    if not is_chat:
        body |= {"prompt": "Hi é", "logprobs": 3, "echo": echo, "max_tokens": 50}
        del body["top_logprobs"]
    for text in 2 * REPLIES:
        engine.enqueue(text)
    whole = (await post(client, path, body))["choices"]
    parts = await stream(client, path, **body)
    for choice in whole:
        own = [part for part in parts if part["index"] == choice["index"]]
        found = [part["logprobs"] for part in own if part["logprobs"]]
        for key in ("content",) if is_chat else choice["logprobs"]:
            joined = [entry for logprobs in found for entry in logprobs[key]]
            assert joined == choice["logprobs"][key]


async def test_each_chunk_has_its_own_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("aé🙂b")
    body = {"prompt": "Hi", "echo": True, "logprobs": 0, "max_tokens": 20}
    choices = await stream(client, "/v1/completions", **body)
    end = choices.pop()
    assert (end["text"], end["finish_reason"]) == ("", "stop")
    assert end["logprobs"]["tokens"] == ["<|im_end|>"]
    assert [choice["text"] for choice in choices] == ["Hi", "a", "é", "🙂", "b"]
    counts = [len(choice["logprobs"]["tokens"]) for choice in choices]
    assert counts == [2, 1, 2, 4, 1]


async def test_openai_client(app: Any, engine: FakeEngine) -> None:
    engine.enqueue("ab")
    engine.enqueue("ab")
    async with connect(app) as http_client:
        api = openai.AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=http_client)
        answer = await api.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2
        )
        content = answer.choices[0].logprobs.content
        assert [entry.top_logprobs[1].token for entry in content] == ["b", "c"]
        text = await api.completions.create(model="tiny", prompt="x", logprobs=1, max_tokens=2)
        assert text.choices[0].logprobs.tokens == ["a", "b"]


async def test_offsets_of_a_prompt_that_was_cut(client: httpx.AsyncClient) -> None:
    body = {"prompt": "Once üpon", "truncation_length": 7, "max_tokens": 2, "echo": True}
    (choice,) = await complete(client, **body, logprobs=0)
    assert choice["text"].startswith("Once üpon")
    offsets = choice["logprobs"]["text_offset"]
    # " ", the two bytes of "ü", "p", "o" and "n" would be six; five are kept.
    assert offsets[:5] == [5, 5, 6, 7, 8]
    assert offsets[5] == len("Once üpon")
