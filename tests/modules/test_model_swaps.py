"""Models come and go: what they share, and that their memory comes back."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import LlamaConfig

from modules.engine.sampling_params import SamplingParams
from modules.engine.sequence import SequenceRequest
from modules.errors import ModelLoadError
from modules.loaded_model import LoadedModel
from modules.memory import release_memory
from modules.model_files import DEFAULT_MODEL, find_bundled
from modules.model_loading import Shared, load_model
from modules.weight_files import estimate_bytes
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
# What is allocated comes back nearly to the byte, but for what other threads do. In sixteen swaps,
# a quarter of a MiB in each would be seen.
MAX_GROWTH = 4 * MIB
# What the system counts goes up with pages that are used in part, of which an allocator finds ever
# more in a large process: by less than half of the 208 MiB that would be left if none came back.
TOLERANCE = 100 * MIB


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wide")
    return [save(folder / name, build_model("wide", {"wide": WIDE})) for name in ("a", "b")]


async def generate(model: LoadedModel, max_tokens: int = 8) -> int:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    async with aclosing(model.engine.generate([SequenceRequest("a", (5, 6), params)])) as steps:
        return sum([len(outputs) async for outputs in steps])


class MallInfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h: bytes and counts, over all arenas."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def allocated() -> int | None:
    """Bytes that are allocated and not freed; None where the C library does not tell."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def test_memory_is_back_after_each_of_twenty_swaps(wide: list[Path], tmp_path: Path) -> None:
    swaps = [("float32", wide[0]), ("int8", wide[1])] * (NUM_SWAPS // 2)
    levels = []
    for dtype, path in swaps:
        model = load_model(str(path), make_settings(tmp_path, dtype=dtype))
        assert asyncio.run(generate(model)) == 8
        model.close()
        release_memory()
        levels.append((resident(), allocated()))
    told = [(pages // MIB, held and held // 1024) for pages, held in levels]
    levels = levels[4:]  # two of each format: by then all that is kept for good is there
    first_resident, first_allocated = levels[0]
    for pages, held in levels:
        assert pages < first_resident + TOLERANCE, told
        if held is not None and first_allocated is not None:
            assert held < first_allocated + MAX_GROWTH, told


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


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_the_size_of_weights_is_foreseen(wide: list[Path], dtype: str, itemsize: int) -> None:
    model = load_model(str(wide[0]), make_settings(wide[0].parent, dtype=dtype))
    held: Any = model.engine._engine.runner._model
    expected = sum({p.data_ptr(): p.nbytes for p in held.parameters()}.values())
    model.close()
    assert estimate_bytes(wide[0], itemsize, unpacks=True) == pytest.approx(expected, rel=0.05)


def test_the_size_of_a_gguf_files_weights_is_foreseen() -> None:
    path = find_bundled(DEFAULT_MODEL)
    if path is None:
        pytest.skip("the bundled model is not installed")
    assert estimate_bytes(path, 4, unpacks=True) == pytest.approx(134_515_008 * 4, rel=0.05)
