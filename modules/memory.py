"""Memory: how much is free, of this machine, of a container, and of cards; how much of it the
models promise to their keys and values; and giving it back.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

GIB = 2**30
CGROUP_ROOT = Path("/sys/fs/cgroup")

# Of the memory that is free once the weights are loaded, for the keys and values of all models.
KV_CACHE_SHARE = {"cpu": 0.4, "cuda": 0.85}


@dataclass(frozen=True, slots=True, eq=False)
class KVPart:
    """What one model has been promised, on one kind of device."""

    budget: KVBudget
    device: str
    num_bytes: int

    def give_back(self) -> None:
        """Idempotent."""
        self.budget.give_back(self)


class KVBudget:
    """What all models together may keep of keys and values; for any thread."""

    def __init__(self) -> None:
        self._parts: list[KVPart] = []
        self._lock = threading.Lock()

    def reserve(
        self,
        device: str,
        free: int,
        *,
        total: int | None = None,
        most: int | None = None,
        num_to_come: int = 1,
        replaced: Collection[KVPart] = (),
    ) -> KVPart:
        """A fair part of what is left: with others to come, one of `num_to_come` equal ones.

        What is shared is `total` bytes, or a share of what would be free if no model had a part.
        `most`: what the model could use, if that is known. `replaced`: parts that will be given
        back as soon as the new model is there. The part may be of 0 bytes; it is the caller's to
        say that nothing fits into it.
        """
        with self._lock:
            taken = sum(
                part.num_bytes
                for part in self._parts
                if part.device == device and part not in replaced
            )
            if total is None:
                # A card's memory is taken at once; a CPU's is free until a block is written.
                available = free if device == "cpu" else free + taken
                total = int(available * KV_CACHE_SHARE[device])
            fair = max(0, total - taken) // num_to_come
            part = KVPart(self, device, fair if most is None else min(fair, most))
            self._parts.append(part)
            return part

    def give_back(self, part: KVPart) -> None:
        with self._lock:
            if part in self._parts:
                self._parts.remove(part)


def free_card_memory(cards: Sequence[torch.device]) -> int:
    """In bytes. Layers are spread evenly, so the fullest card says what the others can hold too."""
    torch.cuda.empty_cache()  # what trying the model out took
    return min(int(torch.cuda.mem_get_info(card)[0]) for card in cards) * len(cards)


def available_memory(cgroup_root: Path = CGROUP_ROOT) -> int:
    """Bytes that this process may still take: the host's, or less if a container has a limit."""
    available = psutil.virtual_memory().available
    versions = (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    )
    for limit_file, usage_file, stat_file, reclaimable in versions:
        try:
            limit = int((cgroup_root / limit_file).read_text())
            usage = int((cgroup_root / usage_file).read_text())
            stat = (cgroup_root / stat_file).read_text()
        except (OSError, ValueError):  # no such version, or "max"
            continue
        # Files that were read lately count as usage, and go when memory is needed.
        cached = re.search(rf"^{reclaimable} (\d+)$", stat, re.MULTILINE)
        return max(0, min(available, limit - usage + int(cached[1] if cached else 0)))
    return available


def release_memory() -> None:
    """Give back to the operating system, and to the card, what nothing refers to any more."""
    gc.collect()  # modules and their hooks refer to each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if trim := _find_malloc_trim():
        trim(0)


@cache
def _find_malloc_trim() -> Any:
    """glibc's: it keeps what is freed for itself, in an arena for each thread. Others have none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
