"""Which files of a repository on the Hugging Face hub make a model, where they belong, and getting
them there: what `download-model.py` does.

huggingface_hub fetches: it goes on with what was cut off, shows bars, and reads HF_TOKEN and
HF_ENDPOINT.
"""

from __future__ import annotations

import errno
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from modules.errors import DownloadError

DEFAULT_BRANCH = "main"
METADATA_FILE = "huggingface-metadata.txt"
# What is small, and a model may need: its configuration, tokenizer, template and code, its card.
TEXT_SUFFIXES = (".json", ".txt", ".md", ".py", ".jinja", ".model", ".tiktoken")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
# Of a repository with one file per quantization: small, and good enough for most.
DEFAULT_QUANTIZATION = "q4_k_m"
BLOCK_SIZE = 2**20
# Between two tries at a file; the first ones come sooner.
MAX_PAUSE_SECONDS = 10
# The first base is that of the hub's HTTP library, which changes its name between versions.
_NETWORK_FAULTS: tuple[type[BaseException], ...] = (
    *HfHubHTTPError.__bases__,
    OSError,
)


@dataclass(frozen=True, slots=True)
class RemoteModel:
    repo_id: str
    """organisation/name"""
    branch: str = DEFAULT_BRANCH

    @property
    def folder(self) -> str:
        branch = "" if self.branch == DEFAULT_BRANCH else f"_{self.branch}"
        return self.repo_id.replace("/", "_") + branch


@dataclass(frozen=True, slots=True)
class RemoteFile:
    path: str
    """Inside the repository."""
    size: int | None = None
    """In bytes."""
    sha256: str | None = None
    """Of large files; git keeps the others, and knows no such number of them."""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadOptions:
    model_dir: Path
    lora_dir: Path
    output: Path | None = None
    """Folder instead of the one that the names decide."""
    specific_file: str | None = None
    exclude_pattern: str | None = None
    text_only: bool = False
    num_threads: int = 4
    max_retries: int = 5
    clean: bool = False
    """Fetch again what is there already, and what has been begun."""


def parse_model(text: str, branch: str | None = None) -> RemoteModel:
    """`organisation/name`, the same with `:branch`, or an address of the hub's pages.

    Raises DownloadError if it is none of these.
    """
    path = re.sub(r"^https?://[^/]+/", "", text.strip()).strip("/")
    path, _, own_branch = path.partition(":")
    parts = path.split("/")
    if len(parts) >= 4 and parts[2] in ("tree", "blob", "resolve"):
        own_branch = own_branch or parts[3]
        parts = parts[:2]
    branch = branch or own_branch or DEFAULT_BRANCH
    if len(parts) != 2 or not all(re.fullmatch(r"[\w.-]+", part, re.ASCII) for part in parts):
        raise DownloadError(
            f"{text} is no model of the hub: expected ORGANISATION/NAME, with :BRANCH or without, "
            "or the address of its page."
        )
    if not re.fullmatch(r"[\w.-]+", branch, re.ASCII):
        raise DownloadError(f"{branch} is no branch: it may have letters, digits, and . _ -")
    return RemoteModel("/".join(parts), branch)


def choose_files(files: Sequence[RemoteFile], options: DownloadOptions) -> list[RemoteFile]:
    """Those that make a model that can be run. Raises DownloadError if there are none."""
    if options.specific_file is not None:
        return [_find_file(files, options.specific_file)]
    pattern = options.exclude_pattern
    files = [file for file in files if pattern is None or not fnmatch(file.path, pattern)]
    texts = [file for file in files if file.path.endswith(TEXT_SUFFIXES)]
    if options.text_only:
        if not texts:
            raise DownloadError("There are no files in it beside the weights.")
        return texts
    weights = _choose_weights(files)
    if not weights:
        raise DownloadError(_say_what_there_is(files))
    # A .gguf file holds its tokenizer and all else.
    return weights if all(map(_is_gguf, weights)) else [*texts, *weights]


