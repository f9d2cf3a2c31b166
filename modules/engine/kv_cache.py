"""KVCache: the keys and values themselves, in blocks that any sequence may hold."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Storage of a layer is made when it is first written, in the shape and type of what is
    written.

    On a CPU it costs memory only where something has been written, on a card at once.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._shape = (num_blocks, block_size)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers that have been written."""
        return sum(
            store[0, 0].nbytes for key_and_value in self._layers.values() for store in key_and_value
        )

    def write(
        self, layer: int, slots: Tensor, begun_blocks: Tensor | None, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store `keys` and `values`, [num_tokens, num_kv_heads, head_dim] each.

        `slots` [num_tokens] are their places, block × block size + offset. `begun_blocks` are
        cleared before: what an earlier holder left there need not even be a number. None: whoever
        reads them looks at nothing but what has been written.

        Returns: keys and values of the layer, [num_blocks, block_size, num_kv_heads, head_dim].
        """
        stores = self._reserve(layer, keys, values)
        for store, new in zip(stores, (keys, values), strict=True):
            if begun_blocks is not None and len(begun_blocks):
                store.index_fill_(0, begun_blocks, 0)
            store.view(-1, *store.shape[2:]).index_copy_(0, slots, new)
        return stores

    def _reserve(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            self._layers[layer] = (
                keys.new_empty(*self._shape, *keys.shape[1:]),
                values.new_empty(*self._shape, *values.shape[1:]),
            )
        return self._layers[layer]
