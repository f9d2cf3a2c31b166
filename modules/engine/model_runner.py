"""ModelRunner: the only place where token ids become tensors. Batch in, sampled tokens and
scores of prompts out.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby, islice, pairwise
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from modules.engine.attention import ATTENTION_NAME, AttentionBatch, PagedAttention, Segment
from modules.engine.cache_manager import BLOCK_SIZE
from modules.engine.cpu_attention import CpuAttention
from modules.engine.cuda_attention import PAGE_SIZE, VarlenAttention, find_kernel
from modules.engine.cuda_graphs import DecodeGraphs, make_cuda_graphs
from modules.engine.fused_layers import find_fused_layers
from modules.engine.guidance import guide
from modules.engine.hidden_states import record_hidden_states
from modules.engine.image_embeddings import (
    ImageEmbedder,
    ImageRows,
    added,
    build_inputs,
    find_positions,
    find_rows,
    place_images,
)
from modules.engine.logprobs import Logprobs, compute_logprobs
from modules.engine.low_rank import AdaptableLayers, AdaptedRows, LinearLayers
from modules.engine.sampler import sample
from modules.engine.scheduler import SampledToken, ScheduledBatch, ScheduledSequence, StepResult
from modules.engine.text_part import find_text_part
from modules.engine.torch_attention import TorchAttention
from modules.engine.transfer import upload

# Of torch and of the compiled functions. On the CPU nothing in int8 is rounded by their number.
NUM_THREADS = torch.get_num_threads()

# A model is tried out while others run: then two threads want to compute. Not all of numba's
# threading layers allow that, and side by side they would only take each other's cores.
_TURN = threading.Lock()


def can_batch(model: PreTrainedModel) -> bool:
    """Whether the model's code hands its attention to the function that its configuration names."""
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and not model.config.is_encoder_decoder
    )


def choose_block_size(model: PreTrainedModel) -> int:
    """In tokens: what the attention that the model is going to get wants."""
    return PAGE_SIZE if find_kernel(input_device(model)) else BLOCK_SIZE


