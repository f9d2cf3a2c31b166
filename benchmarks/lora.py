"""What adapters cost a batch: half of the rows with one, beside the same rows without.

    python benchmarks/lora.py --dtype int8 --json lora.json

The adapter is random, of rank 16 on all linear layers. Rounds take turns; the table shows medians.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # as in server.py

import torch

from benchmarks.engine import DECODE_PROMPT, take_engine
from benchmarks.report import Report, print_machine
from benchmarks.stopwatch import random_prompts, time_all, time_decoding
from modules.engine.engine import Engine
from modules.engine.low_rank import Adapter, LowRank
from modules.model_loading import load_model
from modules.settings import load_settings

SHARES = {"mixed": 0.5, "base": 0.0, "adapted": 1.0}
"""Of the rows that have the adapter, by column."""


def main() -> None:
    options = parse_options()
    print_machine()
    flags = ["--dtype", options.dtype, "--max-num-seqs", str(max(*options.streams, 2))]
    model = load_model(options.model, load_settings(flags, {}))
    engine = take_engine(model)
    adapter = build_adapter(engine, options.rank)
    report = Report([*SHARES])
    for _ in range(options.rounds):
        for streams in options.streams:
            for column, share in SHARES.items():
                adapters = [(adapter,)] * round(streams * share)
                prompts = random_prompts(streams, DECODE_PROMPT, model.vocab_size)
                rate = time_decoding(engine, prompts, options.tokens, adapters=adapters)
                report.add(f"decode, {streams} streams (tok/s)", column, rate)
        for column, share in SHARES.items():
            prompts = random_prompts(2, options.prompt_tokens, model.vocab_size)
            seconds = time_all(engine, prompts, 1, [(adapter,)] * round(2 * share))
            name = f"read 2 prompts of {options.prompt_tokens} (tok/s)"
            report.add(name, column, 2 * options.prompt_tokens / seconds)
    report.print_table()
    if options.json:
        report.write(options.json, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", nargs="+", type=int, default=[2, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="to generate per stream")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="of the prompts to read")
    parser.add_argument("--json", type=Path, help="write all rounds to that file")
    return parser.parse_args()


def build_adapter(engine: Engine, rank: int) -> Adapter:
    layers = engine.runner.layers
    updates = {
        path: LowRank(torch.randn(rank, num_inputs), 1e-4 * torch.randn(num_outputs, rank))
        for path, (num_inputs, num_outputs) in layers.shapes.items()
    }
    return layers.prepare("random", updates)


if __name__ == "__main__":
    main()
