"""What an engine takes, driven from here step by step: decoding, reading, and both."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from modules.engine.engine import Engine
from modules.engine.low_rank import Adapter
from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest

Prompt = tuple[int, ...]

GREEDY = SamplingParams(temperature=0.0)


def random_prompts(count: int, num_tokens: int, vocab_size: int) -> list[Prompt]:
    """Ones that no cache can know."""
    return [tuple(random.choices(range(vocab_size), k=num_tokens)) for _ in range(count)]


def time_decoding(
    engine: Engine,
    prompts: list[Prompt],
    max_tokens: int,
    params: SamplingParams = GREEDY,
    adapters: Sequence[tuple[Adapter, ...]] = (),
) -> float:
    """Tokens per second from when all streams have started until the first has ended; the first of
    them with `adapters`.
    """
    _add(engine, prompts, max_tokens, params, adapters)
    started: set[str] = set()
    while len(started) < len(prompts):
        started.update(output.request_id for output in engine.step())
    start, elapsed, num_outputs = time.perf_counter(), 0.0, 0
    is_full = True
    while engine.has_unfinished:
        outputs = engine.step()
        if is_full:
            num_outputs += len(outputs)
            elapsed = time.perf_counter() - start
        is_full &= not any(output.finish_reason for output in outputs)
    if not num_outputs:
        raise SystemExit("The first stream ends before the last one starts: raise --tokens.")
    return num_outputs / elapsed


def time_reading(engine: Engine, prompt: Prompt) -> float:
    """Seconds until the first token after `prompt`."""
    return time_all(engine, [prompt], 1)


def time_all(
    engine: Engine,
    prompts: list[Prompt],
    max_tokens: int,
    adapters: Sequence[tuple[Adapter, ...]] = (),
) -> float:
    """Seconds for everything: all prompts at once, until the last token."""
    _add(engine, prompts, max_tokens, GREEDY, adapters)
    start = time.perf_counter()
    while engine.has_unfinished:
        engine.step()
    return time.perf_counter() - start


def _add(
    engine: Engine,
    prompts: list[Prompt],
    max_tokens: int,
    params: SamplingParams,
    adapters: Sequence[tuple[Adapter, ...]],
) -> None:
    params = replace(params, max_tokens=max_tokens, ignore_eos=True)
    for prompt, own in zip_longest(prompts, adapters, fillvalue=()):
        name = f"{random.getrandbits(64)}"
        engine.add(SequenceRequest(name, prompt, params, adapters=own))
