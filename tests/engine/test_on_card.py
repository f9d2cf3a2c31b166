"""What only a CUDA card can show: its kernel, its graphs, and when the host waits for it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from modules.engine.cuda_attention import PAGE_SIZE, find_kernel
from modules.engine.engine import Engine, EngineConfig
from tests.engine import conftest
from tests.engine.conftest import SHAPE, request, run, token_ids
from tests.engine.test_engine import random_prompts

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card"),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = LlamaConfig(**{**SHAPE, "head_dim": 64, "max_position_embeddings": 2048})
    return conftest.build_model("llama", {"llama": config}).to("cuda", torch.bfloat16)


def build_engine(model: PreTrainedModel) -> Engine:
    return Engine(
        copy.deepcopy(model), EngineConfig(max_model_len=1024, num_cache_tokens=64 * PAGE_SIZE)
    )


def test_the_kernel_is_right() -> None:
    """Two sequences, one over the edge of a block, beside TorchAttention."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("FlashAttention is for Ampere and later")
    assert find_kernel(torch.device("cuda", torch.cuda.current_device())) is not None


def test_recorded_steps_equal_those_that_are_not(model: PreTrainedModel) -> None:
    """One by one: in another company, matrix products may round otherwise."""
    recorded, plain = build_engine(model), build_engine(model)
    plain.runner._graphs = None
    for number, prompt in enumerate(random_prompts(4, longest=300)):
        replies = []
        for engine in (recorded, plain):
            engine.add(request(str(number), prompt, max_tokens=40))
            replies.append(token_ids(run(engine)[str(number)]))
        assert replies[0] == replies[1]
    assert recorded.runner._graphs is not None
    assert recorded.runner._graphs._steps


@pytest.mark.parametrize(
    "wishes",
    [{}, {"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.2, "num_logprobs": 2}],
    ids=str,
)
def test_a_step_waits_for_the_card_once(model: PreTrainedModel, wishes: dict) -> None:
    """And once more where log-probabilities are reported."""
    engine = build_engine(model)
    for number, prompt in enumerate(random_prompts(3)):
        engine.add(request(str(number), prompt, max_tokens=20, **wishes))
    for _ in range(4):
        engine.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1 + (
        "num_logprobs" in wishes
    )
