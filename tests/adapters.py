"""Adapters (LoRA) that peft writes: random ones, for models that tests have built."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ALL_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(
    model: PreTrainedModel, folder: Path, seed: int = 0, size: float = 0.15, **options: Any
) -> PeftModel:
    """The model with the adapter, as peft runs it; the adapter is written to `folder`."""
    wishes = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LAYERS, **options}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**wishes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    adapted.save_pretrained(folder)
    return adapted.eval()
