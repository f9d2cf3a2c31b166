"""Saved models, a folder for them, and a hub that is far away: what tests of models share."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel

from modules import model_files
from modules.errors import ModelError
from modules.settings import Settings
from tests.engine import conftest
from tests.engine.conftest import CONFIGS
from tests.fakes import build_tokenizer

BUNDLED = "SmolLM2-135M-Instruct"


def build_model(name: str, configs: dict[str, PretrainedConfig] = CONFIGS) -> PreTrainedModel:
    """With a configuration of its own, as loading changes it."""
    return conftest.build_model(name, copy.deepcopy(configs))


def save(folder: Path, model: PreTrainedModel | None = None) -> Path:
    (model or build_model("llama")).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty, as are the hub's cache and the list of installed packages; the hub is far away."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(LocalEntryNotFoundError("far")))
    monkeypatch.setitem(
        model_files.BUNDLED_MODELS, BUNDLED, model_files.BundledModel("no_such", "x.gguf")
    )
    return folder


@pytest.fixture
def tiny(model_dir: Path, saved: Path) -> Path:
    """A model named tiny that a test may damage."""
    return shutil.copytree(saved, model_dir / "tiny")


def make_settings(model_dir: Path, **values: Any) -> Settings:
    return Settings(**{"model_dir": model_dir, "cpu": True, "kv_cache_memory": 0.01, **values})


class Hub:
    """In the place of `snapshot_download`: copies a folder into the cache, or fails."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.patterns: list[str] = []
        self.names: list[str] = []

    def __call__(self, name: str, *, allow_patterns: list[str], tqdm_class: type) -> str:
        self.names.append(name)
        self.patterns = allow_patterns
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(cache_as(name, self.answer))


def cache_as(name: str, source: Path) -> Path:
    """Put a folder where the hub's library keeps `name`."""
    repo = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text("abc123")
    return shutil.copytree(source, repo / "snapshots" / "abc123", dirs_exist_ok=True)


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def write_gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")  # enough to be found
    return path.resolve()
