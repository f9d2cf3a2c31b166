"""A conversation → the tokens of its prompt; where that is too long, without its oldest turns.

Turns go as a whole, and some more of them than must: a conversation that grows turn by turn then
keeps its beginning for a while, and what was computed for it is used again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from modules.chat import Conversation, Prompt
from modules.engine.image_inputs import ImageInputs
from modules.errors import ContextLengthExceededError, TemplateError
from modules.image_places import find_places, split_at_places
from modules.image_reader import RequestImages
from modules.literal_text import unmark
from modules.loaded_model import LoadedModel
from modules.messages import Message, split_droppable, take_leading_system

# What is dropped reaches up to a multiple of this part of what a prompt may have.
BLOCKS_PER_PROMPT = 4
# By so much may an estimate be wrong: what seems longer than that is not written to be measured.
MAX_GUESS = 1.25


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens a prompt may have."""

    wished: int
    """With more, turns are dropped, as far as there are any."""
    most: int
    """With more, the prompt is refused."""


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    text: str
    token_ids: tuple[int, ...]
    num_dropped_messages: int = 0
    """Of the client's."""
    images: tuple[ImageInputs, ...] = ()
    """Of the messages that are left."""


def fit_prompt(
    conversation: Conversation,
    model: LoadedModel,
    room: Room,
    *,
    drops_turns: bool = True,
    images: RequestImages | None = None,
) -> FittedPrompt:
    """With `images`, their places in the prompt become theirs.

    Raises ContextLengthExceededError where that is not enough, and what `write` raises.
    """
    groups = split_droppable(conversation.messages) if drops_turns else []
    num_chars = sum(len(_read_text(message)) for message in conversation.messages)
    # Nearly every token has a character; if not, it is seen once the prompt is written.
    is_long = groups and num_chars > room.wished
    estimate = _estimate(conversation, model, room, images) if is_long else None
    if estimate is None or estimate.total <= room.wished * MAX_GUESS:
        fitted = _write(conversation, model, room, (), images)
        if len(fitted.token_ids) <= room.wished or not groups:
            return _check(fitted, room)
    estimate = estimate or _estimate(conversation, model, room, images)
    return _check(_shorten(conversation, model, room, groups, estimate, images), room)


@dataclass(frozen=True, slots=True)
class _Estimate:
    """About how many tokens a prompt has."""

    around: float
    """Around all messages."""
    costs: list[float]
    """Of each message, with what is around it."""

    @property
    def total(self) -> float:
        return self.around + sum(self.costs)


def _estimate(
    conversation: Conversation, model: LoadedModel, room: Room, images: RequestImages | None
) -> _Estimate:
    counts = _count(conversation.messages, model, room)
    around, per_message = _measure_template(conversation, model, counts)
    if images is not None:
        counts = _add_images(counts, conversation.messages, images)
    return _Estimate(around, [count + per_message for count in counts])


def _add_images(counts: list[int], messages: Sequence[Message], images: RequestImages) -> list[int]:
    costs = images.count_tokens()
    return [
        count + sum(costs[number] for number in find_places(message["content"]))
        for count, message in zip(counts, messages, strict=True)
    ]


