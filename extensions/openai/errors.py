"""Exceptions → OpenAI's error object: one table and one builder, for responses and streams."""

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from modules.errors import (
    AdapterNotFoundError,
    BackendError,
    CapabilityError,
    ContextLengthExceededError,
    EngineDeadError,
    GenerationAbortedError,
    GenerationFailedError,
    HookError,
    InvalidRequestError,
    MissingPackageError,
    ModelLoadError,
    ModelNotFoundError,
    NoModelLoadedError,
    NotConfiguredError,
    NotSupportedError,
    ObjectNotFoundError,
    StorageFullError,
)

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    status: int
    code: str | None = None

    @property
    def type(self) -> str:
        return SERVER_ERROR if self.status >= 500 else INVALID_REQUEST


INTERNAL_ERROR = ErrorKind(500, "internal_error")
INTERNAL_MESSAGE = "The server had an error while processing your request."

# Looked up along the exception's MRO.
ERROR_KINDS: dict[type[Exception], ErrorKind] = {
    InvalidRequestError: ErrorKind(400),
    # Not 501: clients would try again.
    NotSupportedError: ErrorKind(400, "not_supported"),
    ObjectNotFoundError: ErrorKind(404),
    AdapterNotFoundError: ErrorKind(404, "model_not_found"),
    StorageFullError: ErrorKind(413, "storage_quota_exceeded"),
    ContextLengthExceededError: ErrorKind(400, "context_length_exceeded"),
    ModelNotFoundError: ErrorKind(404, "model_not_found"),
    ModelLoadError: ErrorKind(500, "model_load_failed"),
    NoModelLoadedError: ErrorKind(503, "no_model_loaded"),
    CapabilityError: ErrorKind(503, "unavailable"),
    MissingPackageError: ErrorKind(503, "package_missing"),
    NotConfiguredError: ErrorKind(503, "not_configured"),
    BackendError: ErrorKind(503, "backend_unavailable"),
    EngineDeadError: ErrorKind(503, "engine_dead"),
    GenerationFailedError: ErrorKind(500, "generation_failed"),
    GenerationAbortedError: ErrorKind(503, "generation_aborted"),
    HookError: ErrorKind(500, "extension_failed"),
}

HTTP_CODES: dict[int, str] = {
    401: "invalid_api_key",
    404: "unknown_url",
    405: "method_not_supported",
    410: "endpoint_removed",
    413: "request_too_large",
}

# Where pydantic's own words are about Python: its type of error → ours, in JSON's words.
VALIDATION_MESSAGES: dict[str, str] = {
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "list_type": "Input should be a list",
    "string_type": "Input should be a string",
    "bool_type": "Input should be true or false",
    "int_type": "Input should be an integer",
    "int_from_float": "Input should be an integer",
    "float_type": "Input should be a number",
    # Of fields of forms, which all are text:
    "bool_parsing": "Input should be true or false",
    "int_parsing": "Input should be an integer",
    "float_parsing": "Input should be a number",
    "value_error": "Input should be a file",  # UploadFile's; our own checks have types of their own
}


def add_error_handlers(app: FastAPI) -> None:
    """What is in no table here is an internal error: middleware.InternalErrorMiddleware's."""
    for cls in ERROR_KINDS:
        app.add_exception_handler(cls, _handle_error)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(HTTPException, _handle_http_error)


def build_error(kind: ErrorKind, message: str, param: str | None = None) -> dict[str, Any]:
    return {
        "error": {"message": message, "type": kind.type, "param": param, "code": kind.code},
    }


def to_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an error of the table. Raises KeyError for any other."""
    kind = next(ERROR_KINDS[cls] for cls in type(error).__mro__ if cls in ERROR_KINDS)
    param = error.param if isinstance(error, InvalidRequestError) else None
    return kind.status, build_error(kind, str(error), param)


def to_internal_error(error: Exception, debug: bool) -> tuple[int, dict[str, Any]]:
    """Status and body for any other error, which is logged here.

    Neither the client nor the log gets its text, which may quote a prompt: the log gets its type
    and the lines of code that it passed.
    """
    frames = reversed(traceback.extract_tb(error.__traceback__))
    trail = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
    logger.error("Internal error: %s%s", type(error).__name__, trail)
    if debug:
        logger.error("In full, as OPENEDAI_DEBUG asks for:", exc_info=error)
    return INTERNAL_ERROR.status, build_error(INTERNAL_ERROR, INTERNAL_MESSAGE)


async def _handle_error(request: Request, error: Exception) -> JSONResponse:
    status, body = to_error(error)
    return JSONResponse(body, status)


async def _handle_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    status, body = to_validation_error(error.errors()[0]["loc"][1:], error.errors()[0])
    return JSONResponse(body, status)


def to_validation_error(
    path: tuple[str | int, ...], detail: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Status and body for what pydantic says of the field at `path` in a body."""
    message, param = _describe_validation_error(path, detail)
    return 400, build_error(ErrorKind(400), message, param)


def _describe_validation_error(
    path: tuple[str | int, ...], detail: Mapping[str, Any]
) -> tuple[str, str | None]:
    if detail["type"] == "json_invalid":
        return f"The body is not valid JSON: {detail['ctx']['error']}.", None
    param = _to_param(path)
    if param is None:
        return "The body should be a JSON object.", None
    if detail["type"] == "missing":
        return f"Missing required parameter: '{param}'.", param
    message = VALIDATION_MESSAGES.get(detail["type"], detail["msg"])
    return f"Invalid value for '{param}': {message}.", param


def _to_param(path: tuple[str | int, ...]) -> str | None:
    """("messages", 0, "role") → messages[0].role"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or None


async def _handle_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = ErrorKind(error.status_code, HTTP_CODES.get(error.status_code))
    body = build_error(kind, _describe_http_error(request, error))
    return JSONResponse(body, error.status_code, error.headers)


def _describe_http_error(request: Request, error: HTTPException) -> str:
    call = f"{request.method} {request.url.path}"
    match error.status_code, error.detail:
        case 404, "Not Found":
            return f"Invalid URL ({call})"
        case 405, "Method Not Allowed":
            allowed = (error.headers or {}).get("Allow", "")
            return f"Method not allowed ({call}). Allowed: {allowed}"
    return str(error.detail)
