"""The Hugging Face hub for whoever names a model of it: its cache on this disk, and fetching.

Whole folders, as they are loaded. What a person fetches into `models/` is `model_download.py`'s
business.
"""

from __future__ import annotations

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

from modules.errors import DownloadError, ModelLoadError
from modules.load_progress import LoadProgress, LoadStage, Report, report_nothing
from modules.model_kinds import MODEL_FILES, read_json
from modules.settings import Settings
from modules.weight_files import PICKLE_PATTERN, has_all_weights, parts_of

# What the hub's repositories hold that transformers can load, and what it needs beside the weights.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
TOKENIZER_PATTERNS = ("tokenizer.json", "*.model", "vocab.*")
# The first base is that of the hub's HTTP library, which changes its name between versions.
_HUB_FAULTS: tuple[type[BaseException], ...] = (
    *HfHubHTTPError.__bases__,
    EntryNotFoundError,
    OSError,
    RuntimeError,
    ValueError,
)


def find_in_cache(name: str, settings: Settings) -> Path | None:
    """The folder of a model that is there as a whole."""
    try:
        files = [huggingface_hub.try_to_load_from_cache(name, each) for each in MODEL_FILES]
    except ValueError:  # no name that the hub could have
        return None
    for file in files:
        if isinstance(file, str) and _is_complete(Path(file).parent, settings):
            return Path(file).parent
    return None


def fetch(name: str, settings: Settings, report: Report = report_nothing) -> Path:
    """The folder in the hub's cache; what is there already of an interrupted download is kept.

    Raises: DownloadError, whose text goes on from "not in the cache, and"; ModelLoadError if what
    there is of it is no whole model.
    """
    report(LoadProgress(LoadStage.DOWNLOADING))
    # Code is only fetched to be run, and pickles may run code too.
    patterns = [
        *HUB_PATTERNS,
        *(["*.py"] if settings.trust_remote_code else []),
        *([PICKLE_PATTERN] if settings.allow_pickle else []),
    ]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, tqdm_class=_make_bar(report)
            )
        )
    except _HUB_FAULTS as error:
        raise DownloadError(_reason(error)) from error
    if not _is_complete(folder, settings):
        # Where the hub cannot be reached, it hands out what it has.
        raise ModelLoadError(
            f"{name} is incomplete in {folder}: a model needs config.json, a tokenizer and weights "
            "(*.safetensors). Either the hub has no more of it, or it cannot be reached to get "
            "the rest."
        )
    return folder


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


def _reason(error: BaseException) -> str:
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
    parts = parts_of(folder)
    main = parts[0]
    return (
        any((folder / name).is_file() for name in MODEL_FILES)
        and any(path.is_file() for glob in TOKENIZER_PATTERNS for path in main.glob(glob))
        and has_all_weights(main, settings.allow_pickle)
        and all((part / "config.json").is_file() for part in parts[1:])
        and not (settings.trust_remote_code and _lacks_code(main))
    )


def _lacks_code(folder: Path) -> bool:
    """Whether config.json names Python files of this folder that are not there."""
    classes = (read_json(folder / "config.json").get("auto_map") or {}).values()
    own = [name for name in classes if isinstance(name, str) and "--" not in name]
    return not all((folder / f"{name.split('.')[0]}.py").is_file() for name in own)
