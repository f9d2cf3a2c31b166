"""Moderations of the real server, with the bundled embedding model and OpenAI's own client."""

from __future__ import annotations

import openai
import pytest
from openai.types import ModerationCreateResponse

from tests.server.conftest import Server

pytestmark = pytest.mark.server


@pytest.fixture
def api(server: Server) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, timeout=240)


def test_texts_are_judged(api: openai.OpenAI) -> None:
    texts = ["I will kill you.", "How do I kill a process?", "I want to end my life."]
    answer = api.moderations.create(input=texts, model="omni-moderation-latest")
    ModerationCreateResponse.model_validate(answer.to_dict(), strict=True)
    threat, harmless, intent = answer.results
    assert answer.model == "all-MiniLM-L6-v2"
    assert threat.categories.harassment
    assert threat.categories.harassment_threatening
    assert not threat.categories.sexual
    assert intent.categories.self_harm
    assert intent.categories.self_harm_intent
    assert harmless.flagged is False


def test_nothing_of_a_text_is_printed(api: openai.OpenAI, server: Server) -> None:
    api.moderations.create(input="I will kill you, Rumpelstiltskin.")
    assert "Rumpelstiltskin" not in server.output
    assert "harassment" not in server.output
