"""Extensions with hooks, through HTTP. Each test writes its own scripts."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from extensions.openai.hooks import _dump, _read_state, build_state
from extensions.openai.typing import ChatCompletionRequest, CompletionRequest
from modules.engine.engine import EngineConfig
from modules.extensions import Extensions
from modules.loaded_model import LoadedModel
from tests.conftest import AsgiCall, LoadScripts, connect, wait_for
from tests.fakes import FakeEngine, FakeModelManager
from tests.openai.assertions import (
    assert_error_object,
    assert_error_shape,
    complete,
    read_events,
    stream,
)
from tests.openai.tiny import start_tiny_engine

pytestmark = pytest.mark.anyio

SECRET = "what the user has written"


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def prompts(engine: FakeEngine) -> list[str]:
    return [bytes(request.prompt_token_ids).decode() for request in engine.requests]


async def test_without_hooks_there_is_no_way_through_them(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the hooks' thread was asked")

    monkeypatch.setattr(Extensions, "submit", fail)
    monkeypatch.setattr("extensions.openai.hooks.build_state", fail)
    assert texts(await complete(client)) == ["ok"]


# What is read


async def test_input_and_output(load: LoadScripts, engine: FakeEngine) -> None:
    old = "def input_modifier(string): return string + ' 1'"
    new = """
def input_modifier(string, state, is_chat=False): return f"{string} {state['seed']} {is_chat}"
def output_modifier(string, state): return string.upper()
"""
    engine.enqueue("one")
    engine.enqueue("two")
    async with connect(load(old=old, new=new)) as client:
        answer = await complete(client, seed=5)
        assert texts(await complete(client, prompt=[65, 66])) == ["TWO"]
    assert prompts(engine) == ["Hi 1 5 False", "AB"]
    assert texts(answer) == ["ONE"]
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["prompt_tokens"] == len("Hi 1 5 False")


async def test_what_is_echoed_is_what_came(load: LoadScripts, engine: FakeEngine) -> None:
    script = """
def input_modifier(string): return "read this"
def output_modifier(string): return f"<{string}>"
"""
    async with connect(load(a=script)) as client:
        assert texts(await complete(client, echo=True)) == ["Hi<ok>"]


async def test_tokens(load: LoadScripts, engine: FakeEngine) -> None:
    tensors = """
import torch
def tokenizer_modifier(state, prompt, input_ids, input_embeds):
    assert (prompt, input_ids.dtype, input_ids.shape) == ("Hi", torch.int64, (1, 2))
    return prompt + "?", torch.cat([input_ids, input_ids], dim=-1), None
"""
    lists = """
def tokenizer_modifier(state, prompt, input_ids, input_embeds):
    return prompt, [*input_ids[0].tolist(), ord(prompt[-1])], input_embeds
