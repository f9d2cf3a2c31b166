"""Low-rank adapters (LoRA, Hu et al. 2021) in a batch: the rows of a sequence get the updates of
its own adapters, and the weights stay what they are.

Rows with the same adapters lie together, so each update is two small products for one slice of
them. Which layers can be changed, and how, is said by the layers: as transformers made them, here;
those of `fused_layers.py`, there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modules.engine.text_part import find_text_part

_NUMBERS = count(1)

Shapes = Mapping[str, tuple[int, int]]
"""Inputs and outputs of layers, by their paths in the model."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a linear layer's result for x: x @ downᵀ @ upᵀ."""

    down: Tensor
    """[rank, num_inputs]"""
    up: Tensor
    """[num_outputs, rank]; the adapter's scaling is in it."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.down.shape[1], self.up.shape[0]


Updates = Mapping[str, LowRank]
"""By the layers' paths."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """As the layers of one model use it. A request brings its own: no engine has a list of them."""

    name: str
    weights: Any
    """Of those layers' own kind."""
    number: int = field(default_factory=lambda: next(_NUMBERS))
    """Of no other adapter, nor of this one when it is loaded anew."""


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Rows [start, end) of a step get the updates of these adapters, added up in their order."""

    start: int
    end: int
    adapters: tuple[Adapter, ...]


class AdaptableLayers(Protocol):
    @property
    def shapes(self) -> Shapes:
        """Of the layers that can be changed."""
        ...

    def prepare(self, name: str, updates: Updates) -> Adapter:
        """`updates` of layers that are in `shapes`, each of its shape. Safe in any thread."""
        ...

    @contextmanager
    def adapting(self, rows: tuple[AdaptedRows, ...]) -> Iterator[None]:
        """While a step runs. Without rows it costs nothing."""
        ...


class LinearLayers:
    """Those of a model as transformers made it. Hooks add the updates, and are there only while
    steps need them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._rows: tuple[AdaptedRows, ...] = ()
        self._adapters: frozenset[Adapter] = frozenset()
        self._hooks: list[Any] = []
        self._num_calls = 0

    @cached_property
    def shapes(self) -> Shapes:
        return {path: _shape(module) for path, module in self._modules.items()}

    def prepare(self, name: str, updates: Updates) -> Adapter:
        return Adapter(name, {path: self._move(path, update) for path, update in updates.items()})

    @contextmanager
    def adapting(self, rows: tuple[AdaptedRows, ...]) -> Iterator[None]:
        if rows or self._hooks:
            self._exchange(rows)
        yield
        if self._num_calls != len(self._hooks):  # who reads a weight itself never gets its update
            raise RuntimeError("the model does not call all layers that its adapters change")

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        """Of the part that reads texts, between the embeddings and the head, which see other rows;
        and so do experts.
        """
        apart = {id(self._model.get_output_embeddings()), id(self._model.get_input_embeddings())}
        part = find_text_part(self._model)
        return {
            path: module
            for path, module in part.module.named_modules(prefix=part.path)
            if isinstance(module, nn.Linear | Conv1D)
            and id(module) not in apart
            and "experts" not in path.split(".")
        }

    def _move(self, path: str, update: LowRank) -> tuple[Tensor, Tensor]:
        """Both transposed, as they are multiplied with."""
        weight = self._modules[path].weight
        assert isinstance(weight, Tensor)
        dtype = weight.dtype if weight.is_floating_point() else self._model.dtype
        down, up = (
            part.t().to(weight.device, dtype).contiguous() for part in (update.down, update.up)
        )
        return down, up

    def _exchange(self, rows: tuple[AdaptedRows, ...]) -> None:
        self._rows, self._num_calls = rows, 0
        adapters = frozenset(adapter for item in rows for adapter in item.adapters)
        if adapters == self._adapters:
            return
        for hook in self._hooks:
            hook.remove()
        paths = {path for adapter in adapters for path in adapter.weights}
        self._adapters = adapters
        self._hooks = [
            self._modules[path].register_forward_hook(self._make_hook(path)) for path in paths
        ]

    def _make_hook(self, path: str) -> Any:
        weights = {a: a.weights[path] for a in self._adapters if path in a.weights}

        def add_updates(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            """Both [1, num_rows, ...]."""
            self._num_calls += 1
            (x,), (result,) = args[0], output
            for item in self._rows:
                for adapter in item.adapters:
                    if adapter in weights:
                        down, up = weights[adapter]
                        own = slice(item.start, item.end)
                        result[own].addmm_(x[own] @ down, up)

        return add_updates


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    num_inputs, num_outputs = module.weight.shape
    return int(num_inputs), int(num_outputs)
