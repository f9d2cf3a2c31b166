"""Engine: add, abort, step. Synchronous, for one thread; token ids in, token ids out."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from modules.engine.cache_manager import CacheManager
from modules.engine.model_runner import ModelRunner, choose_block_size
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.scheduler import ScheduledBatch, Scheduler
from modules.engine.sequence import Sequence, SequenceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    max_model_len: int
    """Most tokens of prompt and output together."""
    eos_token_ids: frozenset[int] = frozenset()
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    """Most tokens that one step reads; a chunk of a prompt has half of them. At least twice
    `max_num_seqs` is used."""
    num_cache_tokens: int
    """Tokens whose keys and values fit into memory; at least `max_model_len`."""
    num_retained_tokens: int | None = None
    """Most tokens whose keys and values are retained after their generation has ended, for others
    that begin like it; None: `max_model_len`."""
    is_deterministic: bool = False
    """Compute each sequence alone and from its start, so that no number is rounded in another way
    because of what else runs, or ran before. `max_num_seqs` and `num_retained_tokens` are not used
    then."""
    block_size: int | None = None
    """Tokens per block of the cache; None: what the model's device wants."""

    def __post_init__(self) -> None:
        if self.num_cache_tokens < self.max_model_len:
            raise ValueError("the cache must hold one sequence of max_model_len tokens")


class Engine:
    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        block_size = config.block_size or choose_block_size(model)
        num_blocks = -(-config.num_cache_tokens // block_size)
        self.config = config
        num_retained = config.num_retained_tokens
        if num_retained is None:
            num_retained = config.max_model_len
        max_num_seqs = config.max_num_seqs
        if config.is_deterministic:
            num_retained, max_num_seqs = 0, 1
        self.cache_manager = CacheManager(num_blocks, block_size, -(-num_retained // block_size))
        self.scheduler = Scheduler(
            self.cache_manager,
            max_num_seqs,
            config.max_num_batched_tokens,
            # Who pauses leaves something to be used again, or has to read its own tokens anew.
            pauses_background=not config.is_deterministic,
        )
        self.runner = ModelRunner(model, num_blocks, block_size)
        self.runner.prepare(max_num_seqs, config.max_model_len)
        self._sequences: dict[str, Sequence] = {}

    @property
    def max_guided_len(self) -> int:
        """Most tokens of a guided sequence, which shares the cache with its companion."""
        manager = self.cache_manager
        return min(self.config.max_model_len, manager.num_blocks // 2 * manager.block_size)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    @property
    def has_foreground(self) -> bool:
        """Whether any of what is unfinished is not of the background."""
        return self.scheduler.has_foreground

    def add(self, request: SequenceRequest) -> None:
        """Queue a generation. What is to be read must have a token, and at most `max_model_len` of
        them; what is guided, and the negative prompt with it, `max_guided_len`.

        Raises ValueError if it has more, for it would wait for ever; if the images are not those of
        the prompt; and if the id is that of a generation that has not ended.
        """
        if request.request_id in self._sequences:
            raise ValueError(f"{request.request_id} is running already")
        is_guided = request.negative_prompt_token_ids is not None
        longest = self.max_guided_len if is_guided else self.config.max_model_len
        num_tokens = request.num_longest_prompt_tokens + len(request.output_token_ids)
        if not 0 < num_tokens <= longest:
            raise ValueError(f"{num_tokens} tokens cannot be read where {longest} fit")
        seq = Sequence(request, longest, self.config.eos_token_ids)
        if self.config.is_deterministic:
            seq.lookup = None  # what is read at once is rounded at once
        self._sequences[request.request_id] = seq
        self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """End a generation now and free what it holds; idempotent."""
        self._finish(request_id, FinishReason.ABORT)

    def step(self) -> list[TokenOutput]:
        """Let every running sequence go on by one step; the tokens that were sampled."""
        return self.execute(self.schedule())

    def schedule(self) -> ScheduledBatch:
        return self.scheduler.schedule()

    def execute(self, batch: ScheduledBatch) -> list[TokenOutput]:
        """Run a batch. If that raises, nothing is recorded: it may be tried again, or in parts."""
        outputs = self.scheduler.update(batch, self.runner.run(batch))
        for output in outputs:
            if output.finish_reason is not None:
                del self._sequences[output.request_id]
        return outputs

    def fail(self, request_id: str) -> TokenOutput:
        """End a generation that cannot go on; the output that says so."""
        self._finish(request_id, FinishReason.ERROR)
        return TokenOutput(request_id, token_id=0, finish_reason=FinishReason.ERROR)

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            self.scheduler.finish(seq, reason)
