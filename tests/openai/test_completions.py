from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from extensions.openai.usage import UsageCounter
from modules.engine.outputs import FinishReason, TokenOutput
from modules.text_generation import Generation, TextDelta
from tests.fakes import (
    END_OF_TEXT,
    IM_END,
    FakeEngine,
    FakeModelManager,
    build_model,
    build_tokenizer,
)
from tests.openai.assertions import assert_error_shape, complete, stream

pytestmark = pytest.mark.anyio


async def test_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue(" there", num_cached_tokens=1)
    answer = await complete(client)
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"text": " there", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 7,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


async def test_sixteen_tokens_unless_more_are_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for body in ({}, {"max_tokens": None}, {"max_tokens": 20}, {"max_completion_tokens": 3}):
        engine.enqueue("x" * 40)
        choice = (await complete(client, **body))["choices"][0]
        assert choice["finish_reason"] == "length"
    params = [request.params.max_tokens for request in engine.requests]
    assert params == [16, 16, 20, 3]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["a", "b"], [(97,), (98,)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
async def test_forms_of_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, expected: Any
) -> None:
    answer = await complete(client, prompt=prompt)
    assert [request.prompt_token_ids for request in engine.requests] == expected
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))


@pytest.mark.parametrize("prompt", [[], ["a", 1], [1, "a"], [1, [2]], [True], 5, {"a": 1}, [[1.5]]])
async def test_other_prompts_are_refused(client: httpx.AsyncClient, prompt: Any) -> None:
    response = await client.post("/v1/completions", json={"prompt": prompt})
    assert "token ids" in assert_error_shape(response, 400, param="prompt")


@pytest.mark.parametrize("body", [{}, {"prompt": None}])
async def test_the_prompt_is_required(client: httpx.AsyncClient, body: Any) -> None:
    response = await client.post("/v1/completions", json=body)
    assert assert_error_shape(response, 400, param="prompt") == (
        "Missing required parameter: 'prompt'."
    )


async def test_empty_prompt_and_unknown_id(client: httpx.AsyncClient) -> None:
    for prompt in ("", [999], [-1]):
        response = await client.post("/v1/completions", json={"prompt": prompt})
        assert_error_shape(response, 400, param="prompt")


async def test_indices_of_several_choices(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for text in ("a0", "a1", "b0", "b1"):
        engine.enqueue(text)
    answer = await complete(client, prompt=["a", "bb"], n=2)
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert answer["usage"]["prompt_tokens"] == 3  # each prompt once
    assert answer["usage"]["completion_tokens"] == 12


async def test_cached_tokens_of_a_prompt_count_once(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for num_tokens in (1, 2, 0, 2):
        engine.enqueue("x", num_cached_tokens=num_tokens)
    answer = await complete(client, prompt=["aa", "bb"], n=2)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_cached_tokens_of_many_prompts_are_counted_in_one_pass() -> None:
    num_prompts = 20_000

    async def play() -> AsyncGenerator[TextDelta, None]:
        for index in range(num_prompts):
            yield TextDelta(index, "x", (TokenOutput(str(index), 120, None, 1),))

    async def count() -> dict[str, Any]:
        usage = UsageCounter(Generation(((120, 120),) * num_prompts, play()), num_choices=1)
        async for _ in usage.count():
            pass
        start = time.process_time()
        counts = usage.build_usage()
        assert time.process_time() - start < 30  # seconds, also where a machine is slow
        return counts

    counts = asyncio.run(count())
    assert counts["prompt_tokens_details"] == {"cached_tokens": num_prompts}


async def test_several_choices_interleave_in_a_stream(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.enqueue("ab")
    engine.enqueue("cd")
    *events, done = await stream(client, prompt=["1", "2"])
    assert done == "[DONE]"
    pieces = [(c["index"], c["text"], c["finish_reason"]) for e in events for c in e["choices"]]
    assert pieces == [
        (0, "a", None),
        (1, "c", None),
        (0, "b", None),
        (1, "d", None),
        (0, "", "stop"),
        (1, "", "stop"),
    ]


async def test_best_of_ranks_by_mean_logprob(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("short", logprob=-2.0)
    engine.enqueue("a longer one", logprob=-0.5)
    engine.enqueue("second", logprob=-1.0)
    answer = await complete(client, best_of=3, n=2)
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "a longer one"), (1, "second")]
    assert answer["usage"]["completion_tokens"] == 6 + 13 + 7  # of all candidates
    assert all(request.params.num_logprobs == 0 for request in engine.requests)


async def test_best_of_for_each_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for text, logprob in (("a", -1.0), ("A", -0.1), ("b", -0.1), ("B", -1.0)):
        engine.enqueue(text, logprob=logprob)
    answer = await complete(client, prompt=["1", "2"], best_of=2)
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "A"), (1, "b")]


