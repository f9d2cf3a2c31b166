"""Rotary positions that depend on how long a row is, and how they are kept from doing so.

A sequence must not be read in another way because of what else is in its batch.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modules.errors import NotBatchableError

logger = logging.getLogger(__name__)


def pin_rotary_factors(model: PreTrainedModel, max_model_len: int) -> None:
    """Let no sequence change the rotary positions of those beside it.

    transformers chooses them by the longest sequence in the row. With `longrope` there are two sets
    for that: from here on one is used for all, the long one if a sequence may be so long.
    """
    config = model.config.get_text_config()
    for rope in _rope_parameters(config):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") != "longrope" or original is None:
            continue
        used = "long" if max_model_len > original else "short"
        logger.info("Rotary positions: the %s factors, for all lengths", used)
        for name in ("factor", "mscale"):
            if f"{used}_{name}" in rope:
                rope[f"short_{name}"] = rope[f"long_{name}"] = rope[f"{used}_{name}"]
    _refresh_rotary_modules(model)


def _refresh_rotary_modules(model: PreTrainedModel) -> None:
    """They have computed their frequencies from the two sets that there were before."""
    for module in model.modules():
        if getattr(module, "rope_type", None) != "longrope":
            continue
        rotary: Any = module
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, rotary.inv_freq.device)
        rotary.inv_freq.copy_(frequencies)
        rotary.original_inv_freq = frequencies
        rotary.long_inv_freq = frequencies


def require_fixed_positions(config: PretrainedConfig, max_model_len: int) -> None:
    """Raises NotBatchableError if what a token sees may depend on how long its row is."""
    limits = [
        (
            rope.get("original_max_position_embeddings") or config.max_position_embeddings,
            "its rotary positions would follow the longest of all requests",
        )
        for rope in _rope_parameters(config)
        if "dynamic" in str(rope.get("rope_type"))
    ]
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        limits.append((config.attention_chunk_size, "its attention goes by chunks from there on"))
    for limit, reason in limits:
        if max_model_len > limit:
            raise NotBatchableError(
                f'With more than {limit} tokens this kind of model ("{config.model_type}") cannot '
                f"be batched: {reason}. With --max-model-len {limit} it is."
            )


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """One dictionary, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]
