"""ModelRunner: the only place where token ids become tensors. Batch in, sampled tokens out."""

from __future__ import annotations

import inspect
from itertools import accumulate, pairwise

import numba
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.engine.attention import ATTENTION_NAME, PagedAttention, Segment
from modules.engine.cpu_attention import CpuAttention
from modules.engine.sampler import sample
from modules.engine.scheduler import SampledToken, ScheduledBatch, ScheduledSequence
from modules.engine.torch_attention import TorchAttention

# Of the compiled functions; torch has as many.
NUM_THREADS = torch.get_num_threads()


def can_batch(model: PreTrainedModel) -> bool:
    """Whether the model's code hands its attention to the function that its configuration names."""
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and not model.config.is_encoder_decoder
    )


class ModelRunner:
    def __init__(self, model: PreTrainedModel, num_blocks: int, block_size: int) -> None:
        model.set_attn_implementation(ATTENTION_NAME)
        self._model = model.eval()
        self._device = model.device
        self._can_select_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        backend = CpuAttention if self._device.type == "cpu" else TorchAttention
        self._attention: PagedAttention = backend(num_blocks, block_size)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> list[list[SampledToken]]:
        """Read the batch's tokens; for each of `batch.sampled`, in order, the tokens of its draft
        that were right and the next one.
        """
        if self._device.type == "cpu":
            torch.set_num_threads(NUM_THREADS)
            numba.set_num_threads(NUM_THREADS)
        logits = self.forward(batch)
        if not batch.sampled:
            return []
        return _sample_along(logits, batch.sampled)

    @property
    def num_kv_bytes_per_token(self) -> int:
        return self._attention.num_bytes_per_token

    def forward(self, batch: ScheduledBatch) -> Tensor:
        """Logits after the last token of the sequences that are sampled, and after each of their
        drafts: [num_rows, vocab_size], float32.
        """
        token_ids, positions, segments, last_rows = _pack(batch)
        last = torch.tensor(last_rows, device=self._device, dtype=torch.long)
        output = self._model(
            input_ids=torch.tensor([token_ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            attention_batch=self._attention.batch(segments),
            **({"logits_to_keep": last} if self._can_select_logits else {}),
        )
        logits: Tensor = output.logits[0] if self._can_select_logits else output.logits[0, last]
        return logits.float()


def _pack(
    batch: ScheduledBatch,
) -> tuple[list[int], list[int], tuple[Segment, ...], list[int]]:
    """All tokens in one row: ids, positions, segments, and the rows whose logits are sampled."""
    token_ids: list[int] = []
    positions: list[int] = []
    segments = []
    last_rows: list[int] = []
    for item in batch.items:
        # Attended to as if alone, each of them, a draft's tokens are rounded as in steps of one.
        end = item.end + len(item.draft)
        for start, stop in pairwise((item.start, *range(item.end, end + 1))):
            offset = len(token_ids) + start - item.start
            segments.append(Segment(item.block_table, offset, start, stop))
        token_ids += [*item.seq.token_ids[item.start : item.end], *item.draft]
        positions += range(item.start, end)
        if item.is_last_chunk:
            last_rows += range(len(token_ids) - 1 - len(item.draft), len(token_ids))
    return token_ids, positions, tuple(segments), last_rows


def _sample_along(logits: Tensor, items: tuple[ScheduledSequence, ...]) -> list[list[SampledToken]]:
    """Sample as if token by token, for as long as a sequence's draft says the same.

    So a draft changes no token and no random number: one that is wrong has only cost its rows.
    """
    seqs = [item.seq for item in items]
    tokens: list[list[SampledToken]] = [[] for _ in items]
    first_rows = list(accumulate((1 + len(item.draft) for item in items), initial=0))
    active = list(range(len(items)))
    while active:
        rows = [first_rows[i] + len(tokens[i]) for i in active]
        chosen = logits if len(rows) == len(logits) else logits[rows]
        for i, token in zip(active, sample(chosen, [seqs[i] for i in active]), strict=True):
            tokens[i].append(token)
        active = [i for i in active if _is_foreseen(tokens[i], items[i].draft)]
        for i in active:
            if seqs[i] is items[i].seq:
                seqs[i] = seqs[i].fork()
            seqs[i].append(tokens[i][-1].token_id)
    return tokens


def _is_foreseen(tokens: list[SampledToken], draft: tuple[int, ...]) -> bool:
    return len(tokens) <= len(draft) and tokens[-1].token_id == draft[len(tokens) - 1]
