"""Adapters: which adapters (LoRA) a loaded model has.

All of them are loaded beside the weights, which stay what they are. A generation keeps those that
it began with, whatever is loaded and unloaded meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from modules.adapter_files import list_adapters, read_adapter
from modules.engine.low_rank import AdaptableLayers, Adapter
from modules.errors import AdapterNotFoundError, ModelLoadError

NO_ADAPTER = "none"
"""What a request calls the model without any."""


class Adapters:
    """Those of one loaded model, by name, in the order in which they were loaded."""

    def __init__(
        self,
        base: str,
        lora_dir: Path,
        layers: AdaptableLayers | None,
        base_classes: Sequence[str] = (),
    ) -> None:
        """`base`: the model's name; `layers`: those of its engine, None if they cannot change;
        `base_classes`: what the model's class may be called, which adapters may ask for.
        """
        self._base = base
        self._base_classes = base_classes
        self._lora_dir = lora_dir
        self._layers = layers
        self._loaded: Mapping[str, Adapter] = MappingProxyType({})
        self._is_changing = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    @property
    def all(self) -> tuple[Adapter, ...]:
        return tuple(self._loaded.values())

    def list_names(self) -> list[str]:
        """Of those that are on this disk, sorted."""
        return list_adapters(self._lora_dir)

    def get(self, name: str, param: str) -> Adapter:
        """Raises AdapterNotFoundError, which blames the field `param`."""
        try:
            return self._loaded[name]
        except KeyError:
            raise AdapterNotFoundError(name, self.names, param) from None

    def load(self, names: Iterable[str]) -> None:
        """Load these beside those that are there; what is loaded already is read anew.

        If one fails, nothing changes. Raises what `read_adapter` raises.
        """
        # In a thread that ends: OpenMP keeps a team of helpers for each one that computes.
        with self._is_changing, ThreadPoolExecutor(1, "adapters") as executor:
            read = [executor.submit(self._prepare, name) for name in dict.fromkeys(names)]
            new = {future.result().name: future.result() for future in read}
            self._loaded = MappingProxyType({**self._loaded, **new})

    def unload(self, names: Sequence[str] | None = None) -> None:
        """These; None: all of them. Who generates with one goes on with it.

        Raises AdapterNotFoundError, which blames the field `lora_names`; then, nothing changes.
        """
        with self._is_changing:
            wanted = self.names if names is None else names
            leaving = [self.get(name, "lora_names").name for name in wanted]
            kept = {name: each for name, each in self._loaded.items() if name not in leaving}
            self._loaded = MappingProxyType(kept)

    def close(self) -> None:
        """With its model: nothing here holds any of its memory any more."""
        with self._is_changing:
            self._loaded = MappingProxyType({})
            self._layers = None

    def _prepare(self, name: str) -> Adapter:
        if self._layers is None:
            raise ModelLoadError(
                f"{self._base} runs one request at a time; adapters are for models in batches."
            )
        if name == NO_ADAPTER:
            raise ModelLoadError(f"No adapter can be called {name}: it means none.")
        if ":" in name:
            raise ModelLoadError(f"No adapter can be called {name}: a colon ends a model's name.")
        updates = read_adapter(
            name, self._lora_dir, self._base, self._layers.shapes, self._base_classes
        )
        return self._layers.prepare(name, updates)
