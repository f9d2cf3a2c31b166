"""The engine on a CUDA card, with random weights in the shape of Llama 3 8B.

    python benchmarks/cuda.py --json cuda.json

Beside it stand transformers' own generate_batch, over the same weights and by turns, and a
roofline: what the card could do at the bandwidth of a copy and the speed of a matrix product, both
measured here. Needs no model and no network. `--device cpu` with a tiny shape tries the script out.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
)

from benchmarks.report import Report, print_machine
from benchmarks.stopwatch import Prompt, random_prompts, time_all, time_decoding, time_reading
from modules.engine.engine import Engine, EngineConfig

OURS, TRANSFORMERS, ROOFLINE = "ours", "generate_batch", "roofline"


def main() -> None:
    options = parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA card here: this measures nothing else.")
    print_machine()
    model = build_model(options)
    card = Roofline.measure(model, options)
    print(
        f"copy: {card.bandwidth / 1e9:.0f} GB/s, matrix product: {card.flops / 1e12:.1f} TFLOP/s, "
        f"weights read per step: {card.weight_bytes / 1e9:.2f} GB",
        flush=True,
    )
    theirs = None if options.no_peer else Theirs(model, options)
    engine = build_engine(model, options)
    report = Report([OURS, *([TRANSFORMERS] if theirs else []), ROOFLINE])
    warm_up(engine, theirs, options)
    for _ in range(options.rounds):
        measure_round(engine, theirs, card, options, report)
    report.print_table()
    if options.json:
        hardware = {"copy_bytes_per_s": card.bandwidth, "matmul_flops_per_s": card.flops}
        report.write(options.json, options, roofline=hardware)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256, help="to generate per stream")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="per stream")
    parser.add_argument("--long-prompt", type=int, default=4000, help="tokens of one to read")
    parser.add_argument("--step-tokens", type=int, default=2048, help="that a step reads at most")
    parser.add_argument("--no-peer", action="store_true", help="without generate_batch")
    shape = parser.add_argument_group("shape of the model")
    shape.add_argument("--hidden", type=int, default=4096)
    shape.add_argument("--intermediate", type=int, default=14_336)
    shape.add_argument("--layers", type=int, default=32)
    shape.add_argument("--heads", type=int, default=32)
    shape.add_argument("--kv-heads", type=int, default=8)
    shape.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--copy-mib", type=int, default=2048, help="for the bandwidth")
    parser.add_argument("--matmul-size", type=int, default=8192, help="for the matrix product")
    parser.add_argument("--json", type=Path, help="write all rounds to that file")
    return parser.parse_args()


def build_model(options: argparse.Namespace) -> PreTrainedModel:
    """Made on the device: the weights of 8B in bfloat16 are 16 GB."""
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocab,
        max_position_embeddings=max_model_len(options),
        tie_word_embeddings=False,
    )
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    loaded: PreTrainedModel = model
    return loaded


def build_engine(model: PreTrainedModel, options: argparse.Namespace) -> Engine:
    streams = max(options.streams)
    per_stream = options.prompt_tokens + options.tokens
    config = EngineConfig(
        max_model_len=max_model_len(options),
        max_num_seqs=streams,
        max_num_batched_tokens=options.step_tokens,
        # With room to spare, because caches count in blocks.
        num_cache_tokens=max_model_len(options) + streams * (per_stream + 256),
    )
    return Engine(model, config)


def max_model_len(options: argparse.Namespace) -> int:
    return max(options.long_prompt + 1, options.prompt_tokens + options.tokens)


class Theirs:
    """transformers' continuous batching, over the same weights as the engine."""

    def __init__(self, model: PreTrainedModel, options: argparse.Namespace) -> None:
        shared = {id(parameter): parameter for parameter in model.parameters()}
        self._model = copy.deepcopy(model, shared)
        # Half of what is free, because the engine needs some too; a CPU would fill it with zeros.
        share = 0.5 if options.device == "cuda" else 0.01
        self._config = ContinuousBatchingConfig(max_memory_percent=share)
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._options = options

    def time_all(self, prompts: list[Prompt]) -> float:
        """Seconds for all prompts at once; what stays between runs is not made anew for each."""
        num_tokens = self._options.tokens
        config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1)
        start = time.perf_counter()
        outputs = self._model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=config,
            continuous_batching_config=self._config,
            max_new_tokens=num_tokens,
            persistent_manager=True,
        )
        elapsed = time.perf_counter() - start
        lengths = [len(output.generated_tokens) for output in outputs.values()]
        if lengths != [num_tokens] * len(prompts):
            raise SystemExit(f"generate_batch made {sum(lengths)} tokens, not all of them.")
        return elapsed


