"""Embeddings through HTTP beside sentence-transformers' own `encode`, and what streams lose by it.

    python benchmarks/embeddings.py --json embeddings.json

The same texts are embedded by several clients of a server, and by `encode` in this process, by
turns. Then the server writes text with and without that load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import Report, print_machine
from benchmarks.serve import (
    OURS,
    REQUEST_TIMEOUT,
    ROOT,
    WORDS,
    Target,
    find_free_port,
    find_target,
    finish,
    gaps,
    open_call,
    post,
    quantile,
    random_prompt,
    run_server,
    settle,
)

ENCODE = "encode"


def main() -> None:
    options = parse_options()
    print_machine()
    report = Report([OURS, ENCODE])
    with ExitStack() as stack:
        target = start_server(options, stack)
        library = load_library(options)
        try:
            asyncio.run(measure(options, target, library, report))
            if target.process is not None:
                report.add("resident at the end (MB)", OURS, target.resident_mb())
        finally:
            report.print_table()
    if options.json:
        report.write(options.json, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="base URL of our server that runs, with /v1; else one starts")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="that writes text")
    parser.add_argument("--embedding-model", default="all-MiniLM-L6-v2")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--texts", type=int, default=512, help="of all clients together")
    parser.add_argument("--words", nargs=2, type=int, default=[3, 120], help="fewest and most")
    parser.add_argument("--per-request", nargs="+", type=int, default=[1, 32], help="texts")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4], help="of text; 0: none")
    parser.add_argument("--tokens", type=int, default=128, help="to generate per stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all rounds to that file")
    return parser.parse_args()


def start_server(options: argparse.Namespace, stack: ExitStack) -> Target:
    if options.url:
        return find_target(OURS, options.url, options.key)
    os.environ["OPENEDAI_EMBEDDING_MODEL"] = options.embedding_model
    port = find_free_port()
    url = f"http://127.0.0.1:{port}/v1"
    flags = ["--api", "--model", options.model, "--api-port", str(port)]
    command = [sys.executable, str(ROOT / "server.py"), *flags]
    process = stack.enter_context(run_server(command, f"{url}/models"))
    target = find_target(OURS, url, None)
    target.process = process
    return target


def load_library(options: argparse.Namespace) -> Any:
    """sentence-transformers as it comes: torch chooses its threads."""
    from sentence_transformers import SentenceTransformer

    from modules.model_files import find_model
    from modules.model_kinds import ModelKind
    from modules.settings import load_settings

    found = find_model(options.embedding_model, load_settings([], {}), ModelKind.EMBEDDING)
    return SentenceTransformer(str(found.path), local_files_only=True)


async def measure(
    options: argparse.Namespace, target: Target, library: Any, report: Report
) -> None:
    await settle(target)
    await embed(target, [["warm up"] * 4] * options.clients, options.clients)
    library.encode(["warm up"] * 4)
    for _ in range(options.rounds):
        for size in options.per_request:
            await compare(options, target, library, report, size)
        for count in filter(None, options.streams):
            await write_beside(options, target, report, count)


async def compare(
    options: argparse.Namespace, target: Target, library: Any, report: Report, size: int
) -> None:
    """The rate counts from the first request until the last answer has arrived."""
    texts = random_texts(options)
    name = f"{options.clients} clients, {size} per request"
    cpu_start = time.process_time()
    seconds, latencies = await embed(target, list(split(texts, size)), options.clients)
    cpu = time.process_time() - cpu_start
    report.add(f"{name}: texts/s", OURS, len(texts) / seconds)
    start = time.perf_counter()
    library.encode(texts, normalize_embeddings=True)
    report.add(f"{name}: texts/s", ENCODE, len(texts) / (time.perf_counter() - start))
    report.add(f"{name}: answer, p50 (ms)", OURS, 1000 * statistics.median(latencies))
    report.add(f"{name}: answer, p95 (ms)", OURS, 1000 * quantile(sorted(latencies), 0.95))
    report.add(f"{name}: this client, of a core (%)", OURS, 100 * cpu / seconds)


def random_texts(options: argparse.Namespace) -> list[str]:
    fewest, most = options.words
    words = WORDS.split()
    return [
        " ".join(random.choices(words, k=random.randint(fewest, most)))
        for _ in range(options.texts)
    ]


def split(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


async def embed(
    target: Target, requests: Sequence[Sequence[str]], num_clients: int
) -> tuple[float, list[float]]:
    """Seconds for all, and for each; every client asks again once it has its answer."""
    bodies = iter([write_body(texts) for texts in requests])
    calls = []

    async def ask() -> None:
        for body in bodies:
            call = await post(target, "/embeddings", body)
            calls.append(call)
            await call.ended

    start = time.perf_counter()
    async with asyncio.timeout(REQUEST_TIMEOUT):
        await asyncio.gather(*(ask() for _ in range(num_clients)))
    seconds = time.perf_counter() - start
    await finish(target, calls)
    return seconds, [call.ended.result() - call.start for call in calls]


def write_body(texts: Sequence[str]) -> bytes:
    """As OpenAI's client asks."""
    return json.dumps({"input": list(texts), "encoding_format": "base64"}).encode()


# What streams of text lose


async def write_beside(
    options: argparse.Namespace, target: Target, report: Report, num_streams: int
) -> None:
    """Streams alone, then the same while all clients embed without a pause."""
    name = f"{num_streams} {'stream' if num_streams == 1 else 'streams'}"
    alone = await write(options, target, num_streams)
    embedding = asyncio.create_task(embed_on_and_on(options, target))
    try:
        beside = await write(options, target, num_streams)
    finally:
        embedding.cancel()
        with suppress(asyncio.CancelledError):
            await embedding
    for measure, value in alone.items():
        report.add(f"{name} alone: {measure}", OURS, value)
        report.add(f"{name} beside embeddings: {measure}", OURS, beside[measure])
    report.add(f"{name}: pace that is kept (%)", OURS, 100 * beside["tok/s"] / alone["tok/s"])


async def embed_on_and_on(options: argparse.Namespace, target: Target) -> None:
    while True:
        requests = list(split(random_texts(options), max(options.per_request)))
        await embed(target, requests, options.clients)


async def write(options: argparse.Namespace, target: Target, num_streams: int) -> dict[str, float]:
    prompts = [random_prompt(16) for _ in range(num_streams)]
    start = time.perf_counter()
    calls = await asyncio.gather(*(open_call(target, each, options.tokens) for each in prompts))
    answers = await finish(target, calls)
    seconds = max(call.ended.result() for call in calls) - start
    num_tokens = sum((answer.usage() or {})["completion_tokens"] for answer in answers)
    all_gaps = sorted(gap for call in calls for gap in gaps(call.times())) or [0.0]
    return {
        "tok/s": num_tokens / seconds,
        "gap, p50 (ms)": 1000 * statistics.median(all_gaps),
        "gap, p95 (ms)": 1000 * quantile(all_gaps, 0.95),
        "longest gap (ms)": 1000 * all_gaps[-1],
    }


if __name__ == "__main__":
    main()
