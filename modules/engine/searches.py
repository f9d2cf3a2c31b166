"""Which search there is for which options."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from modules.engine.beam_search import BeamOptions, search_beams
from modules.engine.continuations import Generate
from modules.engine.contrastive_search import ContrastiveOptions, search_contrastively
from modules.engine.outputs import TokenOutput
from modules.engine.sequence import SequenceRequest

SearchOptions = BeamOptions | ContrastiveOptions


def search(
    generate: Generate,
    requests: list[SequenceRequest],
    options: SearchOptions,
    eos_token_ids: frozenset[int],
) -> AsyncGenerator[list[TokenOutput], None]:
    """The outputs of `requests`, the choices for one prompt: they differ in their ids and seeds.

    Their `max_tokens` must be given. Raises GenerationFailedError and GenerationAbortedError.
    """
    if isinstance(options, BeamOptions):
        return search_beams(generate, requests, options, eos_token_ids)
    return _repeat(search_contrastively(generate, requests[0], options, eos_token_ids), requests)


async def _repeat(
    steps: AsyncGenerator[list[TokenOutput], None], requests: list[SequenceRequest]
) -> AsyncGenerator[list[TokenOutput], None]:
    """All choices are the same where nothing is drawn."""
    async with aclosing(steps):
        async for outputs in steps:
            yield [
                replace(output, request_id=request.request_id)
                for request in requests
                for output in outputs
            ]
