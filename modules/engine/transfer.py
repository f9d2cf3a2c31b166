"""Numbers from the host to a device, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`values`, a list or an array, as a tensor on `device`.

    A card reads them when it gets there: they lie in memory that torch keeps until then.
    """
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
