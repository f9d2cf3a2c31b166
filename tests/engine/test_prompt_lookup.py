"""What is guessed, and when guessing stops."""

from __future__ import annotations

import random

import pytest

from modules.engine.prompt_lookup import LONGEST_PAUSE, PromptLookup


def propose(token_ids: list[int], number: int = 4) -> tuple[int, ...]:
    """Of a sequence whose guesses have all been right."""
    lookup = PromptLookup(100)
    lookup.learn(100, 100)
    return lookup.propose(token_ids, number)


@pytest.mark.parametrize(
    ("token_ids", "guess"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], (4, 5, 6, 7)),
        ([1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 1, 2, 3], (5, 6, 7, 8)),  # the last time
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], (4, 9, 2, 3)),  # rather three than two tokens
        ([1, 2, 3, 4, 5, 6, 9, 2, 3], (4, 5, 6, 9)),
        ([7, 7, 7], (7, 7, 7, 7)),
        ([1, 2, 1, 2], (1, 2, 1, 2)),
        ([1, 2, 3, 1, 2, 3], (1, 2, 3, 1)),
        ([1, 2, 3, 4, 5], ()),
        ([1, 2, 1], ()),
        ([1], ()),
    ],
)
def test_what_followed_the_last_time(token_ids: list[int], guess: tuple[int, ...]) -> None:
    assert propose(token_ids) == guess


def test_step_by_step_as_from_the_whole() -> None:
    draw = random.Random(0)
    lookup = PromptLookup(100)
    lookup.learn(100, 100)
    token_ids = [0]
    for _ in range(500):
        token_ids += draw.choices(range(6), k=draw.randrange(1, 4))
        assert lookup.propose(token_ids, 5) == propose(token_ids, 5)


def test_guesses_grow_while_they_are_right_and_shrink_to_what_was() -> None:
    lookup = PromptLookup(10)
    lengths = []
    for accepted in (1, 2, 4, 8, 10, 3, 1, 0, 1):
        guess = lookup.propose([7] * 50, 100)
        lengths.append(len(guess))
        lookup.learn(len(guess), accepted)
    assert lengths == [1, 2, 4, 8, 10, 10, 4, 2, 1]


def test_wrong_guesses_cost_next_to_nothing() -> None:
    lookup = PromptLookup(10)
    num_guessed = 0
    for _ in range(1000):
        guess = lookup.propose([7] * 50, 100)
        num_guessed += len(guess)
        if guess:
            lookup.learn(len(guess), 0)
    assert 1000 // LONGEST_PAUSE <= num_guessed <= 20
    for _ in range(LONGEST_PAUSE):
        if guess := lookup.propose([7] * 50, 100):
            break
    lookup.learn(len(guess), len(guess))
    assert len(lookup.propose([7] * 50, 100)) == 2, "it may be worth it again"
