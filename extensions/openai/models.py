"""GET /v1/models: which models there are, and one of them."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from extensions.openai.responses import ListedModel, build_model, build_model_list
from extensions.openai.typing import Model, ModelList
from modules.context import Context
from modules.loaded_model import LoadedModel
from modules.model_files import ModelEntry, build_entry, find_entry, list_entries
from modules.model_kinds import ModelKind
from modules.models import SleepingModel
from modules.settings import Settings

KINDS = {
    ModelKind.TEXT: "text",
    ModelKind.EMBEDDING: "embedding",
    ModelKind.SCORE: "rerank",
    ModelKind.CLASSIFICATION: "classification",
    ModelKind.TRANSCRIPTION: "transcription",
    ModelKind.VOICE: "voice",
    ModelKind.IMAGE: "image",
}
# Names that clients have built in; a request for one is answered by a model of that kind.
COMPATIBILITY_NAMES = {"gpt-3.5-turbo": "text", "text-embedding-ada-002": "embedding"}


def add_routes(router: APIRouter, context: Context) -> None:
    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", tags=["Models"], responses={200: {"model": ModelList}})
    async def get_models() -> Response:
        """What is loaded, then what can be loaded, then the names that stand for one of them."""
        return JSONResponse(build_model_list(await list_models(context)))

    @router.head("/v1/models/{model_id:path}", include_in_schema=False)
    @router.get("/v1/models/{model_id:path}", tags=["Models"], responses={200: {"model": Model}})
    async def get_model(model_id: str) -> Response:
        """A model's entry: whichever is asked for. Who asks another one than those of the list is
        answered by the loaded model.
        """
        models = await list_models(context)
        found = next((model for model in models if model.id == model_id), None)
        return JSONResponse(build_model(found or _name_anew(context, model_id, "text", models)))


async def list_models(context: Context) -> list[ListedModel]:
    """Of all kinds, each once: loaded ones first, then those that sleep, and names that stand for
    others last.
    """
    loaded, asleep = context.models.loaded, context.models.asleep
    texts = await asyncio.to_thread(_list_texts, [*loaded, *asleep])
    known = await asyncio.to_thread(_find_models, context.settings)
    in_memory = _loaded_names(context)
    others = [
        replace(model, is_loaded=in_memory.get(model.kind) == model.id)
        for model in known.values()
        if model.id not in {each.id for each in texts}
    ]
    others.sort(key=lambda model: model.kind != "text")
    models = sorted([*texts, *others], key=lambda model: not model.is_loaded)
    models += _list_aliases(context.settings, models)
    known_ids = {model.id for model in models}
    names = {name: kind for name, kind in COMPATIBILITY_NAMES.items() if name not in known_ids}
    return models + [_name_anew(context, name, kind, models) for name, kind in names.items()]


def _find_models(settings: Settings) -> dict[str, ListedModel]:
    """By id, none of them loaded. Those that the settings name come first of their kind."""
    configured = (_find_configured(name, kind, settings) for kind, name in _configured(settings))
    listed = (_to_listed(entry) for entry in list_entries(settings))
    models: dict[str, ListedModel] = {}
    for model in (*filter(None, configured), *listed):
        models.setdefault(model.id, model)
    return models


def _configured(settings: Settings) -> Iterator[tuple[ModelKind, str]]:
    """Beside voices and images, which are listed anyway."""
    yield ModelKind.EMBEDDING, settings.embedding_model
    yield ModelKind.TRANSCRIPTION, settings.transcription_model
    if settings.rerank_model:
        yield ModelKind.SCORE, settings.rerank_model
    if settings.moderation_model:
        yield ModelKind.CLASSIFICATION, settings.moderation_model


def _find_configured(name: str, kind: ModelKind, settings: Settings) -> ListedModel | None:
    """None: it is a path to nowhere, or would have to be on this machine. Names of the hub are
    listed all the same: the first request fetches their models.
    """
    if entry := find_entry(name, settings, kind):
        return _to_listed(entry)
    is_path = name.startswith((".", "~")) or Path(name).is_absolute()
    return None if is_path or kind is ModelKind.TRANSCRIPTION else ListedModel(name, KINDS[kind])


def _to_listed(entry: ModelEntry) -> ListedModel:
    return ListedModel(
        entry.name,
        KINDS[entry.kind],
        created=entry.modified,
        context_length=entry.context_length,
        accepts_images=entry.accepts_images,
    )


def _list_texts(models: Sequence[LoadedModel | SleepingModel]) -> list[ListedModel]:
    return [listed for model in models for listed in _list_text(model)]


def _list_text(model: LoadedModel | SleepingModel) -> list[ListedModel]:
    """As it is here, or was; then with each of its adapters."""
    listed = replace(
        _to_listed(build_entry(model.name, model.path, ModelKind.TEXT)),
        is_loaded=isinstance(model, LoadedModel),
        context_length=model.max_model_len,
        accepts_images=model.accepts_images,
    )
    adapted = (replace(listed, id=f"{model.name}:{name}") for name in model.adapter_names)
    return [listed, *adapted]


def _loaded_names(context: Context) -> dict[str, str | None]:
    """By kind, as far as there is one in memory."""
    return {
        KINDS[ModelKind.EMBEDDING]: context.embeddings.loaded_name,
        KINDS[ModelKind.SCORE]: context.reranker.loaded_name,
        KINDS[ModelKind.CLASSIFICATION]: context.moderation.loaded_name,
        KINDS[ModelKind.TRANSCRIPTION]: context.transcriber.loaded_name,
        KINDS[ModelKind.VOICE]: context.speech.loaded_name,
        KINDS[ModelKind.IMAGE]: context.images.loaded_name,
    }


def _list_aliases(settings: Settings, models: Sequence[ListedModel]) -> list[ListedModel]:
    """Of a model, or of one with an adapter, which may not be loaded."""
    by_id = {model.id: model for model in models}
    unloaded = {model.id: replace(model, is_loaded=False) for model in models}
    bases = {
        alias: by_id.get(name) or unloaded.get(name.rpartition(":")[0])
        for alias, name in settings.model_aliases.items()
        if alias not in by_id
    }
    return [
        replace(base, id=alias, alias_of=settings.model_aliases[alias])
        for alias, base in bases.items()
        if base is not None
    ]


def _name_anew(
    context: Context, name: str, kind: str, models: Sequence[ListedModel]
) -> ListedModel:
    """As the model that answers who asks for `name`, if there is one: of texts the default, loaded
    or asleep, of other kinds the one of the settings.
    """
    for model in models:
        if model.kind == kind and (kind != "text" or model.id == context.models.default_name):
            return replace(model, id=name, alias_of=model.alias_of or model.id)
    return ListedModel(name, kind)
