"""Folders of image-text models, whole and not: which are read, and whether they see."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import Cohere2VisionConfig

from modules.engine.image_inputs import ImageInputs
from modules.errors import InvalidRequestError, ModelLoadError, TemplateError
from modules.image_processors import load_image_reader
from modules.image_reader import RequestImages, ShownImage
from modules.model_loading import load_model
from modules.settings import Settings
from tests.vision import IDS, draw, rewrite, write_vision_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("written") / "qwen2_vl", "qwen2_vl")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "seer"))


def test_images_become_tokens_and_tensors(folder: Path) -> None:
    """Without torchvision, which is not there, and without the part for videos, which needs it."""
    reader = load_image_reader(folder, {})
    assert reader is not None
    pictures = [draw(0), draw(1, (90, 130))]
    read = reader.read(pictures)
    assert [set(ids) for ids in read.token_ids] == [{IDS["<|image_pad|>"]}] * 2
    grid = read.tensors["image_grid_thw"].tolist()
    assert [len(ids) for ids in read.token_ids] == [h * w // 4 for _, h, w in grid]
    assert read.token_kinds == {"mm_token_type_ids": {IDS["<|image_pad|>"]: 1}}


def test_a_model_without_the_files_for_it_reads_text(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "preprocessor_config.json").unlink()
    model = load_model(str(folder), Settings(dtype="float32"))
    model.engine.stop()
    assert model.image_reader is None
    assert "reads no images" not in caplog.text


@pytest.mark.parametrize(
    "change", [{"image_processor_type": "NoSuchProcessor"}, {"patch_size": "many"}]
)
def test_files_that_cannot_be_used_are_told_of(
    folder: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(folder / "preprocessor_config.json", **change)
    with caplog.at_level(logging.WARNING):
        assert load_image_reader(folder, {}) is None
    (line,) = [r.getMessage() for r in caplog.records if "reads no images" in r.getMessage()]
    assert line.startswith("seer reads no images: ")


def test_what_needs_torchvision_says_so(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Cohere2VisionConfig().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(written / name, tmp_path)
    description = {"image_processor_type": "Cohere2VisionImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(description))
    with caplog.at_level(logging.WARNING):
        assert load_image_reader(tmp_path, {}) is None
    (line,) = [r.getMessage() for r in caplog.records if "reads no images" in r.getMessage()]
    assert line.endswith("which is missing: pip install torchvision")


def test_all_weights_must_be_there(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="model.safetensors is incomplete"):
        load_model(str(folder), Settings(dtype="float32"))


def test_int8_is_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="its layers are not known"):
        load_model(str(folder), Settings(dtype="int8"))


def test_a_picture_that_the_processor_refuses(folder: Path) -> None:
    """Qwen's takes none that is 200 times as wide as high."""
    reader = load_image_reader(folder, {})
    assert reader is not None
    shown = [ShownImage(draw(0), "first"), ShownImage(Image.new("RGB", (1000, 2)), "second")]
    images = RequestImages(reader, shown)
    with pytest.raises(InvalidRequestError, match="ratio .* got 500") as caught:
        images.place((0, 1), (reader.placeholder_id,) * 2)
    assert caught.value.param == "second"
    token_ids, _ = images.place((0,), (7, reader.placeholder_id, 8))
    assert token_ids == (7, *reader.read([draw(0)]).token_ids[0], 8)
    with pytest.raises(TemplateError):
        images.place((0,), (reader.placeholder_id,) * 2)


def test_pictures_are_read_apart_where_that_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some processors give an image fewer tokens where there are several."""
    reader = load_image_reader(folder, {})
    assert reader is not None
    places = (reader.placeholder_id,) * 2
    shown = [ShownImage(draw(number), "") for number in range(2)]
    together = RequestImages(reader, shown).place((0, 1), places)
    reader.try_apart()
    apart = RequestImages(reader, shown).place((0, 1), places)
    assert [len(images) for _, images in (together, apart)] == [1, 2]
    assert together[0] == apart[0]

    read = reader.read

    def read_shorter(pictures: Sequence[Image.Image]) -> ImageInputs:
        inputs = read(pictures)
        return replace(inputs, token_ids=tuple(ids[len(pictures) :] for ids in inputs.token_ids))

    def read_one(pictures: Sequence[Image.Image]) -> ImageInputs:
        (picture,) = pictures
        return read([picture])

    for other in (read_shorter, read_one):
        monkeypatch.setattr(reader, "read", other)
        reader.reads_apart = True
        reader.try_apart()
        assert not reader.reads_apart
    monkeypatch.setattr(reader, "read", read)
    assert len(RequestImages(reader, shown).place((0, 1), places)[1]) == 1
