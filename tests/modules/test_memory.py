"""The budget for keys and values: who gets how much of what."""

from __future__ import annotations

import pytest

from modules.memory import KV_CACHE_SHARE, KVBudget


def test_models_loaded_together_get_equal_parts() -> None:
    budget = KVBudget()
    parts = [budget.reserve("cpu", 10_000, total=900, num_to_come=n) for n in (3, 2, 1)]
    assert [part.num_bytes for part in parts] == [300, 300, 300]
    assert budget.reserve("cpu", 10_000, total=900).num_bytes == 0


def test_what_one_cannot_use_is_left_for_those_to_come() -> None:
    budget = KVBudget()
    assert budget.reserve("cpu", 0, total=900, most=100, num_to_come=3).num_bytes == 100
    assert budget.reserve("cpu", 0, total=900, num_to_come=2).num_bytes == 400


def test_what_is_given_back_goes_to_the_next_one() -> None:
    budget = KVBudget()
    part = budget.reserve("cpu", 0, total=900)
    part.give_back()
    part.give_back()
    assert budget.reserve("cpu", 0, total=900).num_bytes == 900


def test_what_is_going_to_be_replaced_counts_as_left() -> None:
    budget = KVBudget()
    kept, old = (budget.reserve("cpu", 0, total=900, num_to_come=n) for n in (3, 1))
    new = budget.reserve("cpu", 0, total=900, replaced=[old])
    assert (kept.num_bytes, old.num_bytes, new.num_bytes) == (300, 600, 600)
    old.give_back()
    assert budget.reserve("cpu", 0, total=900).num_bytes == 0


@pytest.mark.parametrize(("device", "is_taken_at_once"), [("cpu", False), ("cuda", True)])
def test_without_a_total_all_share_what_would_be_free(device: str, is_taken_at_once: bool) -> None:
    """A card's memory is taken when a model is loaded, a CPU's when it is written to."""
    budget, free = KVBudget(), 1_000_000
    first = budget.reserve(device, free, num_to_come=2)
    second = budget.reserve(device, free - first.num_bytes * is_taken_at_once)
    whole = KV_CACHE_SHARE[device] * free
    assert first.num_bytes == pytest.approx(whole / 2, abs=2)
    assert second.num_bytes == pytest.approx(whole / 2, abs=2)


def test_devices_do_not_share() -> None:
    budget = KVBudget()
    budget.reserve("cuda", 0, total=900)
    assert budget.reserve("cpu", 0, total=900).num_bytes == 900


def test_less_memory_than_was_promised_leaves_nothing() -> None:
    budget = KVBudget()
    budget.reserve("cpu", 1000)
    assert budget.reserve("cpu", 500).num_bytes == 0