def choose_folder(
    model: RemoteModel, files: Iterable[RemoteFile], options: DownloadOptions
) -> Path:
    files = list(files)
    if options.output is not None:
        return options.output
    if any(file.name.startswith("adapter_") for file in files):
        return options.lora_dir / model.folder
    if len(files) == 1 and _is_gguf(files[0]):
        return options.model_dir
    return options.model_dir / model.folder


def download(model: RemoteModel, options: DownloadOptions, say: Callable[[str], None]) -> Path:
    """Fetch `model`, compare what has come with the hub's sums, and return where it is.

    Raises DownloadError.
    """
    commit, files = list_files(model)
    chosen = choose_files(files, options)
    folder = choose_folder(model, chosen, options)
    say(f"Downloading {len(chosen)} files of {model.repo_id} to {folder}")
    if any(file.name.endswith(PICKLE_SUFFIXES) for file in chosen):
        say("Its weights are pickles, which can hold programs: they are loaded with --allow-pickle")

    def fetch(file: RemoteFile) -> None:
        _fetch(model, commit, file, folder, options)
        _check_sum(folder / file.path, file)

    try:
        _run_all(fetch, chosen, options.num_threads)
        if folder != options.model_dir:
            (folder / METADATA_FILE).write_text(_build_metadata(model, commit, chosen))
    except OSError as error:
        raise DownloadError(f"{folder} cannot be written: {error.strerror}.") from error
    return folder


def _run_all(
    fetch: Callable[[RemoteFile], None], files: Sequence[RemoteFile], num_threads: int
) -> None:
    """The first fault ends it, and so does an interrupt: no thread is waited for then."""
    executor = ThreadPoolExecutor(num_threads)
    try:
        for future in as_completed([executor.submit(fetch, file) for file in files]):
            future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def check(model: RemoteModel, options: DownloadOptions, say: Callable[[str], None]) -> Path:
    """Compare what is there already. Raises DownloadError, naming the files that are not whole."""
    _, files = list_files(model)
    chosen = choose_files(files, options)
    folder = choose_folder(model, chosen, options)
    faults = []
    for file in chosen:
        try:
            _check_sum(folder / file.path, file)
            say(f"{file.path}: {'is right' if file.sha256 else 'is there'}")
        except DownloadError as error:
            faults.append(str(error))
    if faults:
        raise DownloadError("\n".join(faults))
    return folder


def list_files(model: RemoteModel) -> tuple[str, list[RemoteFile]]:
    """The branch's commit, and its files. Raises DownloadError."""
    try:
        info = huggingface_hub.HfApi().model_info(
            model.repo_id, revision=model.branch, files_metadata=True
        )
    except GatedRepoError as error:
        raise DownloadError(
            f"{model.repo_id} is only for those who asked for access on its page. Give your token "
            "in the environment variable HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{model.repo_id} has no branch {model.branch}.") from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"There is no {model.repo_id} on the hub, or it is private and HF_TOKEN is not set."
        ) from error
    except HFValidationError as error:
        raise DownloadError(f"{model.repo_id} is no name that the hub could have.") from error
    except _NETWORK_FAULTS as error:
        raise DownloadError(
            f"The hub cannot be asked for {model.repo_id}: {_reason(error)}"
        ) from error
    files = [
        RemoteFile(item.rfilename, item.size, item.lfs.sha256 if item.lfs else None)
        for item in info.siblings or ()
    ]
    for file in files:
        _check_path(file.path)
    return info.sha or model.branch, files


def _check_path(path: str) -> None:
    """Raises DownloadError for one that may lie outside the folder: a hub may say anything."""
    parts = re.split(r"[/\\]", path)
    if not all(parts) or {".", ".."} & set(parts) or ":" in path or "\\" in path:
        raise DownloadError(f"The repository has a file whose name is not safe: {path!r}.")


