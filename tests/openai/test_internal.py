from __future__ import annotations

import httpx
import pytest

from tests.fakes import FakeEngine, FakeModelManager
from tests.openai.assertions import assert_error_shape

pytestmark = pytest.mark.anyio

PATH = "/v1/internal/health"


async def test_health(client: httpx.AsyncClient, manager: FakeModelManager) -> None:
    assert (await client.get(PATH)).json() == {"status": "ok", "model": "tiny"}
    manager.model = None
    assert (await client.get(PATH)).json() == {"status": "ok", "model": None}


async def test_health_of_a_dead_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.is_dead = True
    assert_error_shape(await client.get(PATH), 503, code="engine_dead")