def build_attention(device: torch.device, num_blocks: int, block_size: int) -> PagedAttention:
    if device.type == "cpu":
        return CpuAttention(num_blocks, block_size)
    kernel = find_kernel(device)
    if kernel is not None and block_size % PAGE_SIZE == 0:
        return VarlenAttention(num_blocks, block_size, kernel)
    return TorchAttention(num_blocks, block_size)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids are looked up; layers may be on other cards."""
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    return device


class ModelRunner:
    def __init__(self, model: PreTrainedModel, num_blocks: int, block_size: int) -> None:
        # A part that sees keeps its own.
        find_text_part(model).module.set_attn_implementation(ATTENTION_NAME)
        self._model = model.eval()
        fused_layers = find_fused_layers(model)
        self.layers: AdaptableLayers = fused_layers or LinearLayers(model)
        self._device = input_device(model)
        self._embedder = ImageEmbedder(model, self._device, fused_layers and fused_layers.rotate)
        self._can_select_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._attention = build_attention(self._device, num_blocks, block_size)
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def prepare(self, max_num_seqs: int, max_model_len: int) -> None:
        """Take a card's memory for keys and values now, and record steps from now on.

        Nothing must have been read yet.
        """
        if isinstance(self._attention, CpuAttention):
            return
        self._read([0], [0], self._attention.batch((Segment((0,), 0, 0, 1),)), [0])
        if isinstance(self._attention, VarlenAttention) and _num_devices(self._model) == 1:
            self._graphs = DecodeGraphs(
                self._read_rows,
                self._attention,
                self._device,
                max_num_seqs,
                max_model_len,
                make_cuda_graphs(self._device),
            )

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Read the batch's tokens, choose the next ones, and score those of prompts."""
        if self._device.type == "cpu":
            torch.set_num_threads(NUM_THREADS)
            most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
            numba.set_num_threads(min(NUM_THREADS, most))
        wants_states = any(item.seq.params.hidden_states for item in batch.items)
        with record_hidden_states(self._model, wants_states) as recorded:
            result = self._run(batch)
        return _add_hidden_states(result, batch, recorded[0]) if recorded else result

    def _run(self, batch: ScheduledBatch) -> StepResult:
        logits = self.forward(batch)
        num_scored_rows = sum(len(item.scored) for item in batch.scored)
        sampled, scored = logits.split([len(logits) - num_scored_rows, num_scored_rows])
        return StepResult(
            _sample_along(guide(sampled, batch.ending), batch.sampled),
            _score_prompts(scored, batch.scored),
        )

    @property
    def num_kv_bytes_per_token(self) -> int:
        return self._attention.num_bytes_per_token

    def forward(self, batch: ScheduledBatch) -> Tensor:
        """Logits, [num_rows, vocab_size], float32: after the last token of the sequences that are
        sampled and of their companions, and after each token of their drafts; then before each
        token of a prompt that is scored.
        """
        self._look_at_images(batch)
        packed = _pack(batch)
        with self.layers.adapting(packed.adapted):
            logits = self._replay(packed, batch)
            if logits is None:
                attention = self._attention.batch(packed.segments)
                logits = self._read(
                    packed.token_ids, packed.positions, attention, packed.kept, packed.images
                )
        return logits.float()

    def _look_at_images(self, batch: ScheduledBatch) -> None:
        for seq in (item.seq for item in batch.items):
            if seq.must_look:
                with _TURN:
                    embedded = [self._embedder.embed(group) for group in seq.images]
                images = [*chain.from_iterable(embedded)]
                seq.placed_images = place_images(images, seq.image_places)

    def _replay(self, packed: _Packed, batch: ScheduledBatch) -> Tensor | None:
        """The logits, if this step is one that can be recorded."""
        num_rows = len(packed.token_ids)
        is_step_of_ones = len(batch.items) == num_rows and packed.kept == [*range(num_rows)]
        # What is replayed adds no updates, reads ids, and does not tell its hidden states.
        wants_states = any(item.seq.params.hidden_states for item in batch.items)
        is_plain = not (packed.adapted or packed.images or wants_states)
        if self._graphs is None or not is_step_of_ones or not is_plain:
            return None
        return self._graphs.run(packed.token_ids, packed.positions, packed.segments)

    def _read(
        self,
        token_ids: list[int],
        positions: list[int],
        attention: AttentionBatch,
        rows: list[int],
        images: tuple[ImageRows, ...] = (),
    ) -> Tensor:
        ids, places = (upload([row], self._device) for row in (token_ids, positions))
        inputs = build_inputs(self._model, ids, places, images)
        # Layers may be on several cards: an index on the host goes with any of them.
        is_spread = _num_devices(self._model) > 1
        kept = upload(rows, torch.device("cpu") if is_spread else self._device, torch.long)
        selected = {"logits_to_keep": kept} if self._can_select_logits else {}
        with _TURN, added(self._model, images, len(token_ids)):
            logits = self._call(attention, **inputs, **selected)
        return logits if self._can_select_logits else logits[kept]

    def _read_rows(self, ids: Tensor, positions: Tensor, attention: AttentionBatch) -> Tensor:
        return self._call(attention, input_ids=ids[None], position_ids=positions[None])

    def _call(self, attention: AttentionBatch, **inputs: Tensor) -> Tensor:
        """Logits, [num_rows, vocab_size]."""
        output = self._model(use_cache=False, attention_batch=attention, **inputs)
        logits: Tensor = output.logits[0]
        return logits


def _num_devices(model: PreTrainedModel) -> int:
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) or 1


@dataclass(frozen=True, slots=True)
class _Packed:
    """All tokens of a batch in one row."""

    token_ids: list[int]
    positions: list[int]
    segments: tuple[Segment, ...]
    kept: list[int]
    """Places in the row whose logits are wanted, those to sample from first."""
    adapted: tuple[AdaptedRows, ...]
    images: tuple[ImageRows, ...]
    """What is read in the places of their tokens."""


