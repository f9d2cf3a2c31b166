"""Who steps with how many tokens: integers only."""

from __future__ import annotations

import random
from collections.abc import Iterable

from modules.engine.cache_manager import CacheManager
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.sampling_params import SamplingParams
from modules.engine.scheduler import SampledToken, ScheduledBatch, Scheduler, StepResult
from modules.engine.sequence import Sequence, SequenceRequest, SequenceStatus

BLOCK_SIZE = 10


def build(max_num_seqs: int = 8, num_blocks: int = 500, budget: int = 100) -> Scheduler:
    cache = CacheManager(num_blocks, BLOCK_SIZE)
    return Scheduler(cache, max_num_seqs, budget)


def add(scheduler: Scheduler, name: str, num_tokens: int, **options: object) -> Sequence:
    """With tokens that no other name has."""
    first = 10_000 * int.from_bytes(name.encode())
    return add_tokens(scheduler, name, range(first, first + num_tokens), **options)


def add_tokens(
    scheduler: Scheduler,
    name: str,
    token_ids: Iterable[int],
    is_background: bool = False,
    **params: object,
) -> Sequence:
    wishes = SamplingParams(**params)  # type: ignore[arg-type]
    request = SequenceRequest(name, tuple(token_ids), wishes, is_background=is_background)
    seq = Sequence(request, 5000, frozenset({2}))
    scheduler.add(seq)
    return seq


def step(scheduler: Scheduler, token_id: int = 9) -> tuple[ScheduledBatch, list[TokenOutput]]:
    batch = scheduler.schedule()
    return batch, scheduler.update(
        batch, StepResult([[SampledToken(token_id)]] * len(batch.sampled))
    )


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


def test_the_next_turn_reads_only_what_is_new() -> None:
    scheduler = build()
    first = add(scheduler, "first", 25, max_tokens=20, ignore_eos=True)
    while scheduler.has_unfinished:
        step(scheduler)
    assert len(first.token_ids) == 45
    second = add_tokens(scheduler, "second", [*first.token_ids, *range(4)])
    batch, (output,) = step(scheduler)
    assert spans(batch) == {"second": (40, 49)}
    assert output.num_cached_tokens == second.num_cached_tokens == 40


def test_what_is_being_read_is_waited_for_and_read_once() -> None:
    scheduler = build(budget=100)
    prompt = range(125)
    for name in "abc":
        add_tokens(scheduler, name, prompt)
    add(scheduler, "other", 30)
    assert spans(step(scheduler)[0]) == {"a": (0, 50), "other": (0, 30)}, "it may pass"
    assert spans(step(scheduler)[0]) == {"a": (50, 100), "other": (30, 31)}
    assert spans(step(scheduler)[0]) == {"a": (100, 125), "other": (31, 32)}
    batch, outputs = step(scheduler)
    assert spans(batch) == {"a": (125, 126), "other": (32, 33), "b": (120, 125), "c": (120, 125)}
    assert {o.request_id: o.num_cached_tokens for o in outputs} == {
        **{"a": 0, "other": 0},
        **{"b": 120, "c": 120},
    }


def test_only_what_is_shared_is_waited_for() -> None:
    scheduler = build(budget=100)
    add_tokens(scheduler, "a", range(150))
    add_tokens(scheduler, "b", [*range(40), *range(1000, 1050)])
    assert spans(step(scheduler)[0]) == {"a": (0, 50)}
    assert spans(step(scheduler)[0]) == {"a": (50, 100), "b": (40, 50)}
    assert spans(step(scheduler)[0]) == {"a": (100, 150), "b": (50, 90)}


def test_who_waits_goes_on_when_the_reader_ends() -> None:
    scheduler = build(budget=100)
    reader = add_tokens(scheduler, "a", range(150))
    add_tokens(scheduler, "b", range(150))
    add_tokens(scheduler, "c", range(150))
    step(scheduler)
    scheduler.finish(reader, FinishReason.ABORT)
    assert spans(step(scheduler)[0]) == {"b": (50, 100)}
    scheduler.finish(scheduler.running[0], FinishReason.ERROR)
    assert spans(step(scheduler)[0]) == {"c": (100, 150)}


def test_who_waits_for_a_reader_keeps_its_place() -> None:
    scheduler = build(max_num_seqs=3, budget=100)
    add_tokens(scheduler, "a", range(80), max_tokens=100)
    add_tokens(scheduler, "b", range(80), max_tokens=100)
    for name in ("other", "late"):
        add(scheduler, name, 5, max_tokens=100)
    assert spans(step(scheduler)[0]).keys() == {"a", "other"}
    assert spans(step(scheduler)[0]).keys() == {"a", "other"}
    assert spans(step(scheduler)[0]).keys() == {"a", "other", "b"}


