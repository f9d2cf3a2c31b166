"""The decoder layers of known models as one module for the CPU: products of integers, few
passes.

Same mathematics as transformers' layers, over rows of packed sequences. What is not known here is
left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from modules.engine import cpu_kernels
from modules.engine.cpu_attention import CpuAttentionBatch
from modules.engine.low_rank import AdaptedRows, Adapter, LowRank, Shapes, Updates
from modules.engine.quantization import Int4Weights, Int8Weights, Rotation, Weights, hadamard
from modules.engine.text_part import find_text_part

# Layers whose forward is, to the letter, the one below.
KNOWN_LAYERS: tuple[type[nn.Module], ...] = (
    LlamaDecoderLayer,
    MistralDecoderLayer,
    Qwen2DecoderLayer,
)


PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""By the numbers that `cpu_kernels.LowRankUpdates` has for them."""

LANES = cpu_kernels.UNIT.lanes

FORMATS: dict[str, type[Weights]] = {"int8": Int8Weights, "int4": Int4Weights}


def quantize_model(model: PreTrainedModel, dtype: str = "int8") -> bool:
    """Exchange the layers of `model` for those of a format, in place; False if they are not known.

    The head becomes int8 in any case. In int8 hidden states are rotated from the embeddings on. In
    int4 they are not: groups keep outliers apart, and weights that a file has in 4 bits stay what
    they are.
    """
    part = find_text_part(model)
    base = part.module
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(_is_known(layer) for layer in layers):
        return False
    head = model.get_output_embeddings()
    head_weight, rotation, norm_weight = head.weight.detach().float(), None, None
    if dtype == "int8":
        rotation = Rotation(base.config.hidden_size)
        norm_weight = base.norm.weight.detach().float()
        head_weight = rotation.apply(head_weight * norm_weight)
        base.norm.weight.data = torch.ones_like(base.norm.weight)
        base.embed_tokens.weight = nn.Parameter(
            rotation.apply(base.embed_tokens.weight.detach().float()), requires_grad=False
        )
    path = part.to_path("layers")
    base.layers = nn.ModuleList([FusedLayers(path, layers, FORMATS[dtype], rotation)])
    model.set_output_embeddings(_Int8Head(head_weight, head.bias, rotation, norm_weight))
    for parameter in model.parameters():
        # One tensor that still lies in the mapped file of weights would keep all of it in memory.
        parameter.data = parameter.data.clone()
    return True


