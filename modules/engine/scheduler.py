"""Scheduler: which sequences step now, with how many tokens, and which of them have ended.

There is no prefill phase and no decode phase: every running sequence has tokens that the model has
not read, and a step reads some of them. A prompt is read in chunks, beside running streams, and is
cut at the same places whatever else runs: where it is cut decides how attention is rounded, so its
tokens do not depend on its company. What another sequence has read, or is just reading, is not read
again. Integers only; no tensor, no text.

A sequence and its companion are one unit: they are admitted, preempted and ended together. Each
reads its tokens but the last at its own pace; the last ones are read in one step, which samples.

A step may also read a draft: tokens that are only guessed to come next. As many of them as turn out
to be right are a sequence's next tokens, and one more.

Background sequences run with the whole batch while they are alone. While any other is there, they
pause: they keep their memory until it is needed, and take no part in a step. A step of theirs reads
one chunk's worth of prompts, no more: whoever comes meanwhile has to wait for its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from modules.engine.cache_manager import CacheManager
from modules.engine.logprobs import Logprobs
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.sampler_plan import SamplerState
from modules.engine.sequence import Sequence, SequenceStatus

# A step of so many rows takes little longer than one of a single row. Where it is full anyway, a
# wrong guess would cost what another stream's token costs.
MAX_NUM_DRAFT_ROWS = 32


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The tokens `seq.token_ids[start:end]` are read in this step, and `draft` after them."""

    seq: Sequence
    block_table: tuple[int, ...]
    start: int
    end: int
    is_last_chunk: bool
    """All tokens are read after this step, so the next one can be sampled."""
    draft: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.end - self.start + len(self.draft)

    @property
    def scored(self) -> range:
        """Places of the prompt's tokens whose probabilities are known after this step: each of
        them comes after a token that is read, and none has been reported before.
        """
        seq = self.seq
        first = max(self.start + 1, seq.num_scored_tokens)
        return range(first, max(first, min(self.end + 1, seq.num_prompt_tokens)))


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    items: tuple[ScheduledSequence, ...]

    @property
    def ending(self) -> tuple[ScheduledSequence, ...]:
        """The items after which a new token comes, in order."""
        return tuple(item for item in self.items if item.is_last_chunk)

    @property
    def sampled(self) -> tuple[ScheduledSequence, ...]:
        """Of them those that it is chosen for. A companion gets that of its sequence."""
        return tuple(item for item in self.ending if item.seq.primary is None)

    @property
    def scored(self) -> tuple[ScheduledSequence, ...]:
        """The items with tokens of a prompt to score, in order."""
        return tuple(item for item in self.items if item.scored)

    @property
    def units(self) -> tuple[ScheduledBatch, ...]:
        """Batches that can be run apart."""
        items: dict[int, list[ScheduledSequence]] = {}
        for item in self.items:
            items.setdefault(id(item.seq.unit[0]), []).append(item)
        return tuple(ScheduledBatch(tuple(unit)) for unit in items.values())


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: Logprobs | None = None
    sampler_state: SamplerState | None = None
    """What the sampler has learnt from it."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the model has made of a batch."""

    sampled: list[list[SampledToken]]
    """For each of `batch.sampled` the tokens of its draft that were right, and the one that comes
    after them."""
    scored: list[list[Logprobs]] = field(default_factory=list)
    """For each of `batch.scored`, one per token."""


def build_output(
    seq: Sequence, token: SampledToken, reason: FinishReason | None, is_prompt: bool = False
) -> TokenOutput:
    logprobs = token.logprobs
    return TokenOutput(
        seq.request_id,
        token.token_id,
        reason,
        num_cached_tokens=seq.num_cached_tokens or 0,
        logprob=logprobs.logprob if logprobs else None,
        top_logprobs=logprobs.top if logprobs else (),
        hidden_state=logprobs.hidden_state if logprobs else None,
        is_prompt=is_prompt,
    )


def report_prompt(seq: Sequence, scores: list[Logprobs]) -> list[TokenOutput]:
    """Report the next tokens of a prompt, once each; the first one has no probability.

    The last token of a prompt that is only to be scored ends its sequence.
    """
    is_first = seq.num_scored_tokens == 0 and not seq.is_scored
    known: list[Logprobs | None] = [None, *scores] if is_first else [*scores]
    outputs = []
    for logprobs in known:
        token = SampledToken(seq.token_ids[seq.num_scored_tokens], logprobs)
        seq.num_scored_tokens += 1
        reason = FinishReason.LENGTH if seq.only_scores and seq.is_scored else None
        outputs.append(build_output(seq, token, reason, is_prompt=True))
    return outputs


