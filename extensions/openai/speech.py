"""POST /v1/audio/speech: a text as a sound file, sent while it is spoken."""

from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from extensions.openai import typing as wire
from extensions.openai.streaming import (
    CLIENT_CLOSED_REQUEST,
    Chunks,
    run_while_connected,
    send_events,
)
from modules.audio_files import AUDIO_FORMATS
from modules.context import Context
from modules.speech import SpeechPiece, SpeechRequest

Pieces = AsyncGenerator[SpeechPiece, None]

BINARY = {"type": "string", "format": "binary"}
ANSWER = {
    "description": "The file, as it is made; with `stream_format` sse, the same as events.",
    "content": {
        **{kind.media_type: {"schema": BINARY} for kind in AUDIO_FORMATS.values()},
        "text/event-stream": {"schema": {"type": "string"}},
    },
}


def add_routes(router: APIRouter, context: Context) -> None:
    @router.post("/v1/audio/speech", tags=["Audio"], responses={200: ANSWER})
    async def create_speech(body: wire.SpeechRequest, request: Request) -> Response:
        """Speaks a text."""
        opening = context.speech.speak(_to_request(body))
        pieces = await run_while_connected(opening, request.receive)
        if pieces is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if body.stream_format == "sse":
            return send_events(_to_events(pieces), context.settings)
        media_type = AUDIO_FORMATS[body.response_format].media_type
        return StreamingResponse(_to_bytes(pieces), media_type=media_type)


def _to_request(body: wire.SpeechRequest) -> SpeechRequest:
    return SpeechRequest(body.input, body.voice, body.speed, body.response_format)


async def _to_bytes(pieces: Pieces) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.audio:
                yield piece.audio


async def _to_events(pieces: Pieces) -> Chunks:
    num_phonemes = num_frames = 0
    async with aclosing(pieces):
        async for piece in pieces:
            num_phonemes += piece.num_phonemes
            num_frames += piece.num_frames
            if piece.audio:
                audio = b64encode(piece.audio).decode()
                yield {"type": "speech.audio.delta", "audio": audio}
    usage = {
        "input_tokens": num_phonemes,
        "output_tokens": num_frames,
        "total_tokens": num_phonemes + num_frames,
    }
    yield {"type": "speech.audio.done", "usage": usage}