"""
    async with connect(load(a=tensors, b=lists)) as client:
        answer = await complete(client)
    assert prompts(engine) == ["HiHi?"]
    assert answer["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("prompt, input_ids, 1", "it returned embeddings"),
        ("prompt, [300], None", "it returned a token id outside the model's vocabulary of 259"),
        ("prompt, [-1], None", "it returned a token id outside the model's vocabulary of 259"),
        ("prompt, [[1], [2]], None", "it returned no token ids of one text"),
        ("prompt, [], None", "it returned no token ids of one text"),
        ("prompt, [0.5], None", "it returned no token ids of one text"),
        ("prompt, 'Hi', None", "it returned no token ids"),
        ("prompt, input_ids", "3 values are expected, not 2"),
    ],
)
async def test_tokens_that_are_none(load: LoadScripts, returned: str, reason: str) -> None:
    script = f"def tokenizer_modifier(state, prompt, input_ids, embeds): return {returned}"
    async with connect(load(a=script)) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi"})
    message = assert_error_shape(response, 500, code="extension_failed")
    assert message.startswith(f"The extension a has failed in tokenizer_modifier: {reason}")


# What is answered


async def test_a_stream_carries_the_modified_reply_in_one_chunk(
    load: LoadScripts, engine: FakeEngine
) -> None:
    engine.enqueue("one")
    engine.enqueue("three")
    script = "def output_modifier(string, state, is_chat): return string[::-1]"
    async with connect(load(a=script)) as client:
        events = await stream(client, n=2, logprobs=0, stream_options={"include_usage": True})
    *chunks, last, done = events
    assert done == "[DONE]"
    assert last["usage"]["completion_tokens"] == 10
    shown = [
        (choice["index"], choice["text"], choice["finish_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
    ]
    assert shown == [(0, "eno", None), (0, "", "stop"), (1, "eerht", None), (1, "", "stop")]
    assert chunks[0]["choices"][0]["logprobs"]["tokens"][:3] == ["o", "n", "e"]


async def test_the_older_dialect_carries_it_in_one_chunk_too(
    load: LoadScripts, engine: FakeEngine
) -> None:
    engine.enqueue("one")
    app = load(a="def output_modifier(string): return string[::-1]")
    async with connect(app, headers={"user-agent": "python-requests/2.34.2"}) as client:
        messages = [{"role": "user", "content": "Hi"}]
        body = {"messages": messages, "stream": True}
        response = await client.post("/v1/chat/completions", json=body)
    events = read_events(response.text)
    assert [event["choices"][0]["message"]["content"] for event in events] == ["", "eno", ""]
    assert events[-1]["usage"]["completion_tokens"] == 4


async def test_a_scored_prompt_is_not_modified(load: LoadScripts, engine: FakeEngine) -> None:
    engine.enqueue("one")
    app = load(a="def output_modifier(string): return string[::-1]")
    async with connect(app) as client:
        (choice,) = (await complete(client, echo=True, logprobs=0))["choices"]
    assert choice["text"] == "Hieno"
    assert choice["logprobs"]["tokens"][:5] == ["H", "i", "o", "n", "e"]


async def test_a_reply_to_a_healed_prompt_is_modified_whole(
    load: LoadScripts, engine: FakeEngine
) -> None:
    engine.enqueue(":one")
    app = load(a="def output_modifier(string): return string.upper()")
    async with connect(app) as client:
        answer = await complete(client, prompt="a:", token_healing=True, echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "a:ONE"
    assert choice["logprobs"]["text_offset"][:4] == [0, 1, 2, 3]


async def test_pings_come_before_a_reply_in_one_piece(
    load: LoadScripts, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extensions.openai.streaming.PING_SECONDS", 0.05)
    engine.enqueue("one", blocks=True)
    app = load(a="def output_modifier(string): return string[::-1]")
    call = AsgiCall(app, "/v1/completions", {"prompt": "Hi", "stream": True})
    assert (await call.next_message())["status"] == 200
    body = (await call.next_message())["body"]
    assert body.startswith(b": ping")
    engine.abort_all()
    while not body.startswith(b"data: "):
        body = (await call.next_message())["body"]
    assert b'"text":"eno"' in body
    call.disconnect()
    await call.wait()


async def test_the_best_candidates_are_modified_replies(
    load: LoadScripts, engine: FakeEngine
) -> None:
    engine.enqueue("bad", logprob=-9.0)
    engine.enqueue("good", logprob=-1.0)
    async with connect(load(a="def output_modifier(string): return string + '!'")) as client:
        assert texts(await complete(client, best_of=2)) == ["good!"]


WRITER = """
def custom_generate_reply(question, original_question, seed, state, stopping_strings, is_chat):
    text = ""
    num_stops = len(stopping_strings)
    for word in (question, original_question, seed, state["max_new_tokens"], num_stops):
        text += f"{word} "
        yield text
def input_modifier(string): return string.upper()
"""


async def test_a_reply_of_an_extension(load: LoadScripts, engine: FakeEngine) -> None:
    async with connect(load(writer=WRITER)) as client:
        answer = await complete(client, n=2, seed=7, stop="END", max_tokens=3)
        chunks = await stream(client, seed=7)
    expected = [f"HI Hi {seed} 3 1 " for seed in (7, 8)]
    assert texts(answer) == expected
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 2
    assert answer["usage"]["completion_tokens"] == sum(map(len, expected))
    assert answer["usage"]["prompt_tokens"] == 2
    pieces = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert pieces == ["HI ", "Hi ", "7 ", "16 ", "0 ", ""]
    assert engine.requests == []


async def test_a_stop_string_ends_a_reply_of_an_extension(load: LoadScripts) -> None:
    script = """
