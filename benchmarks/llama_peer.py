"""llama.cpp at the same measures as `engine.py`, in a process of its own, told what to do by lines.

Run by an interpreter that has llama-cpp-python and perhaps nothing else: it imports nothing of
this project. In: a JSON object per line, {"measure": "decode" | "read", ...}. Out: a number.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

BATCH = 512
"""Tokens that one call reads at most, as llama.cpp's own programs do by default."""
Rows = list[tuple[int, int, int, bool]]
"""Token, position, sequence, and whether its logits are wanted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("gguf")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    # What llama.cpp prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = Peer(options.gguf, options.threads)
    print(json.dumps(f"llama-cpp-python {llama_cpp.__version__}"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        measure = getattr(peer, request.pop("measure"))
        print(json.dumps(measure(**request)), file=answers, flush=True)


class Peer:
    def __init__(self, path: str, threads: int) -> None:
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._threads = threads
        self._model: Any = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def decode(self, streams: int, prompt_tokens: int, tokens: int) -> float:
        """Tokens per second of `streams` sequences that have read their prompts."""
        with self._context(streams, streams * (prompt_tokens + tokens)) as context:
            last = []
            for number in range(streams):  # one by one, so that a batch never is too large
                self._run(context, _rows(self._prompt(prompt_tokens), number))
                last += self._choose(context, 1)
            start = time.perf_counter()
            for step in range(tokens):
                position = prompt_tokens + step
                rows = [(token, position, number, True) for number, token in enumerate(last)]
                self._run(context, rows)
                last = self._choose(context, streams)
            return streams * tokens / (time.perf_counter() - start)

    def read(self, prompt_tokens: int) -> float:
        """Tokens per second of one prompt, until its first token is chosen."""
        with self._context(1, prompt_tokens + 1) as context:
            prompt = self._prompt(prompt_tokens)
            start = time.perf_counter()
            self._run(context, _rows(prompt, 0))
            self._choose(context, 1)
            return prompt_tokens / (time.perf_counter() - start)

    def _prompt(self, num_tokens: int) -> list[int]:
        return [random.randrange(100, self._vocab_size) for _ in range(num_tokens)]

    @contextmanager
    def _context(self, streams: int, num_tokens: int) -> Iterator[Any]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-num_tokens // (256 * streams)) * 256 * streams
        params.n_batch = BATCH
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = self._threads
        context: Any = llama_cpp.llama_init_from_model(self._model, params)
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)

    def _run(self, context: Any, rows: Rows) -> None:
        for start in range(0, len(rows), BATCH):
            piece = rows[start : start + BATCH]
            batch = llama_cpp.llama_batch_init(len(piece), 0, 1)
            batch.n_tokens = len(piece)
            for index, (token, position, sequence, is_wanted) in enumerate(piece):
                batch.token[index] = token
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = is_wanted
            code = llama_cpp.llama_decode(context, batch)
            llama_cpp.llama_batch_free(batch)
            if code:
                raise SystemExit(f"llama_decode: {code}")

    def _choose(self, context: Any, count: int) -> list[int]:
        """Greedy, by numpy: llama.cpp's own sampler would sort candidates and take longer."""
        logits = llama_cpp.llama_get_logits(context)
        table = np.ctypeslib.as_array(logits, (count, self._vocab_size))
        chosen: list[int] = table.argmax(-1).tolist()
        return chosen


def _rows(prompt: list[int], sequence: int) -> Rows:
    end = len(prompt) - 1
    return [(token, position, sequence, position == end) for position, token in enumerate(prompt)]


if __name__ == "__main__":
    main()