def test_a_preempted_sequence_finds_what_is_left_of_it() -> None:
    scheduler = build(num_blocks=6, budget=1000)
    old = add(scheduler, "old", 3 * BLOCK_SIZE)
    add(scheduler, "young", 3 * BLOCK_SIZE)
    step(scheduler)
    step(scheduler)  # the young one's last block is needed
    scheduler.finish(old, FinishReason.ABORT)
    batch, (output,) = step(scheduler)
    assert spans(batch) == {"young": (2 * BLOCK_SIZE, 3 * BLOCK_SIZE + 1)}
    assert output.num_cached_tokens == 0, "no other generation has computed it"


def test_streams_go_on_whatever_is_left_of_prompts() -> None:
    """Prompts that begin in the middle of a chunk do not take up a stream's room."""
    scheduler = build(max_num_seqs=4, budget=100)
    add(scheduler, "known", 10, max_tokens=1)
    step(scheduler)
    add(scheduler, "a", 500)
    add(scheduler, "known", 500)
    add(scheduler, "stream", 8, max_tokens=100)
    assert spans(step(scheduler)[0]) == {"a": (0, 50), "known": (10, 50), "stream": (0, 8)}
    while any(seq.num_uncomputed_tokens > 1 for seq in scheduler.running):
        batch, outputs = step(scheduler)
        assert "stream" in {output.request_id for output in outputs}
        assert sum(item.num_tokens for item in batch.items) <= 100


def test_whatever_is_shared_everything_ends_and_streams_are_never_stopped() -> None:
    for seed in range(30):
        draw = random.Random(seed)
        scheduler = build(max_num_seqs=5, num_blocks=draw.choice((30, 60, 500)), budget=60)
        seqs = []
        for _ in range(600):
            if len(seqs) < 40 and draw.random() < 0.3:
                prompt = [0] * draw.randrange(1, 150) + draw.choices((1, 2), k=draw.randrange(60))
                wishes = {"max_tokens": draw.randrange(1, 30)}
                seqs.append(add_tokens(scheduler, str(len(seqs)), prompt, **wishes))
            if seqs and draw.random() < 0.02:
                scheduler.finish(draw.choice(seqs), FinishReason.ABORT)
            streams = [s for s in scheduler.running if s.num_uncomputed_tokens == 1]
            batch, _ = step(scheduler)
            assert batch.items or not scheduler.has_unfinished, "nothing goes on"
            assert sum(item.num_tokens for item in batch.items) <= 60
            for seq in streams:
                assert seq.is_finished or seq.request_id in spans(batch) or not seq.block_table
            scheduler._cache.check_integrity()
        while scheduler.has_unfinished:
            assert step(scheduler)[0].items
        assert all(seq.is_finished and not seq.block_table for seq in seqs)


def read_along(
    scheduler: Scheduler, expected: list[int]
) -> tuple[ScheduledBatch, list[TokenOutput]]:
    """A step of one sequence, whose output is `expected`."""
    batch = scheduler.schedule()
    (item,) = batch.items
    first = item.seq.num_output_tokens
    num_right = 0
    while num_right < len(item.draft) and item.draft[num_right] == expected[first + num_right]:
        num_right += 1
    tokens = [SampledToken(token_id) for token_id in expected[first : first + num_right + 1]]
    outputs = scheduler.update(batch, StepResult([tokens]))
    scheduler._cache.check_integrity()
    return batch, outputs


def test_as_much_of_a_draft_as_is_right_is_output() -> None:
    scheduler = build(num_blocks=20)
    prompt = [*range(100, 112), 50, 51, 52]
    seq = add_tokens(scheduler, "a", prompt, max_tokens=14, prompt_lookup_num_tokens=8)
    expected = [100, 101, 102, 103, 104, 105, 106, 99, 98, 97, 96, 95, 94, 93]
    steps = []
    while scheduler.has_unfinished:
        batch, outputs = read_along(scheduler, expected)
        steps.append((spans(batch)["a"], batch.items[0].draft, len(outputs)))
        assert seq.is_finished or seq.num_uncomputed_tokens == 1
    assert seq.token_ids[15:] == expected
    assert seq.finish_reason is FinishReason.LENGTH
    assert steps[:6] == [
        ((0, 15), (), 1),
        ((15, 16), (), 1),
        ((16, 17), (102,), 2),
        ((18, 19), (104, 105), 3),
        ((21, 22), (107, 108, 109, 110), 1),
        ((22, 23), (), 1),
    ]
    assert scheduler._cache.num_free_blocks == 20