def _pack(batch: ScheduledBatch) -> _Packed:
    token_ids: list[int] = []
    positions: list[int] = []
    segments = []
    adapted = []
    images: list[ImageRows] = []
    first_rows: dict[int, int] = {}
    for adapters, items in groupby(_sort_by_adapters(batch.items), lambda item: item.seq.adapters):
        start = len(token_ids)
        for item in items:
            first_rows[id(item)] = offset = len(token_ids)
            end = item.end + len(item.draft)
            # Attended to as if alone, a draft's tokens are rounded as in steps of one.
            for first, stop in pairwise((item.start, *range(item.end, end + 1))):
                segments.append(Segment(item.block_table, offset + first - item.start, first, stop))
            token_ids += [*item.seq.token_ids[item.start : item.end], *item.draft]
            placed = item.seq.placed_images
            positions += find_positions(placed, item.start, end)
            images += find_rows(placed, item.start, item.end, offset)
        if adapters:
            adapted.append(AdaptedRows(start, len(token_ids), adapters))
    kept: list[int] = []
    for item in batch.ending:
        end = first_rows[id(item)] + item.num_tokens
        kept += range(end - 1 - len(item.draft), end)
    for item in batch.items:
        # What follows a token is said by its own row.
        kept += [first_rows[id(item)] + place - 1 - item.start for place in item.scored]
    return _Packed(token_ids, positions, tuple(segments), kept, tuple(adapted), tuple(images))


def _sort_by_adapters(items: tuple[ScheduledSequence, ...]) -> list[ScheduledSequence]:
    """Those with the same ones together; apart from that, their order stays."""
    return sorted(items, key=lambda item: [adapter.number for adapter in item.seq.adapters])


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
        chosen = logits if len(rows) == len(logits) else logits[upload(rows, logits.device)]
        for i, token in zip(active, sample(chosen, [seqs[i] for i in active]), strict=True):
            tokens[i].append(token)
        active = [i for i in active if _is_foreseen(tokens[i], items[i].draft)]
        for i in active:
            if seqs[i] is items[i].seq:
                seqs[i] = seqs[i].fork()
            token = tokens[i][-1]
            seqs[i].append(token.token_id, token.sampler_state)
    return tokens


def _score_prompts(logits: Tensor, items: tuple[ScheduledSequence, ...]) -> list[list[Logprobs]]:
    """Of the tokens that `items` score, one row of `logits` each."""
    counts = [len(item.scored) for item in items]
    return [
        compute_logprobs(
            rows,
            [item.seq.token_ids[place] for place in item.scored],
            [item.seq.params.num_logprobs or 0] * len(item.scored),
        )
        for rows, item in zip(logits.split(counts), items, strict=True)
    ]


def _add_hidden_states(result: StepResult, batch: ScheduledBatch, states: Tensor) -> StepResult:
    """To all log-probabilities; `states` [num_rows, hidden_size], of the rows that logits are."""
    rows = iter(states.numpy())
    of_ending = [(item, list(islice(rows, 1 + len(item.draft)))) for item in batch.ending]
    of_sampled = [own for item, own in of_ending if item.seq.primary is None]
    return StepResult(
        [
            [add_hidden_state(token, row) for token, row in zip(tokens, own, strict=False)]
            for tokens, own in zip(result.sampled, of_sampled, strict=True)
        ],
        [[replace(s, hidden_state=next(rows)) for s in scores] for scores in result.scored],
    )


def add_hidden_state(token: SampledToken, state: NDArray[np.float32]) -> SampledToken:
    if token.logprobs is None:
        return token
    return replace(token, logprobs=replace(token.logprobs, hidden_state=state))


def _is_foreseen(tokens: list[SampledToken], draft: tuple[int, ...]) -> bool:
    return len(tokens) <= len(draft) and tokens[-1].token_id == draft[len(tokens) - 1]