def _choose_weights(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Of several formats the safest; of a repository of quantizations one."""
    safetensors = [file for file in files if file.path.endswith(".safetensors")]
    # What was published twice, in half precision or in another arrangement, is needed once.
    paths = {file.path for file in safetensors}
    once = [
        file
        for file in safetensors
        if not file.name.startswith("consolidated")
        and file.path.replace(".fp16.", ".") not in paths - {file.path}
    ]
    if safetensors:
        return once or safetensors
    ggufs = [file for file in files if _is_gguf(file)]
    if ggufs:
        wanted = [file for file in ggufs if DEFAULT_QUANTIZATION in file.path.lower()]
        return ggufs if len(ggufs) == 1 else wanted
    return [
        file
        for file in files
        if file.path.endswith(PICKLE_SUFFIXES) and not file.name.startswith("training_args")
    ]


def _is_gguf(file: RemoteFile) -> bool:
    return file.path.lower().endswith(".gguf")


def _say_what_there_is(files: Sequence[RemoteFile]) -> str:
    ggufs = [file.path for file in files if _is_gguf(file)]
    if ggufs:
        return "Choose one with --specific-file: " + ", ".join(ggufs)
    return "There are no weights in it that could be run: no .safetensors, .gguf or .bin files."


def _find_file(files: Sequence[RemoteFile], name: str) -> RemoteFile:
    for file in files:
        if name in (file.path, file.name):
            return file
    names = ", ".join(file.path for file in files)
    raise DownloadError(f"There is no file {name}. There are: {names}")


def _fetch(
    model: RemoteModel, commit: str, file: RemoteFile, folder: Path, options: DownloadOptions
) -> None:
    path = folder / file.path
    part = path.with_name(f"{path.name}.{(file.sha256 or commit)[:8]}.part")
    if options.clean:
        part.unlink(missing_ok=True)
    elif file.sha256 and path.is_file() and compute_sha256(path) == file.sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of the commit: all files of one state, whatever is published meanwhile.
    url = huggingface_hub.hf_hub_url(model.repo_id, file.path, revision=commit)
    for attempt in range(options.max_retries + 1):
        time.sleep(min(attempt, MAX_PAUSE_SECONDS))
        try:
            _fetch_rest(url, part, file)
        except RemoteEntryNotFoundError as error:
            raise DownloadError(f"{file.path} is not there any more.") from error
        except _NETWORK_FAULTS as error:
            if _is_local(error):
                raise
            reason = _reason(error)
        else:
            part.replace(path)
            return
    raise DownloadError(
        f"{file.path} did not arrive: {reason}. Try again: it goes on where it was cut off."
    )


def _is_local(error: BaseException) -> bool:
    """A fault of this disk, and not of the way to the hub."""
    local = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    return isinstance(error, OSError) and error.errno in local


def _fetch_rest(url: str, part: Path, file: RemoteFile) -> None:
    """Of large files what `part` has is kept: hf_hub_download would begin anew with each call."""
    with part.open("ab" if file.sha256 else "wb") as stream:
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.path,
        )


def _check_sum(path: Path, file: RemoteFile) -> None:
    """Raises DownloadError if the file is not there, or is not what the hub has."""
    if not path.is_file():
        raise DownloadError(f"{file.path} is not there.")
    if file.sha256 is not None and compute_sha256(path) != file.sha256:
        raise DownloadError(
            f"{file.path} is damaged: its SHA-256 is not the hub's. Fetch it again with --clean."
        )


def compute_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_SIZE):
            digest.update(block)
    return digest.hexdigest()


def _build_metadata(model: RemoteModel, commit: str, files: Iterable[RemoteFile]) -> str:
    sums = [f"    {file.sha256} {file.path}" for file in files if file.sha256]
    lines = [
        f"url: https://huggingface.co/{model.repo_id}",
        f"branch: {model.branch}",
        f"commit: {commit}",
        f"download date: {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "sha256sum:",
        *sums,
    ]
    return "\n".join(lines) + "\n"


def _reason(error: BaseException) -> str:
    first_line, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return first_line
