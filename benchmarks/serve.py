"""Servers of the OpenAI API under load: ours beside others, by turns, in one run.

    python benchmarks/serve.py --start-ours --start-transformers --start-transformers-batching

A server is started here or named by its base URL. Tokens are counted by the servers' own usage.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # as in server.py; for --in-process

import httpx
import psutil

from benchmarks.report import Report, peer_environment, print_machine

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT = 300.0
REQUEST_TIMEOUT = 900.0
MANY_TOKENS = 2000
"""Of streams that run while something else is measured; they are left then."""
NUM_ORDINARY = 16
"""Gaps that say what is usual."""
OURS = "ours"
IN_PROCESS = "in process"
# Most tokenizers have each of these as one token.
WORDS = (
    "time people way day man thing woman life child world school state family student group"
    " country problem hand part place case week company system program question work government"
    " number night point home water room mother area money story fact month lot right study book"
)
# What some servers refuse, which are then asked again without it.
EXTRAS: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}


def main() -> None:
    options = parse_options()
    print_machine()
    with ExitStack() as stack:
        targets = start_targets(options, stack)
        engine = InProcess(options) if options.in_process else None
        report = Report([*(target.name for target in targets), *([IN_PROCESS] if engine else [])])
        try:
            asyncio.run(measure(options, targets, engine, report))
            for target in targets:
                if target.process is not None:
                    report.add("resident at the end (MB)", target.name, target.resident_mb())
        finally:
            report.print_table()
    if options.json:
        report.write(options.json, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help=f"base URL of the server called {OURS}, with /v1")
    parser.add_argument("--start-ours", action="store_true", help="start server.py instead")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="for our own server")
    parser.add_argument("--ours-flags", default="", help="more flags for server.py: =TEXT")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="another server; its first model, unless URL#MODEL says which",
    )
    parser.add_argument("--start-transformers", action="store_true", help="transformers serve")
    parser.add_argument(
        "--start-transformers-batching",
        action="store_true",
        help="transformers serve --continuous-batching",
    )
    parser.add_argument(
        "--transformers-model",
        type=Path,
        help="folder of the same model for transformers; else what --model was converted to",
    )
    parser.add_argument(
        "--transformers-python", default=sys.executable, help="that has transformers[serving]"
    )
    parser.add_argument("--in-process", action="store_true", help="our engine without HTTP, too")
    parser.add_argument("--key", help="API key, for all of them")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="to generate per stream")
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument(
        "--scenarios", nargs="*", choices=SCENARIOS, default=list(SCENARIOS), help="which to run"
    )
    parser.add_argument("--prefix-words", type=int, default=1000, help="that are sent twice")
    parser.add_argument("--long-words", type=int, default=4000, help="read beside other streams")
    parser.add_argument("--long-streams", type=int, default=4, help="that run meanwhile")
    parser.add_argument("--chunk", type=int, default=256, help="prompt tokens that a step reads")
    parser.add_argument("--json", type=Path, help="write all rounds to that file")
    options = parser.parse_args()
    if not (options.url or options.start_ours):
        parser.error("say --start-ours, or --url URL for a server that runs")
    return options


# Servers


@dataclass(slots=True)
class Target:
    """A server, and what it accepts."""

    name: str
    url: str
    model: str
    key: str | None = None
    process: subprocess.Popen[bytes] | None = None
    extras: dict[str, Any] = field(default_factory=lambda: dict(EXTRAS))

    def resident_mb(self) -> float:
        assert self.process is not None
        process = psutil.Process(self.process.pid)
        family = (process, *process.children(recursive=True))
        return sum(member.memory_info().rss for member in family) / 1e6


def start_targets(options: argparse.Namespace, stack: ExitStack) -> list[Target]:
    targets = []
    if options.start_ours:
        targets.append(stack.enter_context(start_ours(options)))
    else:
        targets.append(find_target(OURS, options.url, options.key))
    for flag, name, flags in (
        ("start_transformers", "transformers", ()),
        ("start_transformers_batching", "transformers batching", ("--continuous-batching",)),
    ):
        if getattr(options, flag):
            targets.append(stack.enter_context(start_transformers(options, name, flags)))
    for peer in options.peer:
        name, _, url = peer.partition("=")
        targets.append(find_target(name, url, options.key))
    return targets


def find_target(name: str, url: str, key: str | None) -> Target:
    """A server that runs already; with its first model, if `url` has none after a #."""
    base, _, model = url.rstrip("/").partition("#")
    if not model:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        models = httpx.get(f"{base}/models", headers=headers).raise_for_status().json()["data"]
        model = models[0]["id"]
    return Target(name, base, model, key)