async def test_best_of_has_limits(client: httpx.AsyncClient) -> None:
    for body in ({"n": 3, "best_of": 2}, {"stream": True, "best_of": 2}, {"best_of": 129}):
        response = await client.post("/v1/completions", json={"prompt": "a", **body})
        assert_error_shape(response, 400, param="best_of")
    response = await client.post("/v1/completions", json={"prompt": ["a"] * 100, "n": 100})
    assert_error_shape(response, 400, param="prompt")


@pytest.mark.parametrize("prompt", ["Hé", list("Hé".encode())])
async def test_echo(client: httpx.AsyncClient, engine: FakeEngine, prompt: Any) -> None:
    engine.enqueue("!")
    assert (await complete(client, prompt=prompt, echo=True))["choices"][0]["text"] == "Hé!"
    engine.enqueue("!")
    events = await stream(client, prompt=prompt, echo=True)
    assert [e["choices"][0]["text"] for e in events[:-1]] == ["Hé", "!", ""]


async def test_echo_of_each_choice(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=["a", "b"], n=2, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["aok", "aok", "bok", "bok"]


async def test_echo_alone(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await complete(client, echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "Hi"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert engine.requests == []


@pytest.mark.parametrize("stop", ["END", ["END"], ["nope", "END", ""]])
async def test_stop_strings_across_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, stop: Any
) -> None:
    engine.enqueue("one ENter END two")
    answer = await complete(client, stop=stop, max_tokens=50)
    assert answer["choices"][0]["text"] == "one ENter "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len("one ENter END")
    engine.enqueue("one ENter END two")
    events = await stream(client, stop=stop, max_tokens=50)
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "one ENter "
    assert len(engine.aborted) == 2


async def test_a_held_back_tail_is_not_lost(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("the EN")
    assert (await complete(client, stop="END"))["choices"][0]["text"] == "the EN"


async def test_emoji_split_over_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    text = "a🙂é한"
    engine.enqueue(text)
    events = await stream(client)
    assert [e["choices"][0]["text"] for e in events[:-1]] == ["a", "🙂", "é", "한", ""]
    engine.enqueue(text.encode()[:3], finish_reason=FinishReason.LENGTH)
    assert (await complete(client))["choices"][0]["text"] == "a\ufffd"


async def test_special_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    ids = (97, IM_END, 98)
    engine.enqueue(ids)
    assert (await complete(client))["choices"][0]["text"] == "ab"
    engine.enqueue(ids)
    answer = await complete(client, skip_special_tokens=False)
    assert answer["choices"][0]["text"] == "a<|im_end|>b"


async def test_include_usage(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    events = await stream(client, stream_options={"include_usage": True})
    *chunks, usage, done = events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 5
    assert all("usage" not in e for e in (await stream(client))[:-1])


async def test_prompt_longer_than_the_context(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x" * 1024})
    message = assert_error_shape(response, 400, param="prompt", code="context_length_exceeded")
    assert "1024 tokens" in message


# How prompts become tokens


async def test_a_long_prompt_keeps_its_end(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    prompt = "<|endoftext|>0123456789"
    for body in (
        {"truncation_length": 8, "max_tokens": 5},
        {"truncation_length": 10**6, "max_tokens": 5},
        {"truncation_length": 8, "max_tokens": 5, "auto_max_new_tokens": True},
        {"truncation_length": 100, "max_tokens": 5, "auto_max_new_tokens": True},
    ):
        await complete(client, prompt=prompt, **body)
    asked = [(request.prompt_token_ids, request.params.max_tokens) for request in engine.requests]
    whole = (END_OF_TEXT, *b"0123456789")
    assert asked == [
        ((END_OF_TEXT, *b"89"), 5),
        (whole, 5),
        ((END_OF_TEXT, *b"789"), 4),
        (whole, 89),
    ]


async def test_a_reply_that_leaves_no_room(client: httpx.AsyncClient) -> None:
    for body in ({"truncation_length": 16}, {"truncation_length": 5000, "max_tokens": 1024}):
        response = await client.post("/v1/completions", json={"prompt": "a", **body})
        assert_error_shape(response, 400, param="max_tokens")


async def test_what_is_longer_than_the_context_even_so(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["ab", ""], "truncation_length": 17}
    response = await client.post("/v1/completions", json=body)
    assert "is empty" in assert_error_shape(response, 400, param="prompt")


async def test_add_bos_token(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, prompt="<|endoftext|>ab", add_bos_token=False)
    assert engine.requests[0].prompt_token_ids == tuple(b"ab")


async def test_min_length_counts_the_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, prompt=["abc", "abcdefghij"], min_length=8)
    await complete(client, prompt="abc", min_length=8, min_tokens=6)
    assert [request.params.min_tokens for request in engine.requests] == [5, 0, 6]


async def test_token_healing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("://x")
    answer = await complete(client, prompt="http:", token_healing=True, stop=":")
    assert answer["choices"][0]["text"] == "//x"
    (request,) = engine.requests
    assert request.prompt_token_ids == tuple(b"http")
    assert request.params.first_token_ids == (ord(":"),)
    assert answer["usage"]["total_tokens"] == 4 + 5
    engine.enqueue("://x")
    events = await stream(client, prompt="http:", token_healing=True, echo=True)
    assert [e["choices"][0]["text"] for e in events[:-1]] == ["http:", "/", "/", "x", ""]


async def test_prompts_that_are_not_healed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for prompt in ("a", "a<|im_end|>", [97, 98]):
        await complete(client, prompt=prompt, token_healing=True)
    await complete(client, prompt="ab")
    assert all(request.params.first_token_ids is None for request in engine.requests)


async def test_fill_in_the_middle(
    client: httpx.AsyncClient, engine: FakeEngine, manager: FakeModelManager
) -> None:
    tokenizer = build_tokenizer("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    manager.model = build_model(engine, tokenizer)
    engine.enqueue("m")
    answer = await complete(client, prompt="ab", suffix="yz", echo=True, stop_token_ids=[5])
    assert answer["choices"][0]["text"] == "abm"
    (request,) = engine.requests
    prompt = manager.model.decode(request.prompt_token_ids, False)
    assert prompt == "<fim_prefix>ab<fim_suffix>yz<fim_middle>"
    assert request.params.stop_token_ids == (5, 259, 260, 261, END_OF_TEXT)


async def test_models_that_cannot_fill_in_the_middle(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
    assert "no tokens for it" in assert_error_shape(response, 400, param="suffix")


async def test_presets(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, preset="Yara", top_k=5, top_p=None)
    params = engine.requests[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0.82, 5, 0.21)


# How fast it comes


async def test_streams_are_held_back(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("abcdef")
    start = time.monotonic()
    events = await stream(client, max_tokens_second=100)
    assert time.monotonic() - start > 0.9 * 6 / 100  # the seventh token ends the text
    assert [e["choices"][0]["text"] for e in events[:-1]] == [*"abcdef", ""]


async def test_whole_answers_are_not(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.enqueue("x" * 100)
    start = time.monotonic()
    await complete(client, max_tokens=100, max_tokens_second=1)
    assert time.monotonic() - start < 50  # and not 100, also where a machine is slow


async def test_offsets_where_a_prompt_was_healed(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """The first token begins in the prompt, which is in the text with `echo` only."""
    for prompt, generated, echo, expected in (
        ("http:", "://", False, [0, 0, 1]),
        ("http:", "://", True, [0, 1, 2, 3, 4, 5, 6]),
        ("é", "é!".encode()[1:], False, [0, 0]),
        ("é", "é!".encode()[1:], True, [0, 0, 1]),
    ):
        engine.enqueue(tuple(generated) if isinstance(generated, bytes) else generated)
        body = {"prompt": prompt, "token_healing": True, "echo": echo, "logprobs": 0}
        choice = (await complete(client, **body))["choices"][0]
        offsets = choice["logprobs"]["text_offset"]
        assert offsets[: len(expected)] == expected, (prompt, echo)
        assert offsets[len(expected) :] == [len(choice["text"])]