params = {"steps": 0}
def custom_generate_reply(question, original_question, seed, state, stopping_strings):
    for text in ("a", "ab", "ab S", "ab STO", "ab STOP", "ab STOP and more"):
        params["steps"] += 1
        yield text
    raise AssertionError("it was not stopped")
"""
    async with connect(load(a=script)) as client:
        answer = await complete(client, stop=["STOP"])
        pieces = [
            chunk["choices"][0]["text"] for chunk in (await stream(client, stop=["STOP"]))[:-1]
        ]
    assert texts(answer) == ["ab "]
    assert answer["usage"]["completion_tokens"] == 3
    assert pieces == ["a", "b", " ", ""]


async def test_what_looked_like_a_stop_string_is_not_lost(load: LoadScripts) -> None:
    script = """
def custom_generate_reply(question, original_question, seed, state, stopping_strings):
    yield "ab S"
    yield "ab STO"
"""
    async with connect(load(a=script)) as client:
        assert texts(await complete(client, stop=["STOP"])) == ["ab STO"]


async def test_a_client_that_leaves_closes_the_generator(
    load: LoadScripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = threading.Event()
    monkeypatch.setattr("builtins.closed_of_test", closed, raising=False)
    script = """
def custom_generate_reply(question, original_question, seed, state, stopping_strings):
    text = ""
    try:
        while True:
            text += "x"
            yield text
    finally:
        closed_of_test.set()
"""
    call = AsgiCall(load(a=script), "/v1/completions", {"prompt": "Hi", "stream": True})
    assert (await call.next_message())["status"] == 200
    assert b"x" in (await call.next_message())["body"]
    call.disconnect()
    await call.wait()
    await wait_for(closed)


async def test_an_extension_may_leave_the_reply_to_the_model(load: LoadScripts) -> None:
    script = """
def custom_generate_reply(question, original_question, seed, state, stopping_strings):
    return None
"""
    async with connect(load(a=script)) as client:
        assert texts(await complete(client)) == ["ok"]


async def test_a_reply_of_an_extension_has_no_log_probabilities(load: LoadScripts) -> None:
    async with connect(load(writer=WRITER)) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "logprobs": 1})
    assert_error_shape(response, 400, param="logprobs")


# The state


async def test_the_state_is_the_request_by_both_names(
    load: LoadScripts, engine: FakeEngine
) -> None:
    script = """
def input_modifier(string, state):
    names = ("max_new_tokens", "max_tokens", "custom_stopping_strings", "truncation_length", "seed")
    return str([state[name] for name in names] + [state["prompt"], state["stream"]])
"""
    async with connect(load(a=script)) as client:
        await complete(client, stop="x", seed=3)
    assert prompts(engine) == ["[16, 16, ['x'], 1024, 3, ['Hi'], False]"]


async def test_a_modified_state_is_the_request(load: LoadScripts, engine: FakeEngine) -> None:
    in_place = """
def state_modifier(state):
    state["temperature"] = 0.25
    state["stop"].append("END")
    state["own"] = "remembered"
    return state
"""
    anew = """