@contextmanager
def start_ours(options: argparse.Namespace) -> Iterator[Target]:
    port = find_free_port()
    streams = max(*options.streams, options.long_streams + 1)
    flags = ["--api", "--model", options.model, "--max-num-seqs", str(streams)]
    command = [sys.executable, str(ROOT / "server.py"), *flags, "--api-port", str(port)]
    with run_server(
        [*command, *options.ours_flags.split()], f"http://127.0.0.1:{port}/v1/models"
    ) as process:
        target = find_target(OURS, f"http://127.0.0.1:{port}/v1", options.key)
        target.process = process
        print(f"{OURS}: {target.resident_mb():.0f} MB resident once loaded", flush=True)
        yield target


@contextmanager
def start_transformers(
    options: argparse.Namespace, name: str, flags: tuple[str, ...]
) -> Iterator[Target]:
    port = find_free_port()
    with model_without_end(find_transformers_model(options)) as folder:
        command = [options.transformers_python, "-m", "transformers.cli.transformers", "serve"]
        with run_server(
            [*command, str(folder), "--host", "127.0.0.1", "--port", str(port), *flags],
            f"http://127.0.0.1:{port}/health",
        ) as process:
            target = Target(name, f"http://127.0.0.1:{port}/v1", str(folder), process=process)
            print(f"{name}: {target.resident_mb():.0f} MB resident once loaded", flush=True)
            yield target


def find_transformers_model(options: argparse.Namespace) -> Path:
    if options.transformers_model:
        return Path(options.transformers_model).resolve()
    from modules import gguf
    from modules.model_files import find_model
    from modules.settings import load_settings

    settings = load_settings([], {})
    path = find_model(options.model, settings).path
    return path if path.is_dir() else gguf.convert(path, settings.model_dir / ".converted", print)


@contextmanager
def model_without_end(folder: Path) -> Iterator[Path]:
    """The same model without an end-of-sequence token: transformers knows no `ignore_eos`."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / folder.name
        copy.mkdir()
        for path in folder.iterdir():
            if path.name in ("config.json", "generation_config.json"):
                config = json.loads(path.read_text(encoding="utf-8"))
                (copy / path.name).write_text(json.dumps({**config, "eos_token_id": None}))
            elif path.is_file():
                link_or_copy(path, copy / path.name)
        yield copy


def link_or_copy(path: Path, place: Path) -> None:
    try:
        place.symlink_to(path)
    except OSError:  # Windows, unless one may
        shutil.copyfile(path, place)


@contextmanager
def run_server(command: list[str], ready_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process, once `ready_url` answers; it is ended in any case."""
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, env=peer_environment()
        ) as process,
    ):
        try:
            wait_until_ready(process, ready_url)
            yield process
        except ChildProcessError as error:
            output.seek(0)
            tail = output.read()[-2000:].decode(errors="replace")
            raise SystemExit(f"{' '.join(command)}: {error}\n{tail}") from error
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ChildProcessError(f"it ended with {process.returncode}")
        try:
            if httpx.get(url, timeout=5).status_code < 500:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise ChildProcessError("it did not answer in time")


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


# One request


class Call(asyncio.Protocol):
    """One POST, whose answer is kept as it comes and looked into afterwards.

    Nothing is parsed while anything is measured: the client shares the cores with the server.
    """

    def __init__(self, request: bytes) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended = asyncio.get_running_loop().create_future()
        self.start = 0.0
        self._request = request
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.start = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(time.perf_counter())

    def leave(self) -> None:
        assert self._transport is not None
        self._transport.abort()

    def times(self) -> list[float]:
        """When pieces of the stream arrived; not its headers, pings or last words."""
        return [when for when, data in self.pieces if b"data: {" in data]

    def answer(self) -> Answer:
        response = http.client.HTTPResponse(_Bytes(b"".join(data for _, data in self.pieces)))
        response.begin()
        return Answer(response.status, response.read().decode(errors="replace"))


