"""Files of weights that are not whole, or not to be loaded, are told from their headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.errors import ModelLoadError
from modules.model_loading import load_model
from modules.weight_files import check_weights, estimate_bytes, has_all_weights
from tests.modules.conftest import build_model, make_settings, one_line

Damage = Callable[[Path], object]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    build_model("llama").save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def cut_off(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def lose_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path)


def test_what_is_whole_passes(sharded: Path, saved: Path) -> None:
    check_weights(sharded, allow_pickle=False)
    check_weights(saved, allow_pickle=False)
    assert has_all_weights(sharded, allow_pickle=False)


@pytest.mark.parametrize(
    ("weights", "config", "is_refused"),
    [
        (["model.layers.1.a"], {"num_hidden_layers": 2}, False),
        (["model.layers.1.a"], {"num_hidden_layers": 3}, True),
        (["model.layers.1.a"], {"text_config": {"num_hidden_layers": 3}}, True),
        (["vision.layers.1.a", "text.h.2.a"], {"text_config": {"num_hidden_layers": 3}}, False),
        (["groups.0.shared_layers.0.a"], {"num_hidden_layers": 12}, False),
        (["decoder.layers.1.a"], {"num_hidden_layers": 6, "encoder_layers": 6}, False),
    ],
)
def test_layers_that_are_not_there(
    weights: list[str], config: dict[str, Any], is_refused: bool, tmp_path: Path
) -> None:
    save_file({name: torch.ones(1) for name in weights}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(ModelLoadError, match=r"config\.json tells of 3 layers, and .* only 2\.")
        if is_refused
        else nullcontext()
    ):
        check_weights(tmp_path, allow_pickle=False)


@pytest.mark.parametrize(
    ("weight", "unpacked", "kept"),
    [
        (torch.zeros(6, dtype=torch.float16), 24, 24),
        (torch.zeros(6, dtype=torch.float8_e4m3fn), 24, 6),
        (torch.zeros(6, dtype=torch.int8), 24, 6),
        (torch.zeros(3, dtype=torch.uint8), 24, 3),  # two numbers each
        (torch.zeros(3, dtype=torch.int32), 96, 12),  # eight
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, torch.Tensor) else None,
)
def test_how_much_memory_packed_weights_take(
    weight: torch.Tensor, unpacked: int, kept: int, tmp_path: Path
) -> None:
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    assert estimate_bytes(tmp_path, 4, unpacks=True) == unpacked
    assert estimate_bytes(tmp_path, 4, unpacks=False) == kept


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut_off(path, 1), "is incomplete: it has"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "its header is not whole"),
        (lambda path: path.write_bytes(b""), "its header is not whole"),
        (lambda path: path.write_bytes(b"\xff" * 100), "its header is not whole"),
        (lambda path: path.write_bytes(b"\x02" + bytes(7) + b"[]"), "its header is not whole"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is damaged: it has more"),
        (lambda path: path.unlink(), "is missing"),
        (lose_a_weight, "which the index says is there"),
    ],
    ids=["cut off", "within header", "empty", "no size", "a list", "too long", "missing", "other"],
)
def test_a_damaged_shard_is_named(sharded: Path, damage: Damage, message: str) -> None:
    path = first_shard(sharded)
    damage(path)
    with pytest.raises(ModelLoadError, match=message) as error:
        check_weights(sharded, allow_pickle=False)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors\.index\.json is damaged"):
        check_weights(sharded, allow_pickle=False)
    assert not has_all_weights(sharded, allow_pickle=False)


def test_a_part_of_sentence_transformers_is_looked_at_too(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "parts")
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
    check_weights(folder, allow_pickle=False)
    torch.save({}, folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"2_Dense/pytorch_model\.bin is a pickle"):
        check_weights(folder, allow_pickle=False)


# Pickles


@pytest.fixture
def pickled(tiny: Path) -> Path:
    """The same weights as a pickle."""
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    torch.save({}, tiny / "optimizer.pt")
    return tiny


def test_a_pickle_is_loaded_only_where_that_is_asked_for(model_dir: Path, pickled: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin is a pickle.*--allow-pickle"):
        load_model("tiny", make_settings(model_dir))
    model = load_model("tiny", make_settings(model_dir, allow_pickle=True))
    model.engine.stop()
    assert model.name == "tiny"


def test_programs_in_a_pickle_are_not_run(model_dir: Path, pickled: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (pickled / "it has run",))

    torch.save({"model.norm.weight": Program()}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="holds other things than weights"):
        load_model("tiny", make_settings(model_dir, allow_pickle=True))
    assert not (pickled / "it has run").exists()


def test_beside_safetensors_a_pickle_does_not_matter(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"broken")
    check_weights(folder, allow_pickle=False)


def test_a_damaged_pickle_is_named(pickled: Path) -> None:
    path = pickled / "pytorch_model.bin"
    cut_off(path, 100)
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin is incomplete"):
        check_weights(pickled, allow_pickle=True)
    path.unlink()
    index = {"weight_map": {"a": "pytorch_model-1.bin"}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"pytorch_model-1\.bin is missing"):
        check_weights(pickled, allow_pickle=True)


def test_without_weights(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no weights in .*tiny"):
        check_weights(tiny, allow_pickle=True)
