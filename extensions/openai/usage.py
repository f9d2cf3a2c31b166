"""UsageCounter: the token counts of an answer, from the tokens themselves."""

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing

from extensions.openai.responses import Json, build_usage
from modules.text_generation import Generation, TextDelta


class UsageCounter:
    """Counts what passes through `count`: each prompt once, and every token that was generated."""

    def __init__(self, generation: Generation, num_choices: int) -> None:
        self._generation = generation
        self._num_choices = num_choices  # per prompt
        self._num_completion_tokens = 0
        self._num_cached_tokens: dict[int, int] = defaultdict(int)

    async def count(self) -> AsyncGenerator[TextDelta, None]:
        """The generation's deltas, unchanged."""
        async with aclosing(self._generation.deltas) as deltas:
            async for delta in deltas:
                self._read(delta)
                yield delta

    def build_usage(self) -> Json:
        return build_usage(
            self._generation.num_prompt_tokens,
            self._num_completion_tokens,
            sum(map(self._count_cached, range(len(self._generation.prompt_token_ids)))),
        )

    def _read(self, delta: TextDelta) -> None:
        self._num_completion_tokens += len(delta.outputs)
        for output in delta.outputs:
            cached = self._num_cached_tokens
            cached[delta.index] = max(cached[delta.index], output.num_cached_tokens)

    def _count_cached(self, prompt_index: int) -> int:
        """What no choice of the prompt had to compute: one may find what another has just left."""
        return min(
            (
                num_tokens
                for index, num_tokens in self._num_cached_tokens.items()
                if index // self._num_choices == prompt_index
            ),
            default=0,
        )
