"""What choosing tokens takes of a decode step, for single parameters and the usual ones together.

    python benchmarks/sampler.py --streams 16 --json sampler.json

The engine decodes, and a stopwatch is held beside its sampler: real logits, real histories. Each
chain of steps takes its turn in every round; the table shows medians.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # as in server.py

from benchmarks.engine import take_engine
from benchmarks.report import Report, print_machine
from benchmarks.stopwatch import Prompt, time_decoding
from modules.engine import model_runner
from modules.engine.engine import Engine
from modules.engine.sampling_params import SamplingParams
from modules.loaded_model import LoadedModel
from modules.model_loading import load_model
from modules.settings import PROJECT_ROOT, load_settings

PENALTIES: Mapping[str, Any] = {
    "repetition_penalty": 1.15,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.2,
}
CHAINS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "penalties": {"temperature": 0.0, **PENALTIES},
    "common chain": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05, **PENALTIES},
    "typical_p": {"typical_p": 0.9},
    "tfs": {"tfs": 0.95},
    "top_a": {"top_a": 0.2},
    "eta_cutoff": {"eta_cutoff": 3e-4},
    "top_n_sigma": {"top_n_sigma": 1.5},
    "dynamic_temperature": {"dynamic_temperature": (0.5, 1.5, 1.0)},
    "smoothing_factor": {"smoothing_factor": 0.3},
    "mirostat 1": {"mirostat_mode": 1},
    "mirostat 2": {"mirostat_mode": 2},
    "adaptive_target": {"adaptive_target": 0.4},
    "xtc": {"xtc_probability": 0.5},
    "dry": {"temperature": 0.0, "dry_multiplier": 0.8},
    "no_repeat_ngram_size": {"temperature": 0.0, "no_repeat_ngram_size": 3},
    "logprobs": {"temperature": 0.0, "num_logprobs": 5},
}


def main() -> None:
    options = parse_options()
    print_machine()
    flags = ["--dtype", options.dtype, "--max-num-seqs", str(max(options.streams, 2))]
    model = load_model(options.model, load_settings(flags, {}))
    engine = take_engine(model)
    prompts = take_prompts(model, options.streams, options.prompt_tokens)
    report = Report(["sampler"])
    for _ in range(options.rounds):
        for name, wishes in CHAINS.items():
            seconds, share = measure(engine, prompts, options.tokens, SamplingParams(**wishes))
            report.add(f"{name} (ms per step)", "sampler", 1000 * seconds)
            report.add(f"{name} (% of the step)", "sampler", 100 * share)
    report.print_table()
    if options.json:
        report.write(options.json, options)


def take_prompts(model: LoadedModel, count: int, num_tokens: int) -> list[Prompt]:
    """Pieces of a real text: after others a model has no idea how to go on."""
    text = (PROJECT_ROOT / "LICENSE").read_text(encoding="utf-8")
    token_ids = model.encode(text, add_special_tokens=False)
    step = max((len(token_ids) - num_tokens) // count, 1)
    return [token_ids[start : start + num_tokens] for start in range(0, count * step, step)]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="to generate per stream")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="of every stream")
    parser.add_argument("--json", type=Path, help="write all rounds to that file")
    return parser.parse_args()


def measure(
    engine: Engine, prompts: list[Prompt], num_tokens: int, params: SamplingParams
) -> tuple[float, float]:
    """Seconds that the sampler takes of a step of all streams, and its share of that step."""
    sample, times = model_runner.sample, []

    def sample_beside_a_stopwatch(logits: Any, seqs: list[Any]) -> Any:
        start = time.perf_counter()
        tokens = sample(logits, seqs)
        if len(seqs) == len(prompts):  # else some are still reading, or have ended
            times.append(time.perf_counter() - start)
        return tokens

    model_runner.sample = sample_beside_a_stopwatch  # type: ignore[assignment]
    try:
        rate = time_decoding(engine, prompts, num_tokens, params)
    finally:
        model_runner.sample = sample  # type: ignore[assignment]
    seconds = sum(times) / len(times)
    return seconds, seconds / (len(prompts) / rate)


if __name__ == "__main__":
    main()