def state_modifier(state): return {**state, "max_new_tokens": 3, "prompt": "Hello"}
def output_modifier(string, state): return f"{string} {state['own']} {state['max_new_tokens']}"
"""
    engine.enqueue("oEND!")
    async with connect(load(a=in_place, b=anew)) as client:
        answer = await complete(client, max_completion_tokens=9)
    (request,) = engine.requests
    assert (request.params.temperature, request.params.max_tokens) == (0.25, 3)
    assert prompts(engine) == ["Hello"]
    assert texts(answer) == ["oEN remembered 3"]


async def test_a_state_without_sense_is_the_extensions_fault(load: LoadScripts) -> None:
    good = "def state_modifier(state): return {**state, 'temperature': 2}"
    bad = f"def state_modifier(state): return {{**state, 'temperature': {SECRET!r}}}"
    async with connect(load(good=good, bad=bad)) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi"})
    message = assert_error_shape(response, 500, code="extension_failed")
    expected = "has failed in state_modifier: temperature cannot have that value."
    assert message == f"The extension bad {expected}"


@pytest.mark.parametrize(
    "body",
    [
        CompletionRequest(prompt="Hi"),
        CompletionRequest(
            prompt=[[1, 2], [3]],
            custom_token_bans="1, 2",
            logit_bias={"1": 5},
            sampler_priority="top_k",
            dry_sequence_breakers='"a", "b"',
            allowed_token_ids=[5, 6],
            stop=["a"],
            stream=True,
            stream_options={"include_usage": True},
            truncation_length=100,
        ),
        ChatCompletionRequest(
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}], "extra": 1}],
            user_name="Ann",
            mode="chat",
            max_tokens=0,
        ),
    ],
)
def test_a_state_holds_all_of_a_request(
    model: LoadedModel, body: CompletionRequest | ChatCompletionRequest
) -> None:
    assert type(body).model_validate(_dump(body)) == body
    given = build_state(body, model)
    assert _read_state(body, given, copy.deepcopy(given)) is body
    changed = _read_state(body, given, {**given, "temperature": 0.5})
    assert changed == body.model_copy(update={"temperature": 0.5})


# Logits


TINY_CONFIG = EngineConfig(max_model_len=256, num_cache_tokens=512)


@pytest.fixture
def tiny(model: LoadedModel, manager: FakeModelManager) -> Iterator[LoadedModel]:
    """The loaded model is a real one."""
    bridge = start_tiny_engine(TINY_CONFIG)
    manager.model = replace(model, engine=bridge, max_model_len=256)
    yield manager.model
    bridge.stop()


PROCESSOR = """
import torch
params = {"token": 65}
class Force:
    def __init__(self, prompt_len): self.prompt_len = prompt_len
    def __call__(self, input_ids, scores):
        assert input_ids.shape[-1] >= self.prompt_len
        token = params["token"] + input_ids.shape[-1] - self.prompt_len
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([token]), 0.0)
def logits_processor_modifier(processor_list, input_ids):
    processor_list.append(Force(input_ids.shape[-1]))
    return processor_list
"""


async def test_logits_processors(load: LoadScripts, tiny: LoadedModel) -> None:
    async with connect(load({"a": {"token": 97}}, a=PROCESSOR)) as client:
        for options in ({}, {"num_beams": 2, "do_sample": False}, {"guidance_scale": 2.0}):
            body = {"prompt": ["Hi", "Hello"], "max_tokens": 3, **options}
            assert texts(await complete(client, **body)) == ["abc"] * 2


async def test_two_logits_processors_take_turns(load: LoadScripts, tiny: LoadedModel) -> None:
    script = """
class Add:
    def __init__(self, token): self.token = token
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += 1000
        return scores
def logits_processor_modifier(processor_list, input_ids):
    processor_list += [Add(97), Add(98), Add(97)]
"""
    async with connect(load(a=script)) as client:
        assert texts(await complete(client, prompt="Hi", max_tokens=3)) == ["aaa"]


@pytest.mark.parametrize("body", ["raise SystemExit", "return scores * float('nan')"])
async def test_no_logits_processor_takes_the_engine_along(
    load: LoadScripts, tiny: LoadedModel, body: str
) -> None:
    script = f"""
def process(input_ids, scores):
    {body}
def logits_processor_modifier(processor_list, input_ids):
    if input_ids.shape[-1] == 3:
        processor_list.append(process)
"""
    async with connect(load(a=script)) as client:
        response = await client.post("/v1/completions", json={"prompt": "bad"})
        assert "a has failed in logits_processor_modifier" in assert_error_shape(
            response, 500, code="extension_failed"
        )
        assert (await client.get("/v1/internal/health")).status_code == 200
        await complete(client, prompt="Hi", max_tokens=3)


async def test_a_logits_processor_that_fails(
    load: LoadScripts, tiny: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"""