class Roofline:
    """What no program could exceed on this card."""

    def __init__(self, model: PreTrainedModel, bandwidth: float, flops: float) -> None:
        """`bandwidth` in bytes per second, `flops` in operations per second."""
        self.bandwidth, self.flops = bandwidth, flops
        embedding = model.get_input_embeddings().weight  # of which a step reads a few rows
        self._num_weights = sum(p.numel() for p in model.parameters()) - embedding.numel()
        self.weight_bytes = self._num_weights * embedding.element_size()
        config = model.config
        head_dim = config.hidden_size // config.num_attention_heads
        kv_size = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        self._kv_bytes = kv_size * embedding.element_size()

    @staticmethod
    def measure(model: PreTrainedModel, options: argparse.Namespace) -> Roofline:
        return Roofline(model, measure_copy(options), measure_matmul(options))

    def decode(self, streams: int, num_cached: float) -> float:
        """Tokens per second of streams that have `num_cached` tokens each, on average."""
        num_bytes = self.weight_bytes + streams * num_cached * self._kv_bytes
        return streams / max(num_bytes / self.bandwidth, self._compute(streams))

    def read(self, num_tokens: int) -> float:
        """Tokens per second of a prompt; its attention is left out."""
        return num_tokens / max(self.weight_bytes / self.bandwidth, self._compute(num_tokens))

    def total(self, streams: int, prompt_tokens: int, tokens: int) -> float:
        """Tokens per second that are generated, where prompts have to be read as well."""
        reading = streams * prompt_tokens / self.read(streams * prompt_tokens)
        decoding = streams * tokens / self.decode(streams, prompt_tokens + tokens / 2)
        return streams * tokens / (reading + decoding)

    def _compute(self, num_tokens: int) -> float:
        return 2 * self._num_weights * num_tokens / self.flops


def measure_copy(options: argparse.Namespace) -> float:
    """Bytes read and written per second."""
    source = torch.ones(options.copy_mib << 20, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), options.device)


def measure_matmul(options: argparse.Namespace) -> float:
    """Operations per second of a product of two square matrices in bfloat16."""
    size = options.matmul_size
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16, device=options.device)
    return 2 * size**3 / seconds(lambda: left @ right, options.device)


def seconds(run: Callable[[], object], device: str, rounds: int = 10, repeats: int = 5) -> float:
    """The median of rounds, each of several runs: a launch must not count."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times[1:])  # the first one warms up


def warm_up(engine: Engine, theirs: Theirs | None, options: argparse.Namespace) -> None:
    """Everything once: graphs are captured, kernels chosen."""
    time_reading(engine, random_prompts(1, options.long_prompt, options.vocab)[0])
    for streams in sorted(options.streams, reverse=True):  # generate_batch stays as it began
        prompts = random_prompts(streams, options.prompt_tokens, options.vocab)
        time_all(engine, prompts, options.tokens)
        if theirs is not None:
            theirs.time_all(prompts)


def measure_round(
    engine: Engine,
    theirs: Theirs | None,
    card: Roofline,
    options: argparse.Namespace,
    report: Report,
) -> None:
    read_tokens, tokens = options.prompt_tokens, options.tokens
    for streams in options.streams:
        name = f"decode, {streams} {'stream' if streams == 1 else 'streams'} (tok/s)"
        prompts = random_prompts(streams, read_tokens, options.vocab)
        report.add(name, OURS, time_decoding(engine, prompts, tokens))
        report.add(name, ROOFLINE, card.decode(streams, read_tokens + tokens / 2))
    for streams in options.streams:
        name = f"prompts and replies, {streams} {'stream' if streams == 1 else 'streams'} (tok/s)"
        prompts = random_prompts(streams, read_tokens, options.vocab)
        report.add(name, OURS, streams * tokens / time_all(engine, prompts, tokens))
        if theirs is not None:
            prompts = random_prompts(streams, read_tokens, options.vocab)
            report.add(name, TRANSFORMERS, streams * tokens / theirs.time_all(prompts))
        report.add(name, ROOFLINE, card.total(streams, read_tokens, tokens))
    name = f"read {options.long_prompt} tokens (tok/s)"
    (prompt,) = random_prompts(1, options.long_prompt, options.vocab)
    report.add(name, OURS, options.long_prompt / time_reading(engine, prompt))
    report.add(name, ROOFLINE, card.read(options.long_prompt))


if __name__ == "__main__":
    main()