class Scheduler:
    """First come, first served; when the cache is full the youngest waits and starts over. Those
    of the background come after all others, in both lists.
    """

    def __init__(
        self,
        cache_manager: CacheManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        pauses_background: bool = True,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._cache = cache_manager
        self._max_num_seqs = max_num_seqs
        self._pauses_background = pauses_background
        # With one chunk in it, a step has room for the next token of every other sequence.
        self._max_num_batched_tokens = max(max_num_batched_tokens, 2 * max_num_seqs)
        size = self._max_num_batched_tokens // 2
        self._chunk_size = size - size % cache_manager.block_size or size

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def active(self) -> list[Sequence]:
        """The running ones that do not pause."""
        if not self._pauses_background or not self.has_foreground:
            return self.running
        return [seq for seq in self.running if not seq.is_background]

    @property
    def has_foreground(self) -> bool:
        first = (*self.running[:1], *self.waiting[:1])
        return any(not seq.is_background for seq in first)

    @property
    def _max_num_prompt_tokens(self) -> int:
        """Of a step. There is always room for one chunk: prompts are cut nowhere else."""
        return self._max_num_batched_tokens if self.has_foreground else self._chunk_size

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)
        _put_background_last(self.waiting)

    def schedule(self) -> ScheduledBatch:
        items, budget = self._schedule_running()
        items += self._admit(min(budget, self._max_num_prompt_tokens))
        return ScheduledBatch(tuple(items))

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[TokenOutput]:
        """Record what a step did."""
        tokens_of = dict(zip(map(id, batch.sampled), result.sampled, strict=True))
        scores_of = dict(zip(map(id, batch.scored), result.scored, strict=True))
        outputs: list[TokenOutput] = []
        for item in batch.items:
            outputs += self._advance(item, tokens_of.get(id(item), []), scores_of.get(id(item), []))
        return outputs

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End `seq` wherever it stands and free what it holds; idempotent."""
        if seq.is_finished:
            return
        if seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        for member in seq.unit:
            if member.status is SequenceStatus.RUNNING:
                self.running.remove(member)
            self._cache.free(member)
            member.status = SequenceStatus.FINISHED
            member.finish_reason = reason

    def _schedule_running(self) -> tuple[list[ScheduledSequence], int]:
        """And how many tokens more there is room for."""
        budget = self._max_num_batched_tokens
        items: list[ScheduledSequence] = []
        # Streams first, so that each goes on in every step: prompts share what they leave.
        num_active = len(self.active)
        units = [seq.unit for seq in self.active if seq.primary is None]
        for unit in sorted(units, key=_reads_prompt):
            if unit[0].status is not SequenceStatus.RUNNING:
                continue
            if _reads_prompt(unit):
                budget = min(budget, self._max_num_prompt_tokens)
            readers = self._choose_readers(unit, budget)
            if not self._make_room(readers, items):
                continue
            for seq in readers:
                items.append(self._build_item(seq, self._build_draft(seq, num_active)))
                budget -= items[-1].num_tokens
        return items, budget

    def _choose_readers(self, unit: tuple[Sequence, ...], budget: int) -> list[Sequence]:
        """Who of `unit` reads in this step: of two, none reads its last token without the other."""
        chunks = [(seq, self._chunk(seq, seq.num_computed_tokens)) for seq in unit]
        if all(seq.num_uncomputed_tokens == chunk for seq, chunk in chunks):
            return list(unit) if sum(chunk for _, chunk in chunks) <= budget else []
        readers = []
        for seq, chunk in chunks:
            if seq.num_uncomputed_tokens > chunk and chunk <= budget:
                readers.append(seq)
                budget -= chunk
        return readers

    def _admit(self, budget: int) -> list[ScheduledSequence]:
        """First come, first served; but who waits for what is just being read lets others pass,
        and keeps a place among the running ones; so does who has images to be looked at, while the
        step is for those of another: that takes long. Who pauses reads nothing, and takes no place.
        """
        items: list[ScheduledSequence] = []
        num_passed = 0
        being_read = {self._cache.next_content(seq) for seq in self.active if self.waiting}
        is_looking = any(seq.must_look for seq in self.active)
        for seq in tuple(self.waiting):
            if seq.is_background and self.has_foreground:
                break
            num_taken = len(self.active) + num_passed
            # Two that go together are let in even where only one may run.
            if num_taken > 0 and num_taken + len(seq.unit) > self._max_num_seqs:
                break
            if seq.must_look and is_looking:
                num_passed += len(seq.unit)
                continue
            prefixes = [self._cache.find_prefix(member) for member in seq.unit]
            if any(p.missing is not None and p.missing in being_read for p in prefixes):
                num_passed += len(seq.unit)
                continue
            if self._chunk(seq, len(prefixes[0].blocks) * self._cache.block_size) > budget:
                break
            if not self._allocate_or_preempt(seq.unit):
                break
            self._start(seq)
            is_looking |= seq.must_look
            for reader in self._choose_readers(seq.unit, budget):
                items.append(self._build_item(reader))
                budget -= items[-1].num_tokens
            being_read.update(map(self._cache.next_content, seq.unit))
        return items

    def _allocate_or_preempt(self, unit: tuple[Sequence, ...]) -> bool:
        """Room for `unit`, at the cost of those that pause for it."""
        while not self._allocate(unit):
            if len(self.active) == len(self.running):
                return False
            self._preempt(self.running[-1].unit)
        return True

    def _allocate(self, unit: tuple[Sequence, ...]) -> bool:
        """Room for all of `unit`, or for none of it."""
        for seq in unit:
            # Looked for again: room for the one may have cost what the other could begin with.
            prefix = self._cache.find_prefix(seq)
            if not self._cache.can_allocate(seq, prefix):
                for member in unit:
                    self._cache.free(member)
                return False
            seq.num_computed_tokens = self._cache.allocate(seq, prefix)
        return True

    def _start(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        for member in seq.unit:
            self.running.append(member)
            member.status = SequenceStatus.RUNNING
            if member.num_cached_tokens is None:
                member.num_cached_tokens = member.num_computed_tokens
        _put_background_last(self.running)

    def _chunk(self, seq: Sequence, start: int) -> int:
        """How many tokens of `seq` a step reads from `start`: to its end, or up to the next cut."""
        to_next_cut = self._chunk_size - start % self._chunk_size
        to_end = len(seq.token_ids) - start
        if len(seq.unit) > 1 and to_end > 1:  # the last one waits for that of the other
            to_end -= 1
        return min(to_end, to_next_cut)

    def _build_item(self, seq: Sequence, draft: tuple[int, ...] = ()) -> ScheduledSequence:
        start = seq.num_computed_tokens
        end = start + self._chunk(seq, start)
        return ScheduledSequence(
            seq, tuple(seq.block_table), start, end, end == len(seq.token_ids), draft
        )

    def _build_draft(self, seq: Sequence, num_active: int) -> tuple[int, ...]:
        """Only where there is room: no other sequence gives up anything for a guess."""
        if seq.lookup is None or seq.num_uncomputed_tokens > 1:
            return ()
        # Beside a chunk and all streams; and one token comes without a guess.
        num_rows = min(MAX_NUM_DRAFT_ROWS, self._max_num_batched_tokens - self._chunk_size)
        room = min(num_rows // num_active, seq.max_tokens - seq.num_output_tokens) - 1
        draft = seq.lookup.propose(seq.token_ids, room) if room > 0 else ()
        if not self._cache.can_append(seq, len(draft)):
            return ()
        self._cache.append(seq, len(draft))
        return draft

    def _make_room(self, readers: list[Sequence], scheduled: list[ScheduledSequence]) -> bool:
        """Let them keep their tokens, at the cost of younger ones; False if they must wait, too."""
        for seq in readers:
            while not self._cache.can_append(seq):
                taken = {id(item.seq.unit[0]) for item in scheduled}
                victim = next(s for s in reversed(self.running) if id(s.unit[0]) not in taken)
                self._preempt(victim.unit)
                if victim in seq.unit:
                    return False
            self._cache.append(seq)
        return True

    def _preempt(self, unit: tuple[Sequence, ...]) -> None:
        for seq in unit:
            self.running.remove(seq)
            self._cache.free(seq)
            seq.num_computed_tokens = 0
            seq.status = SequenceStatus.WAITING
        self.waiting.insert(0, unit[0])
        _put_background_last(self.waiting)

    def _advance(
        self, item: ScheduledSequence, tokens: list[SampledToken], scores: list[Logprobs]
    ) -> list[TokenOutput]:
        seq = item.seq
        outputs: list[TokenOutput] = []
        if seq.is_finished:  # with the sequence that it goes with
            return outputs
        prompt = report_prompt(seq, scores)
        reason = prompt[-1].finish_reason if prompt else None
        for token in tokens if reason is None else []:
            seq.append(token.token_id, token.sampler_state)
            reason = seq.find_finish_reason()
            outputs.append(build_output(seq, token, reason))
            if reason is not None:
                break
        # Of a draft, what is right has been read; what is wrong will be written over.
        seq.num_computed_tokens = item.end + max(0, len(outputs) - 1)
        if seq.lookup is not None and item.draft:
            seq.lookup.learn(len(item.draft), len(tokens) - 1)
        self._cache.record(seq)
        if reason is not None:
            self.finish(seq, reason)
        return prompt + outputs


def _reads_prompt(unit: tuple[Sequence, ...]) -> bool:
    """Or what it has to read anew; else it goes on."""
    return any(seq.num_uncomputed_tokens > 1 for seq in unit)


def _put_background_last(seqs: list[Sequence]) -> None:
    """In place; apart from that, their order stays."""
    seqs.sort(key=lambda seq: seq.is_background)
