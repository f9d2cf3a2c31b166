"""The engine with the real model: greedy as transformers, and int8 the same in any company."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from modules import gguf
from modules.engine.engine import Engine, EngineConfig
from modules.engine.fused_layers import quantize_model
from modules.model_files import DEFAULT_MODEL, find_model
from modules.settings import Settings
from tests.engine.conftest import request, run, token_ids
from tests.engine.test_engine import generate
from tests.engine.test_prompt_scores import assert_scored

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Count from 170 to 180.",
    "Write a haiku about rain, then explain it in one sentence.",
    "Why?",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = find_model(DEFAULT_MODEL, Settings()).path
    return gguf.convert(path, tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def serve(model: PreTrainedModel, prompts: list[list[int]], **params: object) -> list[list[int]]:
    """All prompts in one engine, each arriving while the ones before it are running."""
    engine = Engine(model, EngineConfig(max_model_len=512, num_cache_tokens=4096))
    outputs: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        engine.add(request(str(number), prompt, max_tokens=16, seed=number, **params))
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output.token_id)
    for name, rest in run(engine).items():
        outputs.setdefault(name, []).extend(token_ids(rest))
    return [outputs[str(number)] for number in range(len(prompts))]


def test_float32_equals_generate(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    expected = [generate(model, prompt, max_new_tokens=16) for prompt in prompts]
    assert serve(copy.deepcopy(model), prompts) == expected


def test_a_prompts_scores_are_those_of_transformers(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    engine = Engine(copy.deepcopy(model), EngineConfig(max_model_len=512, num_cache_tokens=4096))
    wish = {"prompt_logprobs": True, "num_logprobs": 3, "max_tokens": 0}
    texts = {"short": prompts[0], "long": [i for prompt in prompts for i in prompt] * 2}
    assert len(texts["long"]) > 256  # more than one chunk
    for name, prompt in texts.items():
        engine.add(request(name, prompt, **wish))
    for name, outputs in run(engine).items():
        assert len(outputs) == len(texts[name])
        assert_scored(outputs, model, texts[name])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_int8_is_the_same_in_any_company(
    model: PreTrainedModel, prompts: list[list[int]], temperature: float
) -> None:
    quantized = copy.deepcopy(model)
    assert quantize_model(quantized)
    together = serve(quantized, prompts, temperature=temperature)
    for number, prompt in enumerate(prompts):
        engine = Engine(quantized, EngineConfig(max_model_len=512, num_cache_tokens=512))
        engine.add(request("alone", prompt, max_tokens=16, seed=number, temperature=temperature))
        assert token_ids(run(engine)["alone"]) == together[number]


def test_int8_is_the_same_with_prompt_lookup(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    """To the last bit: what is guessed is rounded as what is generated token by token.

    Processors round in ways of their own, so nobody knows which text repeats itself: one of some.
    """
    quantized = copy.deepcopy(model)
    assert quantize_model(quantized)
    engine = Engine(quantized, EngineConfig(max_model_len=512, num_cache_tokens=4096))
    num_tokens = num_reads = 0
    for seed, temperature in enumerate((0.0, 0.3, 0.8)):
        wish = {"max_tokens": 60, "temperature": temperature, "num_logprobs": 0, "ignore_eos": True}
        logprobs: list[list[tuple[int, float | None]]] = []
        for number in (0, 10):
            num_reads_before = num_reads
            options = {"seed": seed, "prompt_lookup_num_tokens": number}
            engine.add(request("a", prompts[2] * 2, **options, **wish))
            logprobs.append([])
            while engine.has_unfinished:
                logprobs[-1] += [(output.token_id, output.logprob) for output in engine.step()]
                num_reads += 1
            if number == 0:  # what guesses are compared with
                num_tokens += num_reads - num_reads_before
                num_reads = num_reads_before
        assert logprobs[0] == logprobs[1]
    assert num_reads < num_tokens, "no guess was right"
