"""Who steps with how many tokens: integers only."""

from __future__ import annotations

from modules.engine.cache_manager import CacheManager
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.sampling_params import SamplingParams
from modules.engine.scheduler import SampledToken, ScheduledBatch, Scheduler
from modules.engine.sequence import Sequence, SequenceRequest, SequenceStatus

BLOCK_SIZE = 10


def build(max_num_seqs: int = 8, num_blocks: int = 500, budget: int = 100) -> Scheduler:
    cache = CacheManager(num_blocks, BLOCK_SIZE)
    return Scheduler(cache, max_num_seqs, budget, eos_token_ids=frozenset({2}))


def add(scheduler: Scheduler, name: str, num_tokens: int, **params: object) -> Sequence:
    wishes = SamplingParams(**params)  # type: ignore[arg-type]
    seq = Sequence(SequenceRequest(name, tuple(range(10, 10 + num_tokens)), wishes), 5000)
    scheduler.add(seq)
    return seq


def step(scheduler: Scheduler, token_id: int = 9) -> tuple[ScheduledBatch, list[TokenOutput]]:
    batch = scheduler.schedule()
    return batch, scheduler.update(batch, [SampledToken(token_id)] * len(batch.sampled))


def spans(batch: ScheduledBatch) -> dict[str, tuple[int, int]]:
    return {item.seq.request_id: (item.start, item.end) for item in batch.items}


def test_a_long_prompt_is_read_in_chunks_beside_decoding_ones() -> None:
    scheduler = build(budget=100)
    add(scheduler, "short", 10)
    add(scheduler, "long", 120)
    add(scheduler, "late", 45)
    assert spans(step(scheduler)[0]) == {"short": (0, 10), "long": (0, 50)}
    batch, outputs = step(scheduler)
    assert spans(batch) == {"short": (10, 11), "long": (50, 100), "late": (0, 45)}
    assert [output.request_id for output in outputs] == ["short", "late"]
    assert spans(step(scheduler)[0]) == {"short": (11, 12), "long": (100, 120), "late": (45, 46)}


def test_prompts_are_cut_at_the_same_places_in_any_company() -> None:
    lengths = [3, 260, 49, 50, 51, 170, 7, 120]
    scheduler = build(budget=100)
    for number, length in enumerate(lengths):
        add(scheduler, str(number), length, max_tokens=30)
    cuts: dict[str, list[int]] = {}
    while scheduler.has_unfinished:
        decoding = {s.request_id for s in scheduler.running if s.num_uncomputed_tokens == 1}
        batch, _ = step(scheduler)
        assert sum(item.num_tokens for item in batch.items) <= 100
        assert decoding <= spans(batch).keys(), "a stream was stopped"
        for item in batch.items:
            if item.end <= lengths[int(item.seq.request_id)]:
                cuts.setdefault(item.seq.request_id, []).append(item.end)
    for number, length in enumerate(lengths):
        assert cuts[str(number)] == [*range(50, length, 50), length]


def test_prompts_are_cut_at_whole_blocks() -> None:
    for budget, chunk in ((100, 50), (119, 50), (16, 8)):
        scheduler = build(budget=budget)
        add(scheduler, "a", 60)
        assert spans(step(scheduler)[0]) == {"a": (0, chunk)}


def test_no_more_run_than_may() -> None:
    scheduler = build(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, 1)
    assert spans(step(scheduler)[0]).keys() == {"a", "b"}


def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    scheduler = build(num_blocks=4)
    add(scheduler, "a", 2 * BLOCK_SIZE)
    big = add(scheduler, "big", 3 * BLOCK_SIZE)
    small = add(scheduler, "small", 1)
    step(scheduler)
    assert big.status is small.status is SequenceStatus.WAITING


def test_the_youngest_is_preempted_and_starts_over() -> None:
    scheduler = build(num_blocks=2, budget=1000)
    old = add(scheduler, "old", BLOCK_SIZE)
    young = add(scheduler, "young", BLOCK_SIZE)
    step(scheduler)
    batch, _ = step(scheduler)  # each needs a second block, and there is none
    assert spans(batch) == {"old": (BLOCK_SIZE, BLOCK_SIZE + 1)}
    assert young.status is SequenceStatus.WAITING
    assert (young.block_table, young.num_computed_tokens, young.num_output_tokens) == ([], 0, 1)
    scheduler.finish(old, FinishReason.ABORT)
    assert spans(step(scheduler)[0]) == {"young": (0, BLOCK_SIZE + 1)}


def test_ends_at_eos_stop_tokens_and_length() -> None:
    scheduler = build()
    add(scheduler, "eos", 3)
    add(scheduler, "ignores", 3, ignore_eos=True)
    add(scheduler, "one", 3, max_tokens=1, ignore_eos=True)
    add(scheduler, "stops", 3, stop_token_ids=(2,), ignore_eos=True)
    _, outputs = step(scheduler, token_id=2)
    assert {output.request_id: output.finish_reason for output in outputs} == {
        "eos": FinishReason.STOP,
        "ignores": None,
        "one": FinishReason.LENGTH,
        "stops": FinishReason.STOP,
    }
    assert [seq.request_id for seq in scheduler.running] == ["ignores"]


def test_finish_is_idempotent_in_every_state() -> None:
    scheduler = build(max_num_seqs=1)
    running, waiting = add(scheduler, "running", 3), add(scheduler, "waiting", 3)
    step(scheduler)
    for seq in (running, waiting, running, waiting):
        scheduler.finish(seq, FinishReason.ABORT)
        assert seq.is_finished
    assert not scheduler.has_unfinished


def test_a_preempted_sequence_is_the_next_to_be_admitted() -> None:
    scheduler = build(num_blocks=2, budget=1000)
    old = add(scheduler, "old", BLOCK_SIZE)
    add(scheduler, "young", BLOCK_SIZE)
    step(scheduler)
    add(scheduler, "late", 1)
    step(scheduler)
    scheduler.finish(old, FinishReason.ABORT)
    assert spans(step(scheduler)[0]) == {"young": (0, BLOCK_SIZE + 1)}
