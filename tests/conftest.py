"""The API in the test process: an app over a fake engine, and three ways to call it."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Message

from modules.context import build_context
from modules.extensions import FOLDER, load_extensions
from modules.loaded_model import LoadedModel
from modules.settings import Settings
from tests.fakes import FakeEngine, FakeModelManager, build_model, build_tokenizer

WAIT_SECONDS = 30
# Where a shell has put the tests into the background, the programs that they start would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeApp = Callable[..., FastAPI]
LoadScripts = Callable[..., FastAPI]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def model(engine: FakeEngine, tokenizer: Any) -> LoadedModel:
    return build_model(engine, tokenizer)


@pytest.fixture
def manager(model: LoadedModel) -> FakeModelManager:
    return FakeModelManager(model, ["other", "tiny"])


@pytest.fixture
def make_app(manager: FakeModelManager) -> MakeApp:
    """Builds the app with settings that differ from the defaults, by the door that every extension
    comes in by: `folder` holds them.
    """

    def make(folder: Path = FOLDER, **settings: Any) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None)
        known = Settings(**{"extensions": ("openai",), **settings})
        if manager.model is not None:
            manager.model = replace(manager.model, settings=known)
        extensions = load_extensions(known, folder)
        extensions.set_up(build_context(known, manager, app, extensions))
        return app

    return make


@pytest.fixture
def load(make_app: MakeApp, tmp_path: Path) -> LoadScripts:
    """Builds the app with scripts beside the API, given by name, in that order."""
    api = (FOLDER / "openai" / "script.py").read_text(encoding="utf-8")

    def load(params: dict[str, dict[str, Any]] | None = None, **scripts: str) -> FastAPI:
        for name, text in {**scripts, "openai": api}.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "script.py").write_text(text)
        names = (*scripts, "openai")
        return make_app(tmp_path, extensions=names, extension_params=params or {})

    return load


@pytest.fixture
def app(make_app: MakeApp) -> FastAPI:
    return make_app()


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(app) as client:
        yield client


def connect(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    """A client of the app in this process. Answers arrive whole, streams too."""
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://test", **options)


class AsgiCall:
    """One POST to the app, driven message by message: the only way to leave in the middle."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        self._received.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self._task = asyncio.create_task(app(scope, self._received.get, self._sent.put))

    async def next_message(self) -> Message:
        return await asyncio.wait_for(self._sent.get(), WAIT_SECONDS)

    def disconnect(self) -> None:
        self._received.put_nowait({"type": "http.disconnect"})

    async def wait(self) -> None:
        """Until the app has returned."""
        await asyncio.wait_for(self._task, WAIT_SECONDS)


async def wait_for(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_SECONDS), "it did not happen"


Serve = Callable[[FastAPI], AbstractContextManager[str]]


@pytest.fixture
def serve() -> Serve:
    """Runs an app in a real server in a thread, and gives its URL."""
    return _serve


@contextmanager
def _serve(app: FastAPI) -> Iterator[str]:
    with run_server(app) as server:
        yield server.url


@contextmanager
def run_server(app: FastAPI) -> Iterator[ReadyServer]:
    server = ReadyServer(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert server.ready.wait(WAIT_SECONDS), "the server did not start"
        yield server
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)


class ReadyServer(uvicorn.Server):
    """Says when it is ready, so that nobody has to poll."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()
