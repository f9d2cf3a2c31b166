"""What is computed next: sorted by length, in turns, the background last. No thread, no torch."""

from __future__ import annotations

import random

from modules.batch_queue import Batch, BatchLimits, BatchQueue, Preparation, Prepared, Request

LIMITS = BatchLimits(max_items=4, max_tokens=100, max_padding=5)
ROOMY = BatchLimits(max_items=1000, max_tokens=10**6, max_padding=10**6)


def request(*lengths: int, is_background: bool = False) -> Request[str]:
    """Of texts that have as many tokens as letters."""
    return Request(["x" * length for length in lengths], is_background)


def prepare(queue: BatchQueue, preparation: Preparation) -> None:
    queue.put(preparation, [Prepared({}, len(text)) for text in preparation.inputs])


def drain(queue: BatchQueue, limits: BatchLimits = LIMITS) -> list[Batch]:
    """All batches; texts are prepared as they come."""
    batches = []
    while work := queue.take(limits):
        queue.check_integrity()
        if isinstance(work, Preparation):
            prepare(queue, work)
        else:
            batches.append(work)
    return batches


def lengths(batch: Batch) -> list[int]:
    return [item.length for item in batch.items]


def ready(*requests: Request[str]) -> BatchQueue:
    """A queue in which everything is prepared and nothing computed."""
    queue = BatchQueue()
    for each in requests:
        queue.add(each)
        work = queue.take(LIMITS)
        while isinstance(work, Preparation):
            prepare(queue, work)
            work = queue.take(LIMITS) if each.num_taken < len(each.inputs) else None
    return queue


def test_a_lone_text_is_a_batch_at_once() -> None:
    queue = BatchQueue()
    queue.add(request(7))
    assert [lengths(batch) for batch in drain(queue)] == [[7]]
    assert not queue.has_work


def test_texts_of_several_clients_share_a_batch() -> None:
    queue = BatchQueue()
    clients = [request(10), request(11), request(10)]
    for client in clients:
        queue.add(client)
    first, second = queue.take(LIMITS), None
    assert isinstance(first, Preparation)
    second = queue.take(LIMITS)
    assert isinstance(second, Preparation)
    prepare(queue, second)
    prepare(queue, first)
    (batch,) = drain(queue)
    assert {item.request for item in batch.items} == set(clients)


def test_a_batch_has_neighbours_by_length() -> None:
    queue = ready(request(10, 50, 11, 48, 12, 49))
    assert sorted(lengths(batch) for batch in drain(queue)) == [[10, 11, 12], [48], [49, 50]]


def test_a_batch_is_no_larger_than_the_limits() -> None:
    batches = drain(ready(request(*[10] * 9)))
    assert [len(batch.items) for batch in batches] == [4, 4, 1]
    batches = drain(ready(request(*[40] * 5)))
    assert [len(batch.items) for batch in batches] == [2, 2, 1]


def test_a_text_longer_than_a_batch_is_one() -> None:
    assert [lengths(batch) for batch in drain(ready(request(500, 3)))] == [[500], [3]]


def test_padding_is_limited() -> None:
    for _ in range(50):
        sizes = [random.randint(1, 90) for _ in range(60)]
        for batch in drain(ready(request(*sizes))):
            found = lengths(batch)
            padding = max(found) * len(found) - sum(found)
            assert padding <= max(LIMITS.max_padding, LIMITS.max_padding_share * sum(found))


def test_every_text_is_computed_once() -> None:
    sizes = [random.randint(1, 90) for _ in range(300)]
    queue = BatchQueue()
    requests = [request(*sizes[i : i + 30]) for i in range(0, 300, 30)]
    for each in requests:
        queue.add(each)
    items = [item for batch in drain(queue) for item in batch.items]
    assert len(items) == 300
    assert {(item.request, item.index) for item in items} == {
        (each, index) for each in requests for index in range(30)
    }
    assert sorted(item.length for item in items) == sorted(sizes)


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    """Nor the long one for ever while short ones come."""
    long = request(*[20] * 40)
    queue = ready(long)
    served = 0
    for _ in range(5):
        short = request(60)
        queue.add(short)
        batches = []
        while short.waiting or short.num_taken == 0:
            work = queue.take(LIMITS)
            if isinstance(work, Preparation):
                prepare(queue, work)
            elif isinstance(work, Batch):
                batches.append(work)
        assert len(batches) <= 2
        served += sum(len(batch.items) for batch in batches if batch.items[0].request is long)
    assert served > 0


def test_preparing_a_long_request_lets_others_in_between() -> None:
    queue = BatchQueue()
    long, short = request(*[5] * 500), request(6)
    queue.add(long)
    queue.add(short)
    works = []
    for _ in range(6):
        work = queue.take(ROOMY)
        works.append(work)
        if isinstance(work, Preparation):
            prepare(queue, work)
    assert [work.request for work in works if isinstance(work, Preparation)][:2] == [long, short]
    assert [index for index, work in enumerate(works) if isinstance(work, Batch)] == [1, 4]


def test_a_very_long_text_is_prepared_by_itself() -> None:
    queue = BatchQueue()
    queue.add(request(5, 100_000, 5))
    work = queue.take(ROOMY)
    assert isinstance(work, Preparation)
    assert [len(text) for text in work.inputs] == [5, 100_000]


def test_the_background_waits_while_there_is_anything_else() -> None:
    background = request(*[10] * 8, is_background=True)
    queue = ready(background)
    front = request(10, 10)
    queue.add(front)
    order = [{item.request for item in batch.items} for batch in drain(queue)]
    assert order == [{front}, {background}, {background}]


def test_what_is_removed_is_not_computed() -> None:
    leaver, stayer, unprepared = request(10, 30), request(11), request(12)
    queue = ready(leaver, stayer)
    queue.add(unprepared)
    queue.remove(leaver)
    queue.remove(unprepared)
    queue.check_integrity()
    assert [{item.request for item in batch.items} for batch in drain(queue)] == [{stayer}]
    assert queue.requests == (stayer,)


def test_who_has_left_while_his_texts_were_prepared_has_none_in_the_queue() -> None:
    queue, leaver = BatchQueue(), request(10)
    queue.add(leaver)
    work = queue.take(LIMITS)
    assert isinstance(work, Preparation)
    queue.remove(leaver)
    prepare(queue, work)
    assert not queue.has_work
    queue.check_integrity()
