"""POST /v1/internal/logits: what a model would say next, and how sure it is."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from dataclasses import replace

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from extensions.openai.leases import depend_on_lease
from extensions.openai.sampling import (
    fill_from_preset,
    to_negative_prompt,
    to_sampling_params,
    to_truncation,
)
from extensions.openai.typing import LogitsRequest, NextTokens
from modules import text_generation
from modules.context import Context
from modules.engine.sampling_params import SamplingParams
from modules.errors import InvalidRequestError
from modules.loaded_model import LoadedModel
from modules.models import ModelLease
from modules.settings import PROJECT_ROOT
from modules.text_generation import TextRequest


def add_routes(router: APIRouter, context: Context) -> None:
    leased = depend_on_lease(context)

    @router.post("/v1/internal/logits", tags=["Internal"], responses={200: {"model": NextTokens}})
    async def get_logits(body: LogitsRequest, lease: ModelLease = leased) -> Response:
        """The likeliest next tokens of a prompt and their probabilities, the likeliest first."""
        model = await lease.get(body.model, body.lora)
        body = await asyncio.to_thread(fill_from_preset, body, PROJECT_ROOT)
        if body.top_logits > model.vocab_size:
            message = f"The model has only {model.vocab_size} tokens."
            raise InvalidRequestError(message, "top_logits")
        request = await asyncio.to_thread(_to_text_request, model, body)
        return JSONResponse(await _compute_probabilities(model, request))


def _to_text_request(model: LoadedModel, body: LogitsRequest) -> TextRequest:
    return TextRequest(
        prompts=(body.prompt,),
        params=_to_sampling_params(model, body),
        negative_prompt=to_negative_prompt(body) if body.use_samplers else None,
        add_bos_token=body.add_bos_token,
        min_len=body.min_length,
        truncation=to_truncation(body, model, 1),
    )


def _to_sampling_params(model: LoadedModel, body: LogitsRequest) -> SamplingParams:
    """For one token. Without the samplers, how it is chosen makes no difference."""
    if not body.use_samplers:
        return SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=body.top_logits)
    params = to_sampling_params(body, model, max_tokens=1, num_logprobs=body.top_logits)
    return replace(params, processed_logprobs=True)


async def _compute_probabilities(model: LoadedModel, request: TextRequest) -> dict[str, float]:
    """By the spelling of tokens; of two that are spelled the same, the likelier."""
    generation = await text_generation.generate(model, request)
    probabilities: dict[str, float] = {}
    async with aclosing(generation.deltas) as deltas:
        async for delta in deltas:
            for token_id, logprob in delta.outputs[0].top_logprobs:
                probabilities.setdefault(model.vocabulary.piece(token_id), math.exp(logprob))
    return probabilities
