"""What comes next, through the app: the model's own word, and what a request's samplers leave."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from modules.engine.async_engine import AsyncEngine
from modules.engine.engine import Engine, EngineConfig
from modules.loaded_model import LoadedModel
from modules.vocabulary import Vocabulary
from tests.conftest import MakeApp, connect
from tests.fakes import VOCAB_SIZE, FakeEngine, FakeModelManager, build_model
from tests.openai.assertions import assert_error_shape

pytestmark = pytest.mark.anyio

PATH = "/v1/internal/logits"
SIZE = VOCAB_SIZE + 5  # an embedding with rows that no token has


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture
def computing(tiny: PreTrainedModel) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(
        Engine(copy.deepcopy(tiny), EngineConfig(max_model_len=64, num_cache_tokens=256))
    )
    yield engine
    engine.stop()


@pytest.fixture
async def real(
    computing: AsyncEngine, manager: FakeModelManager, make_app: MakeApp, tokenizer
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app with a model that computes."""
    model = build_model(FakeEngine(), tokenizer)
    vocabulary = Vocabulary(tokenizer, SIZE)
    manager.model = replace(model, engine=computing, vocab_size=SIZE, vocabulary=vocabulary)
    async with connect(make_app()) as client:
        yield client


def expect(tiny: PreTrainedModel, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return tiny(torch.tensor([list(text.encode())])).logits[0, -1].softmax(-1)


async def ask(client: httpx.AsyncClient, **body: object) -> dict[str, float]:
    response = await client.post(PATH, json={"prompt": "Hello", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, float] = response.json()
    assert list(answer.values()) == sorted(answer.values(), reverse=True)
    return answer


async def test_the_models_own_word(real: httpx.AsyncClient, tiny: PreTrainedModel, model) -> None:
    answer = await ask(real, temperature=9.0, top_k=1, seed=5)  # do not matter
    best = expect(tiny, "Hello").topk(50)
    expected: dict[str, float] = {}
    for token_id, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        piece = model.vocabulary.piece(token_id) if token_id < VOCAB_SIZE else ""
        expected.setdefault(piece, value)
    assert answer == pytest.approx(expected, abs=1e-5)
    assert await ask(real, prompt=list(b"Hello"), top_logits=3) == pytest.approx(
        dict(list(answer.items())[:3]), abs=1e-6
    )


async def test_the_whole_vocabulary_adds_up(real: httpx.AsyncClient, tiny: PreTrainedModel) -> None:
    answer = await ask(real, top_logits=SIZE)
    assert len(answer) == VOCAB_SIZE + 1  # rows without a token are spelled the same
    assert answer[""] == pytest.approx(expect(tiny, "Hello")[VOCAB_SIZE:].max().item(), abs=1e-5)


async def test_through_the_samplers(real: httpx.AsyncClient, tiny: PreTrainedModel) -> None:
    answer = await ask(real, use_samplers=True, top_k=3, temperature=0.5, top_logits=10)
    assert len(answer) == 10
    values = list(answer.values())
    expected = (expect(tiny, "Hello").log() / 0.5).topk(3).values.softmax(-1)
    assert values[:3] == pytest.approx(expected.tolist(), abs=1e-4)
    assert values[3:] == [0.0] * 7


async def test_a_ban_shows(real: httpx.AsyncClient, model: LoadedModel) -> None:
    first = next(iter(await ask(real, top_logits=1)))
    token_id = model.tokenizer.convert_tokens_to_ids(first)
    ban = {"logit_bias": {str(token_id): -100}}
    assert (await ask(real, use_samplers=True, **ban, top_logits=SIZE))[first] == 0.0


async def test_guidance_shows(real: httpx.AsyncClient, tiny: PreTrainedModel) -> None:
    answer = await ask(
        real, use_samplers=True, guidance_scale=2.0, negative_prompt="x", top_logits=5
    )
    positive, negative = expect(tiny, "Hello").log(), expect(tiny, "x").log()
    expected = (negative + 2 * (positive - negative)).softmax(-1).topk(5).values
    assert list(answer.values()) == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "search",
    [{"num_beams": 3, "do_sample": False}, {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}],
)
async def test_searches_are_answered(real: httpx.AsyncClient, search: dict[str, object]) -> None:
    plain = await ask(real, top_logits=5)
    assert await ask(real, **search, top_logits=5) == plain
    assert len(await ask(real, use_samplers=True, **search, top_logits=5)) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_logits", 0),
        ("top_logits", SIZE + 1),
        ("top_logits", True),
        ("use_samplers", 1),
        ("prompt", ["a", "b"]),
        ("prompt", None),
        ("prompt", ""),
        ("prompt", [SIZE]),
        ("temperature", -1),
    ],
)
async def test_what_is_refused(real: httpx.AsyncClient, field: str, value: object) -> None:
    response = await real.post(PATH, json={"prompt": "a", field: value})
    assert_error_shape(response, 400, param=field)


async def test_it_is_one_token_in_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for uses in (False, True):
        await client.post(PATH, json={"prompt": "a", "use_samplers": uses, "max_tokens": 9})
        params = engine.requests[-1].params
        assert (params.max_tokens, params.num_logprobs) == (1, 50)
        assert params.processed_logprobs is uses
