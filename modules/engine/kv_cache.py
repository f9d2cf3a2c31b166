"""KVCache: the keys and values themselves, one pair of tensors per slot and layer."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Storage is made when a slot is first written, in the shape and type of what is written.

    A slot's tensors are contiguous along the tokens, so attention reads them in place.
    """

    def __init__(self) -> None:
        self._slots: dict[int, dict[int, Tensor]] = {}

    def write(
        self, layer: int, slot: int, start: int, capacity: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store `keys` and `values`, each [num_kv_heads, num_tokens, head_dim], from position
        `start`.

        Returns all keys and values of the slot so far, [num_kv_heads, start + num_tokens,
        head_dim] each, as views. `capacity` is in tokens.
        """
        key_store, value_store = self._reserve(layer, slot, capacity, keys, values)
        end = start + keys.shape[1]
        key_store[:, start:end] = keys
        value_store[:, start:end] = values
        return key_store[:, :end], value_store[:, :end]

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def num_bytes(self, slot: int) -> int:
        """What is allocated for a slot, in bytes, over all layers."""
        return sum(store.nbytes for store in self._slots.get(slot, {}).values())

    def _reserve(
        self, layer: int, slot: int, capacity: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        layers = self._slots.setdefault(slot, {})
        for index, like in ((2 * layer, keys), (2 * layer + 1, values)):
            store = layers.get(index)
            if store is not None and store.shape[1] == capacity:
                continue
            grown = torch.empty(
                like.shape[0], capacity, like.shape[2], dtype=like.dtype, device=like.device
            )
            if store is not None:
                grown[:, : store.shape[1]] = store
            layers[index] = grown
        return layers[2 * layer], layers[2 * layer + 1]
