"""/v1/internal/model/*: which models there are, loading one, and letting them go.

What a request may say of how a model is loaded is checked here; how it is done, and what becomes of
those that are loaded, is `modules.models`' business.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from extensions.openai.chat_prompts import check_settings
from extensions.openai.docs import describe_load
from extensions.openai.responses import Json, build_load_event
from extensions.openai.streaming import DONE, JsonAnswer, send_events, send_json
from extensions.openai.typing import ModelLoadRequest, ModelNames, ModelUnloadRequest
from modules.context import Context
from modules.errors import InvalidRequestError, SettingsError, UnfitSettingError
from modules.instruction_templates import choose_template
from modules.load_progress import LoadProgress, LoadStage, Report, report_nothing
from modules.settings import (
    CHAT,
    PROJECT_ROOT,
    SETTINGS,
    Setting,
    Settings,
    convert,
    explain_unknown,
)

# Of the settings those that concern one model and open no door: no code of strangers, no paths.
ARGS: dict[str, Setting] = {
    row.name: row
    for row in SETTINGS
    if row.name
    in (
        "cpu",
        "deterministic",
        "device_map",
        "dtype",
        "kv_cache_memory",
        "lora",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
    )
}
# `load_in_8bit: true` means `dtype: int8`.
SWITCHES: dict[str, str] = {
    flag.removeprefix("--").replace("-", "_"): dtype
    for flag, dtype in ARGS["dtype"].aliases.items()
}
CHAT_SETTINGS: dict[str, Setting] = {
    **{row.key: row for row in SETTINGS if row.key and row.group == CHAT},
    "truncation_length": ARGS["max_model_len"],
}
# What a request may say, as errors call it, and the name of the setting that it is.
FIELDS: dict[str, str] = {
    **{f"args.{name}": name for name in ARGS},
    **{f"args.{switch}": "dtype" for switch in SWITCHES},
    **{f"settings.{key}": row.name for key, row in CHAT_SETTINGS.items()},
}


def add_admin_routes(router: APIRouter, context: Context) -> None:
    @router.get("/v1/internal/model/list", tags=["Models"], responses={200: {"model": ModelNames}})
    async def list_model_names() -> Response:
        """What can be loaded: the models on this machine, but for those in the hub's cache."""
        models = context.models
        loaded = (model.name for model in models.loaded)
        asleep = (model.name for model in models.asleep)
        names = [*loaded, *asleep, *models.list_names()]
        return JSONResponse({"model_names": list(dict.fromkeys(names))})

    @router.post("/v1/internal/model/load", tags=["Models"], responses=describe_load())
    async def load_model(request: Request, body: ModelLoadRequest) -> Response:
        """Load a model, which then answers where none is named. The others make room for it if
        there are more than may be loaded; if it cannot be loaded, they stay.
        """
        overrides = await asyncio.to_thread(read_overrides, body, context.settings)
        if body.stream:
            events = _load_and_tell(context, body, overrides)
            return send_events(events, context.settings, end=DONE)
        work = _load_and_answer(context, body, overrides)
        return await send_json(work, request, context.settings)

    @router.post("/v1/internal/model/unload", tags=["Models"])
    async def unload_model(body: ModelUnloadRequest | None = None) -> Response:
        """Let a model go, or all; what they are generating ends with an error."""
        await context.models.unload(body.model_name if body else None)
        return JSONResponse("OK")


async def _load_and_answer(
    context: Context, body: ModelLoadRequest, overrides: Mapping[str, Any]
) -> JsonAnswer:
    await _load(context, body, overrides, report_nothing)
    return JsonAnswer(b'"OK"')


async def _load(
    context: Context, body: ModelLoadRequest, overrides: Mapping[str, Any], report: Report
) -> None:
    """Raises InvalidRequestError where the model cannot be had as the request wants it, and what
    `ModelManager.load` raises.
    """
    try:
        await context.models.load(body.model_name, overrides, report)
    except UnfitSettingError as error:
        if field := _find_field(body, error.settings):
            raise _refuse(field, str(error).rstrip(".")) from error
        raise  # the server's own settings are at fault


