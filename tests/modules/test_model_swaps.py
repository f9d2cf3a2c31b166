"""Models come and go: what they share, and that their memory comes back."""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import LlamaConfig

from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest
from modules.errors import ModelLoadError
from modules.loaded_model import LoadedModel
from modules.memory import release_memory
from modules.model_files import DEFAULT_MODEL, FoundModel, find_bundled
from modules.model_loading import Shared, estimate_weight_bytes, load_model
from modules.settings import Settings
from tests.modules.conftest import build_model, make_settings, save
from tests.modules.test_model_loading import KV_BYTES, memory_for

MIB = 2**20
NUM_SWAPS = 20
# 21 MiB in float32, and 5 in int8.
WIDE = LlamaConfig(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
)
# Allocators keep pages that are used in part, which makes the level go up and down: by 22 MiB
# in twenty swaps. Its lowest points show what is really held: there, a dozen swaps may cost what is
# an eighth of an int8 model each, and a thirtieth of one in float32.
TOLERANCE = 40 * MIB
MAX_GROWTH = 8 * MIB


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wide")
    return [save(folder / name, build_model("wide", {"wide": WIDE})) for name in ("a", "b")]


async def generate(model: LoadedModel, max_tokens: int = 8) -> int:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    async with aclosing(model.engine.generate([SequenceRequest("a", (5, 6), params)])) as steps:
        return sum([len(outputs) async for outputs in steps])


def resident() -> int:
    release_memory()
    return int(psutil.Process().memory_info().rss)


def test_memory_is_back_after_each_of_twenty_swaps(wide: list[Path], tmp_path: Path) -> None:
    swaps = [("float32", wide[0]), ("int8", wide[1])] * (NUM_SWAPS // 2)
    levels = []
    for dtype, path in swaps:
        model = load_model(str(path), make_settings(tmp_path, dtype=dtype))
        assert asyncio.run(generate(model)) == 8
        model.close()
        levels.append(resident())
    told = [level // MIB for level in levels]
    levels = levels[4:]  # two of each format: by then all that is kept for good is there
    assert max(levels) < levels[0] + TOLERANCE, told
    assert min(levels[-5:]) < min(levels[:5]) + MAX_GROWTH, told


def test_a_closed_model_gives_its_memory_back_though_somebody_holds_it(
    wide: list[Path], tmp_path: Path
) -> None:
    settings = make_settings(tmp_path, dtype="float32")
    model = load_model(str(wide[0]), settings)
    asyncio.run(generate(model))
    engine: Any = model.engine
    weights = weakref.ref(engine._engine.runner._model)
    model.close()
    assert weights() is None
    model.close()
    assert model.encode("text", add_special_tokens=False)


def test_models_share_a_thread_and_the_memory_for_keys_and_values(
    model_dir: Path, tiny: Path
) -> None:
    settings = make_settings(model_dir, kv_cache_memory=memory_for(600), dtype="float32")
    shared = Shared(num_to_come=2)
    first = load_model("tiny", settings, shared)
    second = load_model("tiny", settings, Shared(thread=shared.thread, budget=shared.budget))
    assert (first.max_model_len, second.max_model_len) == (300, 300)
    with pytest.raises(ModelLoadError, match="of 0 tokens fit .* unload another model"):
        load_model("tiny", settings, shared)
    replacing = Shared(thread=shared.thread, budget=shared.budget, replaced=(second,))
    third = load_model("tiny", settings, replacing)
    assert third.max_model_len == 300
    second.close()

    async def both() -> list[int]:
        return await asyncio.gather(generate(first), generate(third))

    assert asyncio.run(both()) == [8, 8]
    assert [thread.name for thread in threading.enumerate()].count("inference") == 1
    first.close()
    third.close()
    assert "inference" not in {thread.name for thread in threading.enumerate()}
    assert shared.budget.reserve("cpu", 0, total=KV_BYTES).num_bytes == KV_BYTES


def test_a_failed_load_gives_its_part_back(model_dir: Path, tiny: Path) -> None:
    shared = Shared()
    settings = make_settings(model_dir, kv_cache_memory=memory_for(600), dtype="float32")
    with pytest.raises(ModelLoadError):
        load_model("tiny", make_settings(model_dir, kv_cache_memory=memory_for(9)), shared)
    model = load_model("tiny", settings, shared)
    assert model.max_model_len == 512
    model.close()


def weight_bytes(model: LoadedModel) -> int:
    """Those of its tensors, and of the arrays that took the place of some."""
    held: Any = model.engine._engine.runner._model
    tensors = sum({p.data_ptr(): p.nbytes for p in held.parameters()}.values())
    quantized = [getattr(module, "_weights", ()) for module in held.modules()]
    return tensors + sum(
        array.nbytes
        for weights in quantized
        for group in getattr(weights, "__iter__", lambda w=weights: (w.matrices,))()
        for array in (group if isinstance(group, tuple) else (group,))
        if isinstance(array, np.ndarray)
    )


@pytest.mark.parametrize(
    ("dtype", "is_bundled"),
    [
        ("float32", False),
        ("bfloat16", False),
        ("int8", False),
        ("int4", False),
        ("float32", True),
        ("int8", True),
    ],
)
def test_the_size_of_weights_is_foreseen(wide: list[Path], dtype: str, is_bundled: bool) -> None:
    path = find_bundled(DEFAULT_MODEL) if is_bundled else wide[0]
    if path is None:
        pytest.skip("the bundled model is not installed")
    settings = Settings(cpu=True, dtype=dtype, kv_cache_memory=0.5, max_model_len=64)
    model = load_model(str(path), settings)
    try:
        expected = weight_bytes(model)
    finally:
        model.close()
    estimate = estimate_weight_bytes(FoundModel("model", path), settings)
    assert estimate == pytest.approx(expected, rel=0.25)


def test_the_size_of_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        estimate_weight_bytes(FoundModel("bad", tmp_path), Settings(cpu=True))
