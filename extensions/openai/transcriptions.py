"""POST /v1/audio/transcriptions and /translations: a recording → its text, in five formats."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from extensions.openai.responses import Json
from extensions.openai.streaming import (
    CLIENT_CLOSED_REQUEST,
    Chunks,
    run_while_connected,
    send_events,
)
from extensions.openai.subtitles import to_srt, to_vtt
from extensions.openai.typing import (
    AudioOptions,
    Transcription,
    TranscriptionRequest,
    Translation,
    TranslationRequest,
    VoiceActivityDetection,
)
from modules.context import Context
from modules.transcription import Segment, Transcript
from modules.whisper_models import Hearing, VoiceDetection

logger = logging.getLogger(__name__)


def add_routes(router: APIRouter, context: Context) -> None:
    @router.post("/v1/audio/transcriptions", tags=["Audio"], responses=_describe(Transcription))
    async def create_transcription(
        body: Annotated[TranscriptionRequest, Form()], request: Request
    ) -> Response:
        """The text of what is spoken in a recording."""
        hearing = Hearing(
            body.language,
            prompt=body.prompt,
            temperature=body.temperature,
            word_timestamps="word" in body.timestamp_granularities,
            detection=_to_detection(body.chunking_strategy),
        )
        return await _answer(context, body, hearing, request)

    @router.post("/v1/audio/translations", tags=["Audio"], responses=_describe(Translation))
    async def create_translation(
        body: Annotated[TranslationRequest, Form()], request: Request
    ) -> Response:
        """The English text of what is spoken in a recording."""
        hearing = Hearing(translates=True, prompt=body.prompt, temperature=body.temperature)
        return await _answer(context, body, hearing, request)


async def _answer(
    context: Context, body: AudioOptions, hearing: Hearing, request: Request
) -> Response:
    opening = context.transcriber.transcribe(await body.file.read(), body.model, hearing)
    transcript = await run_while_connected(opening, request.receive)
    if transcript is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    chunks = _to_chunks(transcript.segments)
    if isinstance(body, TranscriptionRequest) and body.stream:
        return send_events(_to_events(chunks), context.settings)
    heard = await run_while_connected(_collect(chunks), request.receive)
    if heard is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    answer = _build_answer(body, transcript, heard)
    if context.settings.debug:
        logger.warning("Reply: %s", bytes(answer.body).decode())
    return answer


def _to_detection(strategy: str | VoiceActivityDetection | None) -> VoiceDetection | None:
    if isinstance(strategy, VoiceActivityDetection):
        return VoiceDetection(
            strategy.threshold, strategy.silence_duration_ms, strategy.prefix_padding_ms
        )
    return VoiceDetection() if strategy == "auto" else None


def _describe(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    content: Json = {"text/plain": {"schema": {"type": "string"}}}
    if model is Transcription:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    description = "The text; with `response_format` text, srt and vtt not as JSON."
    return {200: {"model": model, "description": description, "content": content}}


# What was heard, segment by segment


async def _to_chunks(segments: AsyncGenerator[Segment, None]) -> Chunks:
    """OpenAI's segments, each with its words, and the text as it was heard."""
    async with aclosing(segments):
        async for segment in segments:
            yield {
                "id": segment.index,
                "seek": segment.seek,
                "start": segment.start,
                "end": segment.end,
                "text": segment.text,
                "tokens": list(segment.token_ids),
                "temperature": segment.temperature,
                "avg_logprob": segment.avg_logprob,
                "compression_ratio": segment.compression_ratio,
                "no_speech_prob": segment.no_speech_prob,
                "words": [
                    {"word": word.text.strip(), "start": word.start, "end": word.end}
                    for word in segment.words
                ],
            }


async def _collect(chunks: Chunks) -> list[Json]:
    async with aclosing(chunks):
        return [chunk async for chunk in chunks]


async def _to_events(chunks: Chunks) -> Chunks:
    text = ""
    async with aclosing(chunks):
        async for chunk in chunks:
            delta = chunk["text"] if text else chunk["text"].lstrip()
            text += delta
            yield {"type": "transcript.text.delta", "delta": delta}
    yield {"type": "transcript.text.done", "text": text}


# Answers in one piece


def _build_answer(body: AudioOptions, transcript: Transcript, heard: list[Json]) -> Response:
    match body.response_format:
        case "text":
            return PlainTextResponse(f"{_join(heard)}\n")
        case "srt":
            return PlainTextResponse(to_srt(heard))
        case "vtt":
            return PlainTextResponse(to_vtt(heard))
    if isinstance(body, TranscriptionRequest):
        return JSONResponse(_build_transcription(body, transcript, heard))
    return JSONResponse(_build_translation(body, transcript, heard))


def _build_transcription(
    body: TranscriptionRequest, transcript: Transcript, heard: list[Json]
) -> Json:
    usage = {"type": "duration", "seconds": transcript.duration}
    if body.response_format == "json":
        return {"text": _join(heard), "usage": usage}
    answer = _build_verbose("transcribe", transcript, heard)
    if "segment" in body.timestamp_granularities:
        answer["segments"] = _to_segments(heard)
    if "word" in body.timestamp_granularities:
        answer["words"] = [word for chunk in heard for word in chunk["words"]]
    return {**answer, "usage": usage}


def _build_translation(body: AudioOptions, transcript: Transcript, heard: list[Json]) -> Json:
    if body.response_format == "json":
        return {"text": _join(heard)}
    return {**_build_verbose("translate", transcript, heard), "segments": _to_segments(heard)}


def _build_verbose(task: str, transcript: Transcript, heard: list[Json]) -> Json:
    return {
        "task": task,
        "language": transcript.language,
        "duration": transcript.duration,
        "text": _join(heard),
    }


def _to_segments(heard: list[Json]) -> list[Json]:
    return [{name: value for name, value in chunk.items() if name != "words"} for chunk in heard]


def _join(heard: list[Json]) -> str:
    text: str = "".join(chunk["text"] for chunk in heard)
    return text.strip()