def test_a_draft_ends_where_the_sequence_does() -> None:
    for wishes, num_outputs in (({"max_tokens": 9}, 9), ({"stop_token_ids": (104,)}, 5)):
        scheduler = build(num_blocks=20)
        prompt = [*range(100, 112), 100, 101, 102]
        wishes = {"max_tokens": 50, **wishes}
        seq = add_tokens(scheduler, "a", prompt, prompt_lookup_num_tokens=20, **wishes)
        expected = [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112]
        reasons = []
        while scheduler.has_unfinished:
            batch, outputs = read_along(scheduler, expected)
            room = seq.max_tokens - seq.num_output_tokens + len(outputs)
            assert len(batch.items[0].draft) < room
            reasons += [output.finish_reason for output in outputs]
        assert seq.num_output_tokens == len(reasons) == num_outputs
        assert reasons.index(seq.finish_reason) == num_outputs - 1, "the last one says why"


def test_no_draft_takes_from_others() -> None:
    """Neither memory, nor the rows of a chunk, nor those of other streams."""
    scheduler = build(num_blocks=3, budget=40)
    wishes = {"prompt_lookup_num_tokens": 30, "max_tokens": 30, "ignore_eos": True}
    seq = add_tokens(scheduler, "a", [9] * 16, **wishes)
    lengths = []
    while not seq.is_finished and scheduler._cache.can_append(seq, 1):
        batch, _ = read_along(scheduler, [9] * 50)
        lengths.append(len(batch.items[0].draft))
        assert len(seq.block_table) <= 3
    assert lengths[:4] == [0, 1, 2, 4]
    scheduler = build(max_num_seqs=8, budget=40)
    for number in range(8):
        add_tokens(scheduler, str(number), [9] * 16 + [number], **wishes)
    add(scheduler, "long", 300)
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        assert sum(item.num_tokens for item in batch.items) <= 40
        tokens = [[SampledToken(9)] * (1 + len(item.draft)) for item in batch.sampled]
        scheduler.update(batch, StepResult(tokens))
        scheduler._cache.check_integrity()


# The background


def test_who_is_waited_for_is_admitted_before_the_background() -> None:
    scheduler = build(max_num_seqs=2)
    for name in "ab":
        add(scheduler, name, 5, is_background=True)
    for name in "cde":
        add(scheduler, name, 5)
    assert [*spans(step(scheduler)[0])] == ["c", "d"]
    assert [seq.request_id for seq in scheduler.waiting] == ["e", "a", "b"]


def test_the_background_pauses_while_somebody_is_waited_for_and_keeps_its_memory() -> None:
    scheduler = build(budget=100)
    add(scheduler, "decoding", 5, is_background=True)
    step(scheduler)
    add(scheduler, "reading", 200, is_background=True)
    step(scheduler)
    add(scheduler, "asked", 120, max_tokens=2)
    seen = [spans(step(scheduler)[0]) for _ in range(4)]
    assert seen == [
        {"asked": (0, 50)},
        {"asked": (50, 100)},
        {"asked": (100, 120)},
        {"asked": (120, 121)},
    ]
    assert spans(step(scheduler)[0]) == {"decoding": (6, 7), "reading": (50, 100)}


def test_a_step_of_the_background_reads_one_chunk_beside_the_decoding_ones() -> None:
    scheduler = build(budget=100)
    for name in "ab":
        add(scheduler, name, 5, is_background=True, max_tokens=50)
    step(scheduler)
    for name in "cdef":
        add(scheduler, name, 70, is_background=True)
    seen = []
    while any(seq.num_computed_tokens < seq.num_prompt_tokens for seq in scheduler.waiting) or any(
        seq.num_uncomputed_tokens > 1 for seq in scheduler.running
    ):
        batch = scheduler.schedule()
        prompts = [item for item in batch.items if item.seq.num_uncomputed_tokens > 1]
        assert {"a", "b"} <= spans(batch).keys()
        assert all(item.end in (50, 70) for item in prompts), "cut where they always are"
        seen.append(sum(item.num_tokens for item in prompts))
        scheduler.update(batch, StepResult([[SampledToken(9)]] * len(batch.sampled)))
    assert max(seen) == 50 and min(seen) > 0 and sum(seen) == 4 * 70
    for name in "xy":
        add(scheduler, name, 50)
    assert spans(step(scheduler)[0]) == {"x": (0, 50), "y": (0, 50)}, "as many as ever"


def test_none_of_the_background_is_admitted_beside_others() -> None:
    scheduler = build()
    asked = add(scheduler, "asked", 5)
    add(scheduler, "later", 5, is_background=True)
    for _ in range(3):
        assert spans(step(scheduler)[0]).keys() == {"asked"}
    scheduler.finish(asked, FinishReason.ABORT)
    assert spans(step(scheduler)[0]).keys() == {"later"}


