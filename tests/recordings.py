"""Recordings for tests: spoken by the bundled voice, once per text and format; and plain tones."""

from __future__ import annotations

import asyncio
import difflib
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numpy.typing import NDArray

from modules.audio_files import SPEAKING_RATE, AudioEncoder
from modules.settings import Settings
from modules.speech import SpeechRequest, SpeechSynthesizer

SENTENCES = (
    "The weather is nice today.",
    "My sister bought some apples at the market.",
    "We will walk home along the river.",
)
TEXT = " ".join(SENTENCES)
# Of the words of TEXT, those that a transcript must have in this order.
SIMILARITY = 0.85


@cache
def speak(text: str = TEXT, format: str = "wav", speed: float = 1) -> bytes:
    async def run() -> bytes:
        request = SpeechRequest(text, "alloy", speed, format)
        pieces = await SpeechSynthesizer(Settings()).speak(request)
        return b"".join([piece.audio async for piece in pieces])

    with ThreadPoolExecutor(1) as thread:  # tests have an event loop of their own
        return thread.submit(asyncio.run, run()).result()


def make_tone(seconds: float, hertz: float = 440) -> NDArray[np.float32]:
    """Of SPEAKING_RATE."""
    times = np.arange(int(seconds * SPEAKING_RATE)) / SPEAKING_RATE
    return (0.5 * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def encode(samples: NDArray[np.float32], format: str = "wav") -> bytes:
    encoder = AudioEncoder(format, SPEAKING_RATE)
    return encoder.encode(samples) + encoder.finish()


def is_like(heard: str, spoken: str = TEXT) -> bool:
    words = [re.findall(r"[a-z']+", text.lower()) for text in (heard, spoken)]
    return difflib.SequenceMatcher(None, *words, autojunk=False).ratio() >= SIMILARITY
