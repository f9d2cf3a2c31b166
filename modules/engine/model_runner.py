"""ModelRunner: the only place where token ids become tensors. Batch in, sampled tokens out."""

from __future__ import annotations

import inspect

import numba
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.engine.attention import ATTENTION_NAME, PagedAttention, Segment
from modules.engine.cpu_attention import CpuAttention
from modules.engine.sampler import sample
from modules.engine.scheduler import SampledToken, ScheduledBatch
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
    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Read the batch's tokens; a sampled token for each of `batch.sampled`, in order."""
        if self._device.type == "cpu":
            torch.set_num_threads(NUM_THREADS)
            numba.set_num_threads(NUM_THREADS)
        logits = self._forward(batch)
        if not batch.sampled:
            return []
        return sample(logits, [item.seq for item in batch.sampled])

    def _forward(self, batch: ScheduledBatch) -> Tensor:
        """Logits of the sequences that are sampled, [num_sampled, vocab_size], float32."""
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
    last_rows = []
    for item in batch.items:
        segments.append(Segment(item.block_table, len(token_ids), item.start, item.end))
        token_ids += item.seq.token_ids[item.start : item.end]
        positions += range(item.start, item.end)
        if item.is_last_chunk:
            last_rows.append(len(token_ids) - 1)
    return token_ids, positions, tuple(segments), last_rows
