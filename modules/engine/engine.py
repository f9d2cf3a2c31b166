"""Engine: add, abort, step. Synchronous, for one thread; token ids in, token ids out."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from modules.engine.cache_manager import BLOCK_SIZE, CacheManager
from modules.engine.model_runner import ModelRunner
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.scheduler import Scheduler
from modules.engine.sequence import Sequence, SequenceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    max_model_len: int
    """Most tokens of prompt and output together."""
    eos_token_ids: frozenset[int] = frozenset()
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    """Most tokens that one step reads."""
    num_cache_tokens: int
    """Tokens whose keys and values fit into memory; at least `max_model_len`."""


class Engine:
    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        num_blocks = -(-max(config.num_cache_tokens, config.max_model_len) // BLOCK_SIZE)
        self.config = config
        self.cache_manager = CacheManager(config.max_num_seqs, num_blocks)
        self.scheduler = Scheduler(
            self.cache_manager,
            config.max_num_seqs,
            # every running sequence gets its token in every step
            max(config.max_num_batched_tokens, config.max_num_seqs),
            config.eos_token_ids,
        )
        self.runner = ModelRunner(model)
        self._sequences: dict[str, Sequence] = {}

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add(self, request: SequenceRequest) -> None:
        """Queue a generation. The prompt must have a token, and be shorter than `max_model_len`."""
        seq = Sequence(request, self.config.max_model_len)
        self._sequences[request.request_id] = seq
        self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """End a generation now and free what it holds; idempotent."""
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            self.scheduler.finish(seq, FinishReason.ABORT)

    def step(self) -> list[TokenOutput]:
        """Let every running sequence go on by one step; the tokens that were sampled."""
        batch = self.scheduler.schedule()
        sampled = self.runner.run(batch)
        outputs = self.scheduler.update(batch, sampled)
        for output in outputs:
            if output.finish_reason is not None:
                del self._sequences[output.request_id]
        return outputs
