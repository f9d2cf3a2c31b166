"""How much memory is free: of this machine, of a container, and of cards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

GIB = 2**30
CGROUP_ROOT = Path("/sys/fs/cgroup")


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
