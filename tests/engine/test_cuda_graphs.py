"""Steps that are recorded: sizes, filling up, copying; with a graph that calls what it saw."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from modules.engine.cuda_graphs import choose_sizes
from modules.engine.engine import Engine
from modules.engine.model_runner import input_device
from tests.engine.conftest import SHAPE, EngineFactory, build_model, request, run, token_ids
from tests.engine.fake_card import FakeGraph, fake_card
from tests.engine.test_engine import random_prompts

__all__ = ["fake_card"]

SIZE = 16


def test_sizes() -> None:
    assert choose_sizes(1) == (1,)
    assert choose_sizes(3) == (1, 2, 3)
    assert choose_sizes(32) == (1, 2, 4, 8, 16, 24, 32)
    assert choose_sizes(33) == (1, 2, 4, 8, 16, 24, 32, 33)


def replies(engine: Engine, num_prompts: int, **wishes: object) -> dict[str, list[int]]:
    for number, prompt in enumerate(random_prompts(num_prompts)):
        engine.add(request(str(number), prompt, max_tokens=8 + 3 * number, **wishes))
    return {name: token_ids(outputs) for name, outputs in run(engine).items()}


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_recorded_steps_change_no_token(
    name: str, make_engine: EngineFactory, request: pytest.FixtureRequest
) -> None:
    """Ragged, of ever fewer sequences, so that each graph is also used for less than its size."""
    model = build_model(name)
    expected = replies(make_engine(model), 7)
    graphs: type[FakeGraph] = request.getfixturevalue("fake_card")
    engine = make_engine(model, block_size=SIZE)
    assert graphs.captured == [], "nothing is recorded before it is needed"
    assert replies(engine, 7) == expected
    assert len(graphs.captured) == 4, "1, 2, 4 and 8"
    assert all(graph.num_replays > 1 for graph in graphs.captured)
    before = sum(graph.num_replays for graph in graphs.captured)
    assert replies(engine, 7) == expected
    assert len(graphs.captured) == 4
    assert sum(graph.num_replays for graph in graphs.captured) > before


@torch.inference_mode()
def test_no_block_of_others_is_written(
    make_engine: EngineFactory, fake_card: type[FakeGraph]
) -> None:
    """Three sequences in a graph for four; all blocks that are not theirs hold what they held."""
    engine = make_engine(block_size=SIZE, num_cache_tokens=40 * SIZE, num_retained_tokens=0)
    for number, prompt in enumerate(random_prompts(3)):
        engine.add(request(str(number), prompt, max_tokens=5))
    engine.step()
    cache = engine.runner._attention.kv_cache  # type: ignore[attr-defined]
    scratch = engine.runner._attention.scratch_block  # type: ignore[attr-defined]
    assert scratch == engine.cache_manager.num_blocks
    stores = [store for pair in cache._layers.values() for store in pair]
    held = {block for seq in engine.scheduler.running for block in seq.block_table}
    for store in stores:
        store[[block for block in range(scratch) if block not in held]] = 7.0
    engine.step()
    assert len(fake_card.captured) == 1
    held = {block for seq in engine.scheduler.running for block in seq.block_table}
    others = [block for block in range(scratch) if block not in held]
    assert all((store[others] == 7.0).all() for store in stores)


def test_drafts_and_prompts_are_not_recorded(
    make_engine: EngineFactory, fake_card: type[FakeGraph]
) -> None:
    engine = make_engine(block_size=SIZE)
    engine.add(request("prompt", random_prompts(1)[0], max_tokens=1))
    run(engine)
    assert fake_card.captured == []
    prompt = [5, 6, 7, 8] * 6
    expected = token_ids_of(make_engine(block_size=SIZE), prompt)
    assert token_ids_of(engine, prompt, prompt_lookup_num_tokens=4) == expected


def token_ids_of(engine: Engine, prompt: list[int], **wishes: object) -> list[int]:
    engine.add(request("x", prompt, max_tokens=30, **wishes))
    return token_ids(run(engine)["x"])


def test_what_cannot_be_recorded_runs_as_it_is(
    make_engine: EngineFactory,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = replies(make_engine(), 3)
    graphs: type[FakeGraph] = request.getfixturevalue("fake_card")
    tried = []

    def refuse(self: FakeGraph, run: object) -> torch.Tensor:
        tried.append(self)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", refuse)
    assert replies(make_engine(block_size=SIZE), 3) == expected
    assert len(tried) == 1
    assert "not permitted when stream is capturing" in caplog.text


@pytest.mark.parametrize("name", ["gemma2-softcap-sliding", "gpt-oss-sinks-sliding"])
def test_what_the_kernel_does_not_know_is_not_recorded(
    name: str, make_engine: EngineFactory, request: pytest.FixtureRequest
) -> None:
    model = build_model(name)
    expected = replies(make_engine(model), 3)
    graphs: type[FakeGraph] = request.getfixturevalue("fake_card")
    assert replies(make_engine(model, block_size=SIZE), 3) == expected
    assert graphs.captured == []


def test_memory_is_taken_before_anything_is_read(
    make_engine: EngineFactory, fake_card: type[FakeGraph]
) -> None:
    engine = make_engine(block_size=SIZE)
    layers = engine.runner._attention.kv_cache._layers  # type: ignore[attr-defined]
    assert len(layers) == SHAPE["num_hidden_layers"]
    num_blocks = engine.cache_manager.num_blocks
    assert {len(store) for pair in layers.values() for store in pair} == {num_blocks + 1}


def test_a_model_on_several_cards_is_not_recorded(
    make_engine: EngineFactory, request: pytest.FixtureRequest, tiny_model: PreTrainedModel
) -> None:
    """Its index of rows to sample stays on the host, where any card can read it."""
    expected = replies(make_engine(), 3)
    graphs: type[FakeGraph] = request.getfixturevalue("fake_card")
    spread = copy.deepcopy(tiny_model)
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert replies(make_engine(spread, block_size=SIZE), 3) == expected
    assert graphs.captured == []


def test_ids_go_where_they_are_looked_up(tiny_model: PreTrainedModel) -> None:
    spread = copy.deepcopy(tiny_model)
    spread.get_input_embeddings().to("meta")
    assert input_device(spread) == torch.device("meta")