class Bad:
    def __call__(self, input_ids, scores): raise ValueError({SECRET!r})
class Odd:
    def __call__(self, input_ids, scores): return scores[0]
params = {{"processor": Bad}}
def logits_processor_modifier(processor_list, input_ids):
    if input_ids.shape[-1] != 2:
        processor_list.append(Odd() if input_ids.shape[-1] == 3 else Bad())
"""
    async with connect(load(a=script)) as client:
        body = {"max_tokens": 40, "ignore_eos": True}
        good, bad, odd = await asyncio.gather(
            client.post("/v1/completions", json={"prompt": "Hi", **body}),
            client.post("/v1/completions", json={"prompt": SECRET, **body}),
            client.post("/v1/completions", json={"prompt": "Hi!", **body}),
        )
        beams = await client.post(
            "/v1/completions", json={"prompt": SECRET, "num_beams": 2, "do_sample": False}
        )
    assert good.json()["usage"]["completion_tokens"] == 40
    for response, reason in (
        (bad, "ValueError"),
        (beams, "ValueError"),
        (odd, "a processor returned no scores for each token"),
    ):
        message = assert_error_shape(response, 500, code="extension_failed")
        assert message == f"The extension a has failed in logits_processor_modifier: {reason}."
    assert SECRET not in caplog.text


# Faults, and time


FAILING = {
    "input_modifier": "def input_modifier(string): raise ValueError(string)",
    "state_modifier": "def state_modifier(state): raise KeyError(state['prompt'][0])",
    "output_modifier": "def output_modifier(string): raise OSError(string)",
    "custom_generate_reply": """
def custom_generate_reply(question, original_question, seed, state, stopping_strings):
    yield ''
    raise RuntimeError(question)
""",
}


@pytest.mark.parametrize("hook", FAILING)
@pytest.mark.parametrize("streams", [False, True])
async def test_a_hook_that_fails(
    load: LoadScripts,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    hook: str,
    streams: bool,
) -> None:
    engine.enqueue(SECRET)
    async with connect(load(good="", bad=FAILING[hook])) as client:
        body = {"prompt": SECRET, "stream": streams}
        response = await client.post("/v1/completions", json=body)
    if streams and hook in ("output_modifier", "custom_generate_reply"):
        (event,) = read_events(response.text)
        message = assert_error_object(event, 500, code="extension_failed")
    else:
        message = assert_error_shape(response, 500, code="extension_failed")
    assert message.startswith(f"The extension bad has failed in {hook}: ")
    assert SECRET not in caplog.text


async def test_a_hook_that_takes_its_time_holds_nobody_else_up(
    load: LoadScripts, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = threading.Event(), threading.Event()
    monkeypatch.setattr("builtins.events_of_test", (entered, gate), raising=False)
    script = """
entered, gate = events_of_test
running = []
def input_modifier(string, state):
    running.append(string)
    assert len(running) == 1
    entered.set()
    gate.wait()
    running.remove(string)
    return string
"""
    async with connect(load(a=script)) as client:
        calls = [asyncio.create_task(complete(client, prompt=text)) for text in ("a", "b")]
        await wait_for(entered)
        assert (await client.get("/v1/internal/health")).status_code == 200
        assert not any(call.done() for call in calls)
        gate.set()
        for call in calls:
            assert texts(await call) == ["ok"]
    assert prompts(engine) == ["a", "b"]


async def test_clients_have_states_of_their_own(load: LoadScripts, engine: FakeEngine) -> None:
    script = """
def input_modifier(string, state):
    state["seen"] = string
    return string
def output_modifier(string, state): return state["seen"]
"""
    names = [f"client {number}" for number in range(8)]
    async with connect(load(a=script)) as client:
        answers = await asyncio.gather(*(complete(client, prompt=name) for name in names))
    assert [texts(answer) for answer in answers] == [[name] for name in names]