def _is_known(layer: Any) -> bool:
    if type(layer) not in KNOWN_LAYERS:
        return False
    mlp = layer.mlp
    unbiased = (layer.self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return type(mlp.act_fn) in (nn.SiLU, SiLUActivation) and all(p.bias is None for p in unbiased)


def find_fused_layers(model: PreTrainedModel) -> FusedLayers | None:
    layers = getattr(find_text_part(model).module, "layers", None) or [None]
    return layers[0] if isinstance(layers[0], FusedLayers) else None


class FusedLayers(nn.Module):
    """All layers of a model. It stands where the first of them stood.

    See `AdaptableLayers` for how adapters change them.
    """

    def __init__(
        self, path: str, layers: nn.ModuleList, kind: type[Weights], rotation: Rotation | None
    ) -> None:
        """`path`: that of the layers in the model; `rotation`: that of the hidden states."""
        super().__init__()
        self._path = path
        self._rotation = rotation
        self._folded_norms = [_norm_weights(layer) for layer in layers] if rotation else []
        self._updates = NO_UPDATES
        first: Any = layers[0]
        attention, mlp = first.self_attn, first.mlp
        self._head_dim: int = attention.head_dim
        self._num_heads = attention.q_proj.out_features // self._head_dim
        self._num_kv_heads = attention.k_proj.out_features // self._head_dim
        self._scale = np.float32(attention.scaling)
        hidden_size, num_gated = mlp.gate_proj.in_features, mlp.gate_proj.out_features
        num_queries, num_keys = (
            count * self._head_dim for count in (self._num_heads, self._num_kv_heads)
        )
        num_qkv = num_queries + 2 * num_keys
        self._num_gated = num_gated
        self._num_inputs = (*(hidden_size,) * 3, num_queries, hidden_size, hidden_size, num_gated)
        of_attention = num_queries, num_keys, num_keys, hidden_size
        self._num_outputs = (*of_attention, num_gated, num_gated, hidden_size)
        self._first_columns = (0, num_queries, num_queries + num_keys, 0, 0, num_gated, 0)
        self._mixed_size = _mixed_size(num_gated) if rotation else 1
        qkv = kind(len(layers), num_qkv, hidden_size)
        output = kind(len(layers), hidden_size, self._num_heads * self._head_dim)
        gate_up = kind(len(layers), 2 * num_gated, hidden_size)
        down = kind(len(layers), hidden_size, num_gated)
        self._weights = cpu_kernels.LayerWeights(
            qkv.matrices,
            output.matrices,
            gate_up.matrices,
            down.matrices,
            biases=_stack_biases(layers, qkv.matrices.packed.shape[1] * cpu_kernels.PANEL),
            norms=np.ones((len(layers), 2, hidden_size), np.float32),
            epsilons=np.array([_epsilons(layer) for layer in layers], np.float32),
            windows=np.array([_sliding_window(layer) or 0 for layer in layers], np.int64),
        )
        for index, layer in enumerate(layers):
            if rotation:
                parts = _rotate_weights(layer, rotation, self._mixed_size)
            else:
                parts = _collect_weights(layer)
                for row, norm in zip(self._weights.norms[index], _norm_weights(layer), strict=True):
                    row[:] = norm.numpy()
            for weights, weight in zip((qkv, output, gate_up, down), parts, strict=True):
                weights.set(index, weight)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_batch: CpuAttentionBatch,
        **kwargs: object,
    ) -> Tensor:
        """`hidden_states` [1, num_tokens, hidden_size]; the result likewise."""
        hidden = hidden_states[0].clone().numpy()
        cos, sin = (table[0].contiguous().numpy() for table in position_embeddings)
        keys, values = attention_batch.caches(
            len(self._weights.windows), self._num_kv_heads, self._head_dim
        )
        cpu_kernels.run_layers(
            hidden,
            self._weights,
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            self._num_gated,
            self._mixed_size,
            self._scale,
            cos,
            sin,
            attention_batch.segments(self._num_heads // self._num_kv_heads),
            keys,
            values,
            cpu_kernels.NO_SINKS,
            self._updates,
        )
        return torch.from_numpy(hidden)[None]

    def rotate(self, embeddings: Tensor) -> Tensor:
        """[..., hidden_size], of what has another source than the model's own embeddings."""
        return self._rotation.apply(embeddings) if self._rotation else embeddings

    @property
    def shapes(self) -> Shapes:
        sizes = zip(self._num_inputs, self._num_outputs, strict=True)
        of_one = dict(zip(PROJECTIONS, sizes, strict=True))
        return {
            f"{self._path}.{layer}.{name}": shape
            for layer in range(len(self._weights.windows))
            for name, shape in of_one.items()
        }

    def prepare(self, name: str, updates: Updates) -> Adapter:
        weights = [self._stack(number, updates) for number in range(len(PROJECTIONS))]
        return Adapter(name, weights)

    @contextmanager
    def adapting(self, rows: tuple[AdaptedRows, ...]) -> Iterator[None]:
        if not rows:
            yield
            return
        self._updates = _to_updates(rows, self._columns)
        try:
            yield
        finally:
            self._updates = NO_UPDATES

    @cached_property
    def _columns(self) -> NDArray[np.int64]:
        """As of `LowRankUpdates`: the whole vectors that a projection's results lie in."""
        firsts = np.array(self._first_columns)
        ends = firsts + self._num_outputs
        starts = firsts - firsts % LANES
        return np.stack([starts, -(-ends // LANES) * LANES - starts], axis=1)

    def _stack(self, projection: int, updates: Updates) -> _Stacked | None:
        """What changes one projection, of all layers; None: nothing does."""
        paths = [
            f"{self._path}.{layer}.{PROJECTIONS[projection]}"
            for layer in range(len(self._weights.windows))
        ]
        rank = max((len(updates[path].down) for path in paths if path in updates), default=0)
        if rank == 0:
            return None
        start, num_columns = self._columns[projection]
        first = self._first_columns[projection] - start
        rank = -(-rank // LANES) * LANES
        downs = np.zeros((len(paths), self._num_inputs[projection], rank), np.float32)
        ups = np.zeros((len(paths), rank, num_columns), np.float32)
        for layer, path in enumerate(paths):
            if path in updates:
                down, up = self._fit(layer, projection, updates[path])
                downs[layer, :, : len(down)] = down.t().numpy()
                ups[layer, : len(down), first : first + len(up)] = up.t().numpy()
        return _Stacked(downs, ups)

    def _fit(self, layer: int, projection: int, update: LowRank) -> tuple[Tensor, Tensor]:
        """As `_rotate_weights` changes the weight that it is added to."""
        down, up = update.down.float(), update.up.float()
        if self._rotation is None:
            return down, up
        match PROJECTIONS[projection]:
            case "self_attn.o_proj":
                return down, self._rotation.apply(up.t()).t()
            case "mlp.down_proj":
                return _mix_inputs(down, self._mixed_size), self._rotation.apply(up.t()).t()
            case name:
                norm = self._folded_norms[layer][name.startswith("mlp")]
                return self._rotation.apply(down * norm), up


@dataclass(frozen=True, slots=True)
class _Stacked:
    """What an adapter adds to one projection; see `cpu_kernels.LowRankUpdates`."""

    downs: NDArray[np.float32]
    ups: NDArray[np.float32]


NO_UPDATES = cpu_kernels.LowRankUpdates(
    tiles=np.zeros((0, 4), np.int64),
    ranks=np.zeros((0, len(PROJECTIONS)), np.int64),
    downs=np.zeros((0, len(PROJECTIONS)), np.int64),
    ups=np.zeros((0, len(PROJECTIONS)), np.int64),
    columns=np.zeros((len(PROJECTIONS), 2), np.int64),
)


def _to_updates(
    rows: tuple[AdaptedRows, ...], columns: NDArray[np.int64]
) -> cpu_kernels.LowRankUpdates:
    """For one step: whoever calls this keeps the adapters meanwhile."""
    num_rows = sum(item.end - item.start for item in rows)
    size = min(cpu_kernels.UNIT.rows, -(-num_rows // numba.get_num_threads()))
    tiles: list[tuple[int, int, int, int]] = []
    entries: list[list[_Stacked | None]] = []
    for item in rows:
        first = len(entries)
        entries += [adapter.weights for adapter in item.adapters]
        tiles += [
            (row, min(size, item.end - row), first, len(entries))
            for row in range(item.start, item.end, size)
        ]

    def gather(read: Callable[[_Stacked], int]) -> NDArray[np.int64]:
        return np.array([[read(own) if own else 0 for own in entry] for entry in entries], np.int64)

    return cpu_kernels.LowRankUpdates(
        tiles=np.array(tiles, np.int64),
        ranks=gather(lambda own: own.downs.shape[2]),
        downs=gather(lambda own: own.downs.ctypes.data),
        ups=gather(lambda own: own.ups.ctypes.data),
        columns=columns,
    )


class _Int8Head(nn.Module):
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rotation: Rotation | None,
        norm_weight: Tensor | None,
    ) -> None:
        """`rotation` of the hidden states; `norm_weight` if `weight` holds the norm's before it."""
        super().__init__()
        self._weights = Int8Weights(1, *weight.shape)
        self._weights.set(0, weight)
        self._bias = bias
        self._rotation = rotation
        self._norm_weight = norm_weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[1, num_tokens, hidden_size] → [1, num_tokens, vocab_size]"""
        logits = torch.from_numpy(self._weights.multiply(0, hidden_states[0].numpy()))
        return logits[None] if self._bias is None else logits[None] + self._bias

    def restore(self, hidden_states: Tensor) -> Tensor:
        """What the head as it was before would have been given."""
        if self._rotation is not None:
            hidden_states = self._rotation.undo(hidden_states)
        return hidden_states if self._norm_weight is None else hidden_states * self._norm_weight


Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries, keys and values; output; gate and up; down."""


def _collect_weights(layer: Any) -> Parts:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    weights = qkv, attention.o_proj.weight, gate_up, mlp.down_proj.weight
    qkv, output, gate_up, down = (weight.detach().float() for weight in weights)
    return qkv, output, gate_up, down


def _rotate_weights(layer: Any, rotation: Rotation, mixed_size: int) -> Parts:
    """For rotated hidden states. The norms' weights become part of the weights after them."""
    qkv, output, gate_up, down = _collect_weights(layer)
    before_attention, before_mlp = _norm_weights(layer)
    return (
        rotation.apply(qkv * before_attention),
        rotation.apply(output.t()).t(),
        rotation.apply(gate_up * before_mlp),
        _mix_inputs(rotation.apply(down.t()).t(), mixed_size),
    )


def _mixed_size(num_inputs: int) -> int:
    """The greatest power of two that divides them: that many `quantize_gated` mixes."""
    return num_inputs & -num_inputs


def _mix_inputs(weight: Tensor, mixed_size: int) -> Tensor:
    """The weight for inputs that `quantize_gated` has mixed."""
    count = mixed_size // cpu_kernels.MIXED_TOGETHER
    if count < 2:
        return weight
    parts = weight.unflatten(1, (-1, count, cpu_kernels.MIXED_TOGETHER))
    mixed: Tensor = hadamard(count) @ parts / count
    return mixed.flatten(1)


def _stack_biases(layers: nn.ModuleList, num_columns: int) -> NDArray[np.float32]:
    """[num_layers, num_columns], or [num_layers, 0] if there are none."""
    rows = []
    for layer in layers:
        attention: Any = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [p.bias.detach().float() for p in projections if p.bias is not None]
        rows.append(torch.cat(biases) if biases else torch.zeros(0))
    width = num_columns if any(len(row) for row in rows) else 0
    return np.stack([F.pad(row, (0, width - len(row))).numpy() for row in rows])


def _epsilons(layer: Any) -> tuple[float, float]:
    before_attention, before_mlp = _norms(layer)
    return before_attention.variance_epsilon, before_mlp.variance_epsilon


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _norm_weights(layer: Any) -> tuple[Tensor, Tensor]:
    """In memory of their own."""
    before_attention, before_mlp = (norm.weight.detach().clone().float() for norm in _norms(layer))
    return before_attention, before_mlp


def _sliding_window(layer: Any) -> int | None:
    """Qwen's attention says it itself, layer by layer; Mistral's has it from the configuration."""
    attention = layer.self_attn
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window
