"""What two loaded models cost each other: each alone, then both generating at the same time.

    python benchmarks/two_models.py --models SmolLM2-135M-Instruct SmolLM2-135M-Instruct

The sum of what is left to each of what it does alone says what sharing costs: 100 % is nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from contextlib import aclosing
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import Report, print_machine
from benchmarks.stopwatch import random_prompts
from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest
from modules.loaded_model import LoadedModel
from modules.model_files import DEFAULT_MODEL
from modules.model_loading import Shared, load_model
from modules.settings import load_settings

TOGETHER, ALONE = "together", "alone"


def main() -> None:
    options = parse_options()
    print_machine()
    settings = load_settings(["--cpu", "--dtype", options.dtype], {})
    shared = Shared(num_to_come=2)
    models = [load_model(name, settings, shared) for name in options.models]
    report = Report([TOGETHER, ALONE])
    for round_number in range(options.rounds + 1):
        alone = [asyncio.run(measure([model], options))[0] for model in models]
        together = asyncio.run(measure(models, options))
        if round_number:  # the first takes memory for keys and values
            add_round(report, alone, together)
    report.print_table()
    if options.json:
        report.write(options.json, options)
    for model in models:
        model.close()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs=2, default=[DEFAULT_MODEL] * 2, help="may be the same")
    parser.add_argument("--dtype", default="auto", help="as the server's")
    parser.add_argument("--streams", type=int, default=1, help="of each model")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all rounds")
    return parser.parse_args()


def add_round(report: Report, alone: list[float], together: list[float]) -> None:
    shares = [100 * both / one for both, one in zip(together, alone, strict=True)]
    for number, name in enumerate(("first", "second")):
        report.add(f"{name} model (tok/s)", TOGETHER, together[number])
        report.add(f"{name} model (tok/s)", ALONE, alone[number])
    report.add("sum of the shares (%)", TOGETHER, sum(shares))
    report.add("sum of the shares (%)", ALONE, 100)


async def measure(models: list[LoadedModel], options: argparse.Namespace) -> list[float]:
    """Tokens per second of each, from when all have begun until the first has ended."""
    arrivals: list[list[float]] = [[] for _ in models]

    async def generate(model: LoadedModel, times: list[float]) -> None:
        async with aclosing(model.engine.generate(build_requests(model, options))) as steps:
            async for outputs in steps:
                times += [time.perf_counter()] * len(outputs)

    async with asyncio.TaskGroup() as group:
        for model, times in zip(models, arrivals, strict=True):
            group.create_task(generate(model, times))
    start = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    return [sum(start < at <= end for at in times) / (end - start) for times in arrivals]


def build_requests(model: LoadedModel, options: argparse.Namespace) -> list[SequenceRequest]:
    """With prompts that no cache can know."""
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True)
    prompts = random_prompts(options.streams, 16, model.vocab_size)
    return [SequenceRequest(f"{random.getrandbits(64)}", prompt, params) for prompt in prompts]


if __name__ == "__main__":
    main()
