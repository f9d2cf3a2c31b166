"""The API with the bundled embedding model, which is loaded once for all tests of a file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI

from modules.context import Context, build_context
from modules.extensions import load_extensions
from modules.settings import Settings
from tests.conftest import connect
from tests.fakes import FakeEngine, FakeModelManager, build_model, build_tokenizer

NAME = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    settings = Settings(extensions=("openai",), embedding_model=NAME)
    manager = FakeModelManager(build_model(FakeEngine(), build_tokenizer()))
    extensions = load_extensions(settings)
    context = build_context(settings, manager, FastAPI(), extensions)
    extensions.set_up(context)
    yield context
    context.embeddings.close()
    context.reranker.close()


@pytest.fixture(scope="module")
def app(context: Context) -> FastAPI:
    return context.app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(app) as client:
        yield client
