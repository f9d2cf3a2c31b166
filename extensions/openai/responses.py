"""Builders of OpenAI's response objects, as plain dicts in OpenAI's order of keys."""

import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modules.batch_store import Batch
from modules.file_store import StoredFile

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of one answer, or the whole answer, share."""

    id: str
    created: int
    model: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A whole choice, as an answer in one piece carries it."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: Json | None = None


@dataclass(frozen=True, slots=True)
class ListedModel:
    id: str
    kind: str
    created: int = 0
    """When its newest file was changed; 0 where nothing is known of files."""
    is_loaded: bool = False
    context_length: int | None = None
    accepts_images: bool = False
    alias_of: str | None = None
    """The model that a request with this name gets."""


def build_envelope(prefix: str, model: str) -> Envelope:
    return Envelope(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)


def build_usage(num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int) -> Json:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def build_embedding_usage(num_tokens: int, num_truncated: int) -> Json:
    """Of texts that were only read; `truncated_inputs` is there if any was."""
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {**usage, "truncated_inputs": num_truncated} if num_truncated else usage


def build_usage_chunk(envelope: Envelope, object_name: str, usage: Json) -> Json:
    return {**_build_object(envelope, object_name, []), "usage": usage}


def build_chat_completion(envelope: Envelope, choices: Iterable[Choice], usage: Json) -> Json:
    wire_choices = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    return {**_build_object(envelope, "chat.completion", wire_choices), "usage": usage}


def build_chat_chunk(
    envelope: Envelope,
    index: int,
    delta: Json,
    finish_reason: str | None = None,
    logprobs: Json | None = None,
) -> Json:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return _build_object(envelope, "chat.completion.chunk", [choice])


def build_text_completion(envelope: Envelope, choices: Iterable[Choice], usage: Json) -> Json:
    wire_choices = [
        _build_text_choice(choice.index, choice.text, choice.finish_reason, choice.logprobs)
        for choice in choices
    ]
    return {**_build_object(envelope, "text_completion", wire_choices), "usage": usage}


def build_text_chunk(
    envelope: Envelope,
    index: int,
    text: str,
    finish_reason: str | None = None,
    logprobs: Json | None = None,
) -> Json:
    choice = _build_text_choice(index, text, finish_reason, logprobs)
    return _build_object(envelope, "text_completion", [choice])


def build_model(model: ListedModel) -> Json:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "user",
        "loaded": model.is_loaded,
        "kind": model.kind,
        "context_length": model.context_length,
        "accepts_images": model.accepts_images,
        "alias_of": model.alias_of,
    }


def build_model_list(models: Iterable[ListedModel]) -> Json:
    return {"object": "list", "data": [build_model(model) for model in models]}


def build_file(file: StoredFile) -> Json:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def build_deleted_file(file_id: str) -> Json:
    return {"id": file_id, "object": "file", "deleted": True}


# Statuses of a batch in OpenAI's order; of each, the time at which it was reached is told.
BATCH_STATUSES = (
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
)


def build_batch(batch: Batch) -> Json:
    faults = [
        {"code": f.code, "line": f.line, "message": f.message, "param": f.param}
        for f in batch.faults
    ]
    counts = {
        "total": batch.num_total,
        "completed": batch.num_completed,
        "failed": batch.num_failed,
    }
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": faults} if faults else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{status}_at": batch.times.get(status) for status in BATCH_STATUSES},
        "request_counts": counts,
        "usage": _build_batch_usage(batch),
        "metadata": batch.metadata,
    }


def _build_batch_usage(batch: Batch) -> Json:
    tokens = batch.tokens
    return {
        "input_tokens": tokens.num_input_tokens,
        "input_tokens_details": {"cached_tokens": tokens.num_cached_tokens},
        "output_tokens": tokens.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens.num_input_tokens + tokens.num_output_tokens,
    }


def build_page(items: list[Json], has_more: bool) -> Json:
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def build_load_event(stage: str, fraction: float | None) -> Json:
    return {"object": "model.load", "stage": stage, "fraction": fraction}


def build_engine(engine_id: str, is_ready: bool) -> Json:
    return {"id": engine_id, "object": "engine", "owner": "user", "ready": is_ready}


def build_engine_list(is_ready: Mapping[str, bool]) -> Json:
    """Of each engine whether it is loaded → their list."""
    return {"object": "list", "data": [build_engine(*entry) for entry in is_ready.items()]}


def build_image(image: Json, revised_prompt: str | None) -> Json:
    """`image` is its `url` or its `b64_json`."""
    return image if revised_prompt is None else {**image, "revised_prompt": revised_prompt}


def build_image_list(images: list[Json], output_format: str, size: str) -> Json:
    return {
        "created": int(time.time()),
        "background": "opaque",
        "data": images,
        "output_format": output_format,
        "size": size,
    }


def build_image_event(
    event_type: str, image: Any, output_format: str, size: str, quality: str, own: Json
) -> Json:
    """`own` is what only events of this type have."""
    return {
        "type": event_type,
        "b64_json": image,
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": output_format,
        "quality": quality,
        "size": size,
        **own,
    }


def build_image_usage() -> Json:
    """Images are not made of tokens here; OpenAI's type wants numbers."""
    return {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 0,
    }


def _build_object(envelope: Envelope, object_name: str, choices: list[Json]) -> Json:
    return {
        "id": envelope.id,
        "object": object_name,
        "created": envelope.created,
        "model": envelope.model,
        "choices": choices,
    }


def _build_text_choice(
    index: int, text: str, finish_reason: str | None, logprobs: Json | None
) -> Json:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}
