"""Every code block of the README, run against a server with default settings."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modules.characters import to_character
from modules.model_download import parse_model
from modules.settings import PROJECT_ROOT, load_settings

from .conftest import Server

pytestmark = pytest.mark.server

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
DOCUMENTED_URL = "http://127.0.0.1:5000"


def blocks(language: str, *beginnings: str) -> list[str]:
    return [
        text for name, text in BLOCKS if name == language and text.startswith(beginnings or ("",))
    ]


def test_every_block_has_a_test_below() -> None:
    known = [
        *blocks("bash", "curl", "python3 start.py", "pip install", "export"),
        *blocks("python", "import", "from"),
        *blocks("python", "# extensions/"),  # tests/test_docs.py runs it
        *blocks("yaml", "api_port", "name:"),
    ]
    assert len(known) == len(BLOCKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run, one after the other: some need the files of those before."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", blocks("bash", "curl"))
def test_curl(server: Server, folder: Path, block: str) -> None:
    command = block.replace(DOCUMENTED_URL, server.url)
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=folder,
    )
    if written := re.search(r"> (\S+\.png)$", block.strip()):
        assert (folder / written[1]).read_bytes().startswith(b"\x89PNG")
    elif output := re.search(r" -o (\S+)$", block.strip()):
        assert (folder / output[1]).stat().st_size > 1000
        assert result.stdout == ""
    elif "response_format=srt" in block:
        assert re.match(r"1\n00:00:00,\d{3} --> 00:00:\d\d,\d{3}\n\w", result.stdout)
    elif '"stream": true' in block:
        *events, done = re.findall(r"^data: (.*)$", result.stdout, re.MULTILINE)
        assert done == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas).strip()
    elif not re.match(r"curl \S+/completions", block):
        answer = json.loads(result.stdout)
        assert answer and "error" not in answer
    else:
        (choice,) = json.loads(result.stdout)["choices"]
        assert (choice.get("text") or choice["message"]["content"]).strip()


@pytest.mark.parametrize("block", blocks("python", "import", "from"))
def test_python(server: Server, block: str, tmp_path: Path) -> None:
    """As a user runs it: a message is typed where it asks for one, then the input ends."""
    path = tmp_path / "example.py"
    path.write_text(block.replace(DOCUMENTED_URL, server.url))
    result = subprocess.run(
        [sys.executable, "-u", str(path)],
        input="Say hello.\n",  # one: the reply may be long enough to fill the context
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "input(" in block:
        assert "EOFError" in result.stderr, result.stderr
        assert result.stdout.count("> ") >= 2
        assert len(result.stdout) > 20
    else:
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.strip()) > 5


@pytest.mark.parametrize("block", blocks("bash", "python3 start.py", "pip install"))
def test_commands_are_understood(block: str, tmp_path: Path) -> None:
    """Installing is what CI and test_start.py do; here the flags and the files that are named."""
    for line in block.strip().splitlines():
        words = shlex.split(line)
        for word in words:
            if word.endswith(".txt"):
                assert (PROJECT_ROOT / word).is_file()
        if "server.py" in words or words[:2] == ["python3", "start.py"]:
            assert (PROJECT_ROOT / words[1]).is_file()
            verb = words[2:3] in (["test"], ["install"])
            if words[2:3] == ["download"]:
                assert parse_model(words[3])
                continue
            load_settings(words[3 if verb else 2 :], {}, tmp_path)


@pytest.mark.parametrize("block", blocks("bash", "export"))
def test_exports(block: str) -> None:
    script = f'{block}\ntest -n "$OPENAI_BASE_URL$OPENAI_API_KEY"'
    subprocess.run(["bash", "-euc", script], check=True)


@pytest.mark.parametrize("block", blocks("yaml", "name:"))
def test_characters(block: str) -> None:
    character = to_character(yaml.safe_load(block))
    assert character.name and character.context and character.greeting


@pytest.mark.parametrize("block", blocks("yaml", "api_port"))
def test_settings(block: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(block)
    settings = load_settings([], {}, tmp_path)
    assert settings.warnings == ()
    assert yaml.safe_load(block)["api_port"] == settings.api_port
