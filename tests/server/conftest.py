"""The real server process, on a free port, with the bundled model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from modules.settings import PROJECT_ROOT
from tests.conftest import run_server
from tests.stable_diffusion import WebUi

# A reply without `max_tokens` ends here: a small model may go on and on, and a test with it.
MAX_MODEL_LEN = 512
START_TIMEOUT = 240.0
"""Seconds: the first start converts the bundled model."""
URL = re.compile(r"OpenAI compatible API: (\S+)/v1")


class Server:
    """`server.py` as a process; its output is read all the time."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None, cwd: Path | None = None):
        self.lines: list[str] = []
        self.url = ""
        self.process = subprocess.Popen(
            [sys.executable, str(PROJECT_ROOT / "server.py"), "--api-port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self) -> Server:
        deadline = time.monotonic() + START_TIMEOUT
        while not self.url:
            assert self.process.poll() is None, f"the server died:\n{self.output}"
            assert time.monotonic() < deadline, f"the server is not ready:\n{self.output}"
            time.sleep(0.05)
        return self

    def wait_until_dead(self) -> int:
        """The exit code; all output is in `output` then."""
        code = self.process.wait(START_TIMEOUT)
        self._reader.join(10)
        return code

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := URL.search(line):
                self.url = found[1]


@pytest.fixture(scope="session")
def server(web_ui_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The settings that a user has, but for the context length and the place of files."""
    flags = ("--max-model-len", str(MAX_MODEL_LEN), "--user-data-dir")
    env = {"SD_WEBUI_URL": web_ui_url}
    server = Server("--api", *flags, str(tmp_path_factory.mktemp("user_data")), env=env)
    server.wait_until_ready()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def web_ui_url() -> Iterator[str]:
    """For the images: what the user runs beside the server."""
    with run_server(WebUi().build_app()) as web_ui:
        yield web_ui.url


@pytest.fixture
def start_server() -> Iterator[type[Server]]:
    """Starts servers with other flags; each is ended with the test."""
    started: list[Server] = []

    class Tracked(Server):
        def __init__(self, *flags: str, **options: object) -> None:
            super().__init__(*flags, **options)  # type: ignore[arg-type]
            started.append(self)

    yield Tracked
    for server in started:
        server.stop()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