def test_a_full_background_takes_no_place_from_others() -> None:
    scheduler = build(max_num_seqs=4)
    for name in "abcd":
        add(scheduler, name, 5, is_background=True)
    step(scheduler)
    for name in "efghi":
        add(scheduler, name, 5, max_tokens=3)
    assert spans(step(scheduler)[0]).keys() == set("efgh"), "as many as ever, at once"
    for _ in range(2):
        step(scheduler)
    assert spans(step(scheduler)[0]).keys() == {"i"}
    for _ in range(2):
        step(scheduler)
    assert spans(step(scheduler)[0]) == dict.fromkeys("abcd", (5, 6))


def test_the_youngest_of_the_background_makes_room() -> None:
    scheduler = build(num_blocks=6, budget=1000)
    names = ("old", "middle", "young")
    seqs = [add(scheduler, name, 2 * BLOCK_SIZE - 1, is_background=True) for name in names]
    step(scheduler)
    add(scheduler, "asked", 3 * BLOCK_SIZE)
    assert spans(step(scheduler)[0]) == {"asked": (0, 3 * BLOCK_SIZE)}
    waiting = SequenceStatus.WAITING
    assert [seq.status for seq in seqs] == [SequenceStatus.RUNNING, waiting, waiting]
    assert [seq.request_id for seq in scheduler.waiting] == ["middle", "young"]
    for _ in range(BLOCK_SIZE + 1):  # it grows past what is free
        assert spans(step(scheduler)[0]).keys() == {"asked"}
    assert seqs[0].status is waiting
    scheduler.finish(scheduler.running[0], FinishReason.ABORT)
    assert spans(step(scheduler)[0]).keys() == set(names)
    scheduler._cache.check_integrity()


def test_nobody_waits_for_what_a_pausing_one_was_reading() -> None:
    scheduler = build(budget=100)
    add_tokens(scheduler, "behind", range(150), is_background=True)
    step(scheduler)
    add_tokens(scheduler, "asked", range(150))
    assert spans(step(scheduler)[0]) == {"asked": (50, 100)}


def test_drafts_count_those_that_step() -> None:
    scheduler = build(num_blocks=100, budget=100)
    for number in range(8):
        add(scheduler, f"b{number}", 5, is_background=True, max_tokens=50)
    step(scheduler)
    wishes = {"prompt_lookup_num_tokens": 40, "max_tokens": 40, "ignore_eos": True}
    asked = add_tokens(scheduler, "asked", [9] * 40, **wishes)
    longest = 0
    while not asked.is_finished:
        batch, _ = read_along(scheduler, [9] * 60)
        longest = max(longest, len(batch.items[0].draft))
    assert longest > 8


def test_where_nothing_may_be_read_twice_the_background_goes_on_to_its_end() -> None:
    scheduler = Scheduler(CacheManager(500, BLOCK_SIZE, 0), 1, 100, pauses_background=False)
    add(scheduler, "behind", 5, is_background=True, max_tokens=3)
    add(scheduler, "next", 5, is_background=True)
    step(scheduler)
    add(scheduler, "asked", 5)
    order = [*spans(step(scheduler)[0]), *spans(step(scheduler)[0]), *spans(step(scheduler)[0])]
    assert order == ["behind", "behind", "asked"]


def test_whatever_is_in_the_background_everything_ends_and_nobody_waits_for_it() -> None:
    for seed in range(30):
        draw = random.Random(seed)
        scheduler = build(max_num_seqs=5, num_blocks=draw.choice((30, 60, 500)), budget=60)
        seqs: list[Sequence] = []
        for _ in range(600):
            if len(seqs) < 40 and draw.random() < 0.3:
                prompt = [0] * draw.randrange(1, 150) + draw.choices((1, 2), k=draw.randrange(60))
                options = {"max_tokens": draw.randrange(1, 30)}
                is_background = draw.random() < 0.6
                seqs.append(add_tokens(scheduler, str(len(seqs)), prompt, is_background, **options))
            if seqs and draw.random() < 0.02:
                scheduler.finish(draw.choice(seqs), FinishReason.ABORT)
            asked = [s for s in seqs if not s.is_background and not s.is_finished]
            streams = [s for s in asked if s.num_uncomputed_tokens == 1 and s.block_table]
            batch, _ = step(scheduler)
            assert batch.items or not scheduler.has_unfinished, "nothing goes on"
            assert sum(item.num_tokens for item in batch.items) <= 60
            assert not asked or not any(item.seq.is_background for item in batch.items)
            assert sum(not s.is_background for s in scheduler.running) <= 5
            assert sum(s.is_background for s in scheduler.running) <= 5
            for seq in streams:
                assert seq.is_finished or seq.request_id in spans(batch) or not seq.block_table
            scheduler._cache.check_integrity()
        while scheduler.has_unfinished:
            assert step(scheduler)[0].items
        assert all(seq.is_finished and not seq.block_table for seq in seqs)
