"""The engine in this process: tokens per second by number of streams and number type, and quality.

    python benchmarks/engine.py --model SmolLM2-135M-Instruct --text some_text.txt

Runs the number types in turn, as often as --rounds says, and prints medians. Quality is the
perplexity of --text, read in pieces of 512 tokens, against float32.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # as in server.py

import torch
import torch.nn.functional as F

from modules.engine.async_engine import AsyncEngine
from modules.engine.attention import Segment
from modules.engine.cache_manager import BLOCK_SIZE
from modules.engine.engine import Engine
from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest
from modules.engine.torch_attention import TorchAttention
from modules.models import load_model
from modules.settings import load_settings

NUM_STREAMS = (1, 4, 16, 64)
NUM_PROMPT_TOKENS = 1000
PIECE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "int8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="to generate per stream")
    parser.add_argument("--text", type=Path, help="for the perplexity")
    options = parser.parse_args()
    engines = {dtype: load_engine(options.model, dtype) for dtype in options.dtypes}
    measures: dict[str, Callable[[Engine], float]] = {
        f"decode, {count} streams (tok/s)": lambda engine, count=count: decode(
            engine, count, options.tokens
        )
        for count in NUM_STREAMS
    }
    measures[f"read {NUM_PROMPT_TOKENS} tokens (tok/s)"] = read
    results: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for name, measure in measures.items():
            for dtype, (engine, _) in engines.items():
                results.setdefault((name, dtype), []).append(measure(engine))
    print_row("", *options.dtypes, "ratio")
    for name in measures:
        print_medians(name, [statistics.median(results[name, dtype]) for dtype in engines])
    if options.text:
        text = options.text.read_text(encoding="utf-8")
        values = [perplexity(*engine_and_encode, text) for engine_and_encode in engines.values()]
        print_medians("perplexity", values)


def load_engine(name: str, dtype: str) -> tuple[Engine, Callable[[str], list[int]]]:
    """The engine of a loaded model, without its thread: it is driven from here."""
    settings = load_settings(["--dtype", dtype, "--max-num-seqs", str(max(NUM_STREAMS))], {})
    model = load_model(name, settings)
    engine: Any = model.engine
    assert isinstance(engine, AsyncEngine)
    engine.stop()
    return engine._engine, lambda text: list(model.encode(text, add_special_tokens=True))


def decode(engine: Engine, count: int, num_tokens: int) -> float:
    for number in range(count):
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        engine.add(SequenceRequest(str(number), tuple(range(100, 132)), params))
    while engine.scheduler.waiting or any(
        seq.num_uncomputed_tokens > 1 for seq in engine.scheduler.running
    ):
        engine.step()
    start = time.perf_counter()
    num_outputs = 0
    while engine.has_unfinished:
        num_outputs += len(engine.step())
    return num_outputs / (time.perf_counter() - start)


def read(engine: Engine) -> float:
    prompt = tuple(100 + number % 1000 for number in range(NUM_PROMPT_TOKENS))
    engine.add(SequenceRequest("prompt", prompt, SamplingParams(temperature=0.0, max_tokens=1)))
    start = time.perf_counter()
    while engine.has_unfinished:
        engine.step()
    return NUM_PROMPT_TOKENS / (time.perf_counter() - start)


def perplexity(engine: Engine, encode: Callable[[str], list[int]], text: str) -> float:
    """The engine asks its model for the logits of last tokens only; here they are asked for all."""
    model: Any = engine.runner._model
    token_ids = encode(text)
    total, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, PIECE):
        piece = token_ids[start : start + PIECE + 1]
        num_tokens = len(piece) - 1
        segment = Segment(tuple(range(PIECE // BLOCK_SIZE)), offset=0, start=0, end=num_tokens)
        attention = TorchAttention(PIECE // BLOCK_SIZE, BLOCK_SIZE)
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([piece[:-1]]),
                position_ids=torch.arange(num_tokens)[None],
                use_cache=False,
                attention_batch=attention.batch((segment,)),
            ).logits[0]
        total += float(F.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum"))
        count += len(piece) - 1
    return math.exp(total / count)


def print_medians(name: str, values: list[float]) -> None:
    print_row(name, *(f"{value:.1f}" for value in values), f"{values[-1] / values[0]:.2f}")


def print_row(name: str, *cells: str) -> None:
    print(f"{name:32}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