def _find_field(body: ModelLoadRequest, settings: Sequence[str]) -> str | None:
    """What the request calls the first of these settings that it has."""
    given = {f"args.{name}": value for name, value in body.args.items()}
    given |= {f"settings.{key}": value for key, value in body.settings.items()}
    fields = {FIELDS[field]: field for field, value in given.items() if value}
    return next((fields[name] for name in settings if name in fields), None)


async def _load_and_tell(
    context: Context, body: ModelLoadRequest, overrides: Mapping[str, Any]
) -> AsyncGenerator[Json, None]:
    """A client that leaves ends the telling, not the loading."""
    told: asyncio.Queue[LoadProgress | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(progress: LoadProgress) -> None:
        loop.call_soon_threadsafe(told.put_nowait, progress)

    load = asyncio.create_task(_load(context, body, overrides, tell))
    load.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (progress := await told.get()) is not None:
            yield build_load_event(progress.stage, progress.fraction)
        await load
    finally:
        load.cancel()
    yield build_load_event(LoadStage.READY, None)


# What a request says


def read_overrides(body: ModelLoadRequest, settings: Settings) -> dict[str, Any]:
    """The settings that the request changes, by name. Reads files.

    Raises InvalidRequestError, which names what is unknown or wrong.
    """
    args = _convert(_read_switches(body.args, settings), ARGS, "args")
    chat = _convert(body.settings, CHAT_SETTINGS, "settings")
    if args.keys() & chat.keys():
        reason = "it is max_model_len, which args give too"
        raise _refuse("settings.truncation_length", reason)
    overrides = {**args, **chat}
    _try_out(replace(settings, **overrides), body.model_name)
    return overrides


def _read_switches(args: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """`args` with a `dtype` in place of the switches that mean one."""
    plain = {name: value for name, value in args.items() if name not in SWITCHES}
    for switch, dtype in SWITCHES.items():
        is_on = args.get(switch)
        if not isinstance(is_on, bool | None):
            raise _refuse(f"args.{switch}", f"expected true or false, not {is_on!r}")
        if is_on and plain.get("dtype") not in (None, dtype):
            raise _refuse(f"args.{switch}", f"it is dtype {dtype}, and another one is given too")
        if is_on:
            plain["dtype"] = dtype
        elif is_on is False and settings.dtype == dtype:
            plain.setdefault("dtype", "auto")
    return plain


def _convert(values: Mapping[str, Any], rows: Mapping[str, Setting], param: str) -> dict[str, Any]:
    """By the names of the settings; null is what the server was started with."""
    converted = {}
    for name, value in values.items():
        field = f"{param}.{name[:100]}"
        if name not in rows:
            raise _refuse(field, _explain(name, rows))
        if value is None:
            continue
        try:
            converted[rows[name].name] = convert(rows[name], value, name, PROJECT_ROOT)
        except SettingsError as error:
            raise _refuse(field, str(error).removeprefix(f"{name}: ")) from error
    return converted


def _explain(name: str, rows: Mapping[str, Setting]) -> str:
    if any(name in (row.name, row.key) for row in SETTINGS):
        return f"{name} is not of these, but may be set when the server is started"
    return explain_unknown(name[:100], (*rows, *SWITCHES) if rows is ARGS else rows)


def _refuse(param: str, reason: str) -> InvalidRequestError:
    end = "" if reason.endswith("?") else "."
    return InvalidRequestError(f"Invalid value for '{param}': {reason}{end}", param)


def _try_out(settings: Settings, model_name: str) -> None:
    """What would else be noticed when the model is loaded, or by each chat."""
    try:
        check_settings(settings)
        if settings.instruction_template or settings.instruction_template_str:
            choose_template(
                root=PROJECT_ROOT,
                model_name=model_name,
                settings_name=settings.instruction_template,
                settings_text=settings.instruction_template_str,
            )
    except SettingsError as error:
        raise _refuse("settings", str(error)) from error
    except InvalidRequestError as error:
        raise _refuse("settings", str(error).rstrip(".")) from error
