"""Loads, unloads, changes of adapters and requests in any interleaving, over tiny real models:
whatever is answered is what the model that the answer names, with the adapter that it names, would
have said alone, or a typed error.

What is done, when, and to which model is drawn from a seed. A further kind of change is one more
function in `STEPS`.
"""

from __future__ import annotations

import asyncio
import copy
import random
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from modules.context import build_context
from modules.extensions import load_extensions
from modules.models import ModelManager
from modules.settings import Settings
from tests.adapters import save_adapter
from tests.conftest import AsgiCall, connect
from tests.engine.conftest import CONFIGS
from tests.engine.conftest import build_model as build_weights
from tests.fakes import VOCAB_SIZE, build_tokenizer
from tests.openai.assertions import read_events

pytestmark = pytest.mark.anyio

NAMES = ("alpha", "beta", "gamma")
ADAPTERS = ("red", "blue")
PROMPTS = ("Once upon a time", "Why?")
NUM_AT_ONCE = 6
NUM_STEPS = 6
"""Of each."""
PING = re.compile(r"^: ping .*\n\n", re.MULTILINE)
TYPED = {
    "adapter_not_found",
    "engine_dead",
    "generation_aborted",
    "model_load_failed",
    "model_not_found",
    "no_model_loaded",
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one shape, with other weights each, and a folder that is none."""
    folder = tmp_path_factory.mktemp("models")
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = VOCAB_SIZE
    for seed, name in enumerate(NAMES):
        model = build_weights("tiny", {"tiny": config})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2, generator=generator)
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    for seed, name in enumerate(ADAPTERS):
        save_adapter(model, folder / ".loras" / name, seed)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], str]:
    """Filled by the first test."""
    return {}


@dataclass(slots=True)
class Run:
    """One server and what is done to it."""

    app: FastAPI
    manager: ModelManager
    client: httpx.AsyncClient
    rng: random.Random
    expected: dict[tuple[str, str], str]
    """(model, prompt) → what it says; as `model:adapter` with that one, else with none."""
    outcomes: Counter[str] = field(default_factory=Counter)

    def check(self, body: Any, asked: str | None, prompt: str) -> None:
        if "error" in body:
            self.note_error(body)
            return
        name = body["model"]
        assert body["choices"][0]["text"] == self.expected[name, prompt]
        if asked in NAMES and self.manager._settings.model_autoload:
            assert name.partition(":")[0] == asked
        self.outcomes[f"answer of {name}"] += 1

    def note_error(self, body: Any) -> None:
        assert body["error"]["code"] in TYPED, body
        self.outcomes[body["error"]["code"]] += 1


def build_body(model: str | None, lora: str, prompt: str) -> dict[str, Any]:
    """Where a request names no adapter, it gets those that happen to be loaded: all name one."""
    return {"model": model, "lora": lora, "prompt": prompt, "temperature": 0, "max_tokens": 12}


async def ask(run: Run) -> None:
    asked, prompt = run.rng.choice((*NAMES, None, "gpt-4")), run.rng.choice(PROMPTS)
    body = build_body(asked, run.rng.choice(("none", "none", *ADAPTERS)), prompt)
    run.check((await run.client.post("/v1/completions", json=body)).json(), asked, prompt)


async def ask_for_a_stream(run: Run) -> None:
    asked, prompt = run.rng.choice((*NAMES, None)), run.rng.choice(PROMPTS)
    lora = run.rng.choice(("none", "none", *ADAPTERS))
    body = {**build_body(asked, lora, prompt), "stream": True}
    response = await run.client.post("/v1/completions", json=body)
    if response.status_code != 200:
        run.note_error(response.json())
        return
    *chunks, last = read_events(PING.sub("", response.text))
    if last != "[DONE]":
        run.note_error(last)
        return
    (name,) = {chunk["model"] for chunk in chunks}
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    run.check({"model": name, "choices": [{"text": text}]}, asked, prompt)


async def leave(run: Run) -> None:
    """A client that goes while it is answered, or before."""
    body = {"prompt": PROMPTS[0], "max_tokens": 200, "model": run.rng.choice(NAMES)}
    call = AsgiCall(run.app, "/v1/completions", {**body, "stream": run.rng.random() < 0.5})
    await asyncio.sleep(run.rng.uniform(0, 0.2))
    call.disconnect()
    with suppress(TimeoutError):
        await call.wait()


async def tokenize(run: Run) -> None:
    response = await run.client.post("/tokenize", json={"prompt": "abc"})
    answer = response.json()
    if "error" in answer:
        run.note_error(answer)
    else:
        assert answer["tokens"] == [97, 98, 99]


async def load(run: Run) -> None:
    name = run.rng.choice((*NAMES, *NAMES, "broken", "nothing"))
    args = {"max_model_len": run.rng.choice((128, 512))} if run.rng.random() < 0.5 else {}
    body = {"model_name": name, "args": args}
    response = await run.client.post("/v1/internal/model/load", json=body)
    if name in NAMES:
        assert response.json() == "OK"
    else:
        assert response.status_code in (404, 500)
        run.note_error(response.json())


async def unload(run: Run) -> None:
    body = {"model_name": run.rng.choice((*NAMES, None))}
    response = await run.client.post("/v1/internal/model/unload", json=body)
    if response.status_code != 200:
        run.note_error(response.json())
    else:
        assert response.json() == "OK"


async def ask_by_one_name(run: Run) -> None:
    asked, adapter = run.rng.choice(NAMES), run.rng.choice(ADAPTERS)
    body = build_body(f"{asked}:{adapter}", "", PROMPTS[0])
    del body["lora"]
    answer = (await run.client.post("/v1/completions", json=body)).json()
    # Of a model that is not there, the name means nothing: the default answers, as it is.
    if "error" in answer or ":" in answer["model"]:
        run.check(answer, asked, PROMPTS[0])


async def load_adapters(run: Run) -> None:
    wished = run.rng.choice((ADAPTERS, ADAPTERS, ["red"], ["red", "missing"]))
    body = {"lora_names": wished, "model": run.rng.choice(NAMES)}
    response = await run.client.post("/v1/internal/lora/load", json=body)
    if response.status_code != 200:
        run.note_error(response.json())


async def unload_adapters(run: Run) -> None:
    response = await run.client.post("/v1/internal/lora/unload", json={})
    if response.status_code != 200:
        run.note_error(response.json())


STEPS: dict[Callable[[Run], Awaitable[None]], int] = {
    ask: 10,
    ask_for_a_stream: 8,
    leave: 3,
    tokenize: 3,
    load: 4,
    unload: 2,
    ask_by_one_name: 4,
    load_adapters: 8,
    unload_adapters: 1,
}
"""How often each is drawn, beside the others."""


async def learn(run: Run) -> None:
    """What each model says, alone."""
    for name in NAMES:
        await run.manager.load(name, {"lora": ADAPTERS})
        for prompt in PROMPTS:
            for lora in ("none", *ADAPTERS):
                body = build_body(None, lora, prompt)
                answer = (await run.client.post("/v1/completions", json=body)).json()
                assert answer["model"] == (name if lora == "none" else f"{name}:{lora}")
                run.expected[answer["model"], prompt] = answer["choices"][0]["text"]
    assert len(set(run.expected.values())) == len(run.expected)


async def take_steps(run: Run, steps: Iterable[Callable[[Run], Awaitable[None]]]) -> None:
    """One of those that do things at the same time."""
    for step in steps:
        await step(run)


@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (1, {"model_autoload": True}),
        (2, {"model_autoload": True, "max_loaded_models": 2, "idle_timeout": 0.001}),
        (3, {"max_loaded_models": 3}),
    ],
)
async def test_only_right_answers_or_typed_errors(
    model_dir: Path, expected: dict[tuple[str, str], str], seed: int, settings: dict[str, Any]
) -> None:
    threads = set(threading.enumerate())
    known = Settings(
        **settings,
        model_dir=model_dir,
        lora_dir=model_dir / ".loras",
        extensions=("openai",),
        cpu=True,
        dtype="float32",
        kv_cache_memory=0.01,
    )
    manager, app, extensions = ModelManager(known), FastAPI(), load_extensions(known)
    context = build_context(known, manager, app, extensions)
    extensions.set_up(context)
    rng = random.Random(seed)
    async with connect(app, timeout=60) as client:
        run = Run(app, manager, client, rng, expected)
        if not expected:
            await learn(run)
        service = asyncio.create_task(manager.unload_idle()) if known.idle_timeout else None
        await manager.load_all(NAMES)
        # Each has its own: what fails at once shall not take the steps of those that wait.
        steps = (rng.choices([*STEPS], [*STEPS.values()], k=NUM_STEPS) for _ in range(NUM_AT_ONCE))
        await asyncio.gather(*(take_steps(run, own) for own in steps))
        if service is not None:
            service.cancel()
    assert any(run.outcomes[f"answer of {name}"] for name in NAMES), run.outcomes
    await require_nothing_left(manager, threads)


async def require_nothing_left(manager: ModelManager, threads: set[threading.Thread]) -> None:
    """Neither leases, nor models, nor their threads."""
    assert all(place.is_free for place in manager._places.values())
    await manager.unload()  # when all loads are done, also those whose clients have left
    if manager._leaving:
        await asyncio.wait(manager._leaving.values(), timeout=10)
    assert not (manager._places or manager._leaving)
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not left & {"inference", "loading"}