class _Bytes(socket.socket):
    """What http.client takes for a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *args: Any, **options: Any) -> Any:
        return io.BytesIO(self._data)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str

    def usage(self) -> dict[str, int] | None:
        """The last one that an event has."""
        found = None
        for line in self.body.splitlines():
            if line.startswith("data: {") and '"usage"' in line:
                found = json.loads(line[6:]).get("usage") or found
        return found

    def is_complete(self) -> bool:
        return self.status == 200 and 'data: {"error"' not in self.body


async def open_call(target: Target, prompt: str, max_tokens: int) -> Call:
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        **target.extras,
    }
    return await post(target, "/completions", json.dumps(body).encode())


async def post(target: Target, path: str, body: bytes) -> Call:
    """Send JSON; the answer comes while nobody waits for it."""
    parts = urlsplit(target.url)
    headers = [
        f"POST {parts.path}{path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *([f"Authorization: Bearer {target.key}"] if target.key else []),
    ]
    request = "\r\n".join([*headers, "", ""]).encode() + body
    is_tls = parts.scheme == "https"
    assert parts.hostname is not None
    _, call = await asyncio.get_running_loop().create_connection(
        lambda: Call(request),
        parts.hostname,
        parts.port or (443 if is_tls else 80),
        ssl=is_tls or None,
    )
    return call


async def finish(target: Target, calls: list[Call]) -> list[Answer]:
    async with asyncio.timeout(REQUEST_TIMEOUT):
        await asyncio.gather(*(call.ended for call in calls))
    answers = [call.answer() for call in calls]
    for answer in answers:
        if not answer.is_complete():
            raise SystemExit(f"{target.name} answered {answer.status}: {answer.body[-500:]}")
    return answers


async def settle(target: Target) -> None:
    """Find out what a server accepts, and let it load and warm up what it wants to."""
    for leave_out in (None, *EXTRAS):
        if leave_out is not None:
            del target.extras[leave_out]
        call = await open_call(target, random_prompt(8), 4)
        await call.ended
        if call.answer().status not in (400, 422):
            break
    await finish(target, [call])


def random_prompt(num_words: int) -> str:
    """With a head that no cache can know."""
    words = [f"{random.getrandbits(32):x}", *random.choices(WORDS.split(), k=num_words)]
    return " ".join(words)


async def count_tokens(target: Target, call: Call, prompt: str, max_tokens: int) -> int:
    """By the usage in the stream; of a server that sends none there, by asking once more."""
    usage = call.answer().usage()
    if usage is None:
        body = {"model": target.model, "prompt": prompt, "max_tokens": max_tokens}
        headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
        extras = {name: target.extras[name] for name in ("ignore_eos",) if name in target.extras}
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT, headers=headers) as client:
            reply = await client.post(
                f"{target.url}/completions", json=body | extras | {"temperature": 0}
            )
        usage = reply.raise_for_status().json()["usage"]
    return int(usage["completion_tokens"])


# Scenarios


async def measure(
    options: argparse.Namespace, targets: list[Target], engine: InProcess | None, report: Report
) -> None:
    for target in targets:
        await settle(target)
    for _ in range(options.rounds):
        for scenario in options.scenarios:
            await SCENARIOS[scenario](options, targets, engine, report)


async def run_streams(
    options: argparse.Namespace, targets: list[Target], engine: InProcess | None, report: Report
) -> None:
    """All streams start at once; the rate counts from there until the last one has ended."""
    for count in options.streams:
        streams = f"{count} {'stream' if count == 1 else 'streams'}"
        for target in targets:
            prompts = [random_prompt(options.prompt_words) for _ in range(count)]
            for name, value in (await load(target, prompts, options.tokens)).items():
                report.add(f"{streams}: {name}", target.name, value)
        if engine is not None:
            prompts = [random_prompt(options.prompt_words) for _ in range(count)]
            rate = await engine.load(prompts, options.tokens)
            report.add(f"{streams}: tok/s", IN_PROCESS, rate)


async def load(target: Target, prompts: list[str], max_tokens: int) -> dict[str, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    calls = await asyncio.gather(*(open_call(target, prompt, max_tokens) for prompt in prompts))
    await asyncio.gather(*(call.ended for call in calls))
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    await finish(target, calls)
    counts = [
        await count_tokens(target, call, prompt, max_tokens)
        for call, prompt in zip(calls, prompts, strict=True)
    ]
    first = sorted(call.times()[0] - call.start for call in calls)
    all_gaps = [gap for call in calls for gap in gaps(call.times())] or [0.0]
    return {
        "tok/s": sum(counts) / elapsed,
        "first token, p50 (ms)": 1000 * statistics.median(first),
        "first token, p95 (ms)": 1000 * quantile(first, 0.95),
        "gap, p50 (ms)": 1000 * statistics.median(all_gaps),
        "gap, p95 (ms)": 1000 * quantile(sorted(all_gaps), 0.95),
        "this client, of a core (%)": 100 * cpu / elapsed,
    }


async def run_prefix(
    options: argparse.Namespace, targets: list[Target], engine: InProcess | None, report: Report
) -> None:
    """The same prompt twice: how long until the first token."""
    for target in targets:
        prompt = random_prompt(options.prefix_words)
        cold, again = [await time_to_first(target, prompt) for _ in range(2)]
        words = f"{options.prefix_words} words"
        report.add(f"first token, {words} unknown (ms)", target.name, 1000 * cold)
        report.add(f"first token, {words} read before (ms)", target.name, 1000 * again)
        report.add("read before / unknown (%)", target.name, 100 * again / cold)


async def time_to_first(target: Target, prompt: str) -> float:
    call = await open_call(target, prompt, 1)
    await finish(target, [call])
    return call.times()[0] - call.start


async def run_long(
    options: argparse.Namespace, targets: list[Target], engine: InProcess | None, report: Report
) -> None:
    """Streams run while a long prompt is read: their longest gap, beside what it may be."""
    for target in targets:
        values = await stall(target, options)
        if values is None:
            print(f"{target.name} runs no streams side by side: no gaps to compare", flush=True)
            continue
        for name, value in values.items():
            report.add(f"reading {options.long_words} words: {name}", target.name, value)


async def stall(target: Target, options: argparse.Namespace) -> dict[str, float] | None:
    """None if a stream ends before all of them run."""
    chunk = await time_of_chunk(target, options)
    others = [
        await open_call(target, random_prompt(options.prompt_words), MANY_TOKENS)
        for _ in range(options.long_streams)
    ]
    if not await until(others, lambda call: len(call.pieces) > NUM_ORDINARY):
        return None
    ordinary = statistics.median(
        gap for call in others for gap in gaps(call.times()[-NUM_ORDINARY:])
    )
    reader = await open_call(target, random_prompt(options.long_words), 1)
    await finish(target, [reader])
    read = time.perf_counter()
    if not await until(others, lambda call: call.pieces[-1][0] > read):
        return None
    for call in others:
        call.leave()
    longest = max(
        gap for call in others for gap in gaps([t for t in call.times() if t >= reader.start])
    )
    return {
        "others' ordinary gap (ms)": 1000 * ordinary,
        "time of a chunk, alone (ms)": 1000 * chunk,
        "others' longest gap (ms)": 1000 * longest,
        "longest / (3 gaps + chunk)": longest / (3 * ordinary + chunk),
    }


async def time_of_chunk(target: Target, options: argparse.Namespace) -> float:
    """Seconds, on average over a prompt that is read with nothing else running."""
    call = await open_call(target, random_prompt(options.long_words), 1)
    (answer,) = await finish(target, [call])
    num_tokens = (answer.usage() or {}).get("prompt_tokens", options.long_words)
    return (call.times()[0] - call.start) * min(1.0, options.chunk / num_tokens)


async def until(calls: list[Call], condition: Callable[[Call], bool]) -> bool:
    """Whether the condition holds for all calls before one of them ends; else all are left."""
    async with asyncio.timeout(REQUEST_TIMEOUT):
        while not all(map(condition, calls)):
            if any(call.ended.done() for call in calls):
                for call in calls:
                    call.leave()
                return False
            await asyncio.sleep(0.005)
    return True


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def quantile(values: list[float], share: float) -> float:
    """Of sorted values, the nearest rank."""
    return values[min(len(values) - 1, round(share * (len(values) - 1)))]


SCENARIOS = {"streams": run_streams, "prefix": run_prefix, "long": run_long}


# Without HTTP


class InProcess:
    """Our engine in this process, asked for what the servers are asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        from modules.model_loading import load_model
        from modules.settings import load_settings

        flags = ["--max-num-seqs", str(max(options.streams)), *options.ours_flags.split()]
        self._model = load_model(options.model, load_settings(flags, {}))

    async def load(self, prompts: list[str], max_tokens: int) -> float:
        """Tokens per second, from the first prompt until the last token."""
        from modules.engine.sampling_params import SamplingParams
        from modules.engine.sequence import SequenceRequest

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        requests = []
        for number, prompt in enumerate(prompts):
            token_ids = self._model.encode(prompt, add_special_tokens=True)
            requests.append(SequenceRequest(f"{number}", token_ids, params))
        count = 0
        start = time.perf_counter()
        async for outputs in self._model.engine.generate(requests):
            count += len(outputs)
        return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