def _count(messages: Sequence[Message], model: LoadedModel, room: Room) -> list[int]:
    """Tokens of each message's text; of one that cannot fit, the fewest that they may be."""
    encoder = model.prompt_encoder
    texts = [_read_text(message) for message in messages]
    fewest = [len(text) // encoder.max_token_chars for text in texts]
    counts = encoder.count(
        [t if n <= room.most else "" for t, n in zip(texts, fewest, strict=True)]
    )
    return [max(pair) for pair in zip(counts, fewest, strict=True)]


def _read_text(message: Message) -> str:
    texts = split_at_places(message["content"] or "")[::2]
    return unmark("".join(texts))[0]


def _shorten(
    conversation: Conversation,
    model: LoadedModel,
    room: Room,
    groups: list[tuple[int, ...]],
    estimate: _Estimate,
    images: RequestImages | None,
) -> FittedPrompt:
    costs, total = estimate.costs, estimate.total
    gone = [0.0, *accumulate(sum(costs[index] for index in group) for group in groups)]
    num_groups = _choose(gone, total - room.wished, max(1, room.wished // BLOCKS_PER_PROMPT))
    while True:
        dropped = [index for group in groups[:num_groups] for index in group]
        fitted = _write(conversation, model, room, dropped, images)
        excess = len(fitted.token_ids) - room.wished
        if excess <= 0 or num_groups == len(groups):
            return fitted
        # What is left has more tokens than was thought; so has what goes next.
        ratio = len(fitted.token_ids) / max(1.0, total - gone[num_groups])
        num_groups = max(num_groups + 1, _find_first(gone, gone[num_groups] + excess / ratio))


def _choose(gone: Sequence[float], excess: float, block: int) -> int:
    """How many groups go; with the first `n` of them go `gone[n]` tokens.

    So many that the excess goes, rounded up to blocks; but no large group only for the rounding.
    """
    reach = ceil(max(excess, 1) / block) * block
    rounded = _find_first(gone, reach)
    if gone[rounded] <= reach + block:
        return rounded
    return max(_find_first(gone, excess), rounded - 1)


def _find_first(gone: Sequence[float], num_tokens: float) -> int:
    """Of the first of the sorted numbers, after the zero, that is large enough; or of the last."""
    return min(max(1, bisect_left(gone, num_tokens)), len(gone) - 1)


def _measure_template(
    conversation: Conversation, model: LoadedModel, counts: Sequence[int]
) -> tuple[float, float]:
    """About how many tokens there are around all messages, and around each."""
    head = take_leading_system(conversation.messages)
    pair = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    last = [] if conversation.is_continued else pair[:1]
    try:
        short, long = (
            len(_encode(conversation.write([*head, *pair * times, *last]), model))
            for times in (1, 2)
        )
    except TemplateError:  # it wants more of its messages than a role and a text
        whole = _encode(conversation.write(conversation.messages), model)
        return 0.0, (len(whole) - sum(counts)) / len(counts)
    per_message = (long - short) / 2 - 1
    num_texts = 2 + len(last)
    known = sum(counts[: len(head)]) + num_texts + (len(head) + num_texts) * per_message
    return short - known, per_message


def _write(
    conversation: Conversation,
    model: LoadedModel,
    room: Room,
    dropped: Sequence[int],
    images: RequestImages | None,
) -> FittedPrompt:
    gone = set(dropped)
    messages = [m for index, m in enumerate(conversation.messages) if index not in gone]
    prompt = conversation.write(messages)
    num_at_least = len(prompt.text) // model.prompt_encoder.max_token_chars
    if num_at_least > room.most:  # known without reading megabytes
        raise ContextLengthExceededError(room.most + 1, num_at_least, "messages", is_counted=False)
    greeting = len(take_leading_system(conversation.messages))
    is_greeting_gone = conversation.has_greeting and greeting in gone
    num_dropped = len(gone) - is_greeting_gone
    token_ids = _encode(prompt, model)
    if images is None or not prompt.images:
        return FittedPrompt(prompt.text, token_ids, num_dropped)
    token_ids, inputs = images.place(prompt.images, token_ids)
    return FittedPrompt(prompt.text, token_ids, num_dropped, inputs)


def _encode(prompt: Prompt, model: LoadedModel) -> tuple[int, ...]:
    return model.prompt_encoder.encode(prompt.text, prompt.marks, prompt.add_special_tokens)


def _check(fitted: FittedPrompt, room: Room) -> FittedPrompt:
    if len(fitted.token_ids) > room.most:
        raise ContextLengthExceededError(room.most + 1, len(fitted.token_ids), "messages")
    return fitted
