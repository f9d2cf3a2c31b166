"""Adapters (LoRA) on this disk: which there are, and what one of them changes in a model.

peft reads the files, and says how they scale. What cannot be applied as low-rank updates of single
layers is refused by name.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from modules.engine.low_rank import LowRank, Shapes, Updates
from modules.errors import MissingPackageError, ModelLoadError, ModelNotFoundError

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
# What these say is in the weights already, or only matters while an adapter is trained.
_APPLIED_FIELDS = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora
    init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    megatron_core eva_config ensure_weight_tying qalora_group_size
    """.split()  # noqa: SIM905
)
# Other ways to begin a training change the model's own weights too.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
# The most that a number of 16 bits can be. No training makes such weights; a model would make what
# is no number of them.
_MAX_WEIGHT = torch.finfo(torch.float16).max
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")


def list_adapters(lora_dir: Path) -> list[str]:
    """Names of the folders that hold one, sorted."""
    return sorted(path.parent.name for path in lora_dir.glob(f"*/{CONFIG_FILE}"))


def read_adapter(
    name: str, lora_dir: Path, base: str, shapes: Shapes, base_classes: Sequence[str] = ()
) -> Updates:
    """What the adapter changes in the model `base`, whose layers have these `shapes`.

    `base_classes`: what the model's class may be called, as far as that is known.

    Raises:
        ModelNotFoundError: no folder in `lora_dir` has that name.
        ModelLoadError: its files are damaged, it is of another kind, or made for another model.
        MissingPackageError: peft is not there.
    """
    folder = find_adapter(name, lora_dir)
    config = _read_config(folder)
    _check_base(name, config, base, base_classes)
    updates = _to_updates(folder, config, _read_weights(folder))
    for path, update in updates.items():
        if update.shape != shapes.get(path):
            raise _refuse_base(name, config, base, path, update, shapes)
    return updates


def find_adapter(name: str, lora_dir: Path) -> Path:
    """Raises ModelNotFoundError. A name may come from a client: it is never made into a path."""
    names = list_adapters(lora_dir)
    if name in names:
        return lora_dir / name
    nearest = difflib.get_close_matches(name, names, 5, cutoff=0)
    these = "These are there" if len(nearest) == len(names) else f"Of {len(names)}, the nearest are"
    there = f"{these}: {', '.join(nearest)}." if nearest else "There is none."
    raise ModelNotFoundError(f"There is no adapter {name[:100]!r} in {lora_dir}. {there}")


# Files


def _read_config(folder: Path) -> LoraConfig:
    # Here and not above: it takes seconds, and most servers have no adapters.
    try:
        from peft import LoraConfig, PeftConfig
    except ImportError as error:
        raise MissingPackageError("Adapters", "peft") from error
    try:
        document = PeftConfig.from_json_file(str(folder / CONFIG_FILE))
        kind = str(document.get("peft_type"))
        if kind != "LORA":
            raise ModelLoadError(f"{folder.name} is an adapter of the kind {kind}, not LORA.")
        known = {row.name for row in fields(LoraConfig)}
        config = LoraConfig(**{key: value for key, value in document.items() if key in known})
        _check_values(config)
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    unknown = [key for key, value in document.items() if key not in known and value]
    _refuse_features(folder, [*unknown, *_find_features(config)])
    return config


def _check_values(config: LoraConfig) -> None:
    """Those that are used here; peft takes anything. Raises ValueError."""
    for key, is_right in (
        ("auto_mapping", _is_optional(dict)),
        ("base_model_name_or_path", _is_optional(str)),
        ("r", _is_rank),
        ("lora_alpha", _is_finite),
        ("rank_pattern", partial(_is_pattern, _is_rank)),
        ("alpha_pattern", partial(_is_pattern, _is_finite)),
    ):
        value = getattr(config, key)
        if not is_right(value):
            raise ValueError(f"{key} is {str(value)[:100]!r}")


def _is_optional(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kind)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _is_pattern(is_right: Callable[[Any], bool], value: Any) -> bool:
    """Values of layers, by regular expressions that their paths end with."""
    try:
        return value is None or all(
            is_right(each) and re.compile(rf"(.*\.)?({layers})$") for layers, each in value.items()
        )
    except (AttributeError, re.error):
        return False


def _find_features(config: LoraConfig) -> list[str]:
    """What it asks for beside low-rank updates."""
    plain = type(config)()
    names = [row.name for row in fields(config) if row.name not in _APPLIED_FIELDS]
    found = [name for name in names if getattr(config, name) not in (getattr(plain, name), None)]
    if config.init_lora_weights not in _PLAIN_BEGINNINGS:
        found.append(f"init_lora_weights: {config.init_lora_weights}")
    return found


def _refuse_features(folder: Path, names: list[str]) -> None:
    if names:
        used = ", ".join(names)
        raise ModelLoadError(f"The adapter {folder.name} uses {used}: that is not supported.")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from peft import load_peft_weights

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        reason = f"has no {WEIGHTS_FILE}"
        if (folder / PICKLE_FILE).exists():
            reason += f"; {PICKLE_FILE} could run code of its own, and is not read"
        raise ModelLoadError(f"The adapter {folder.name} {reason}.")
    try:
        weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ModelLoadError(f"{path} is damaged: {error}") from error
    return weights


# What the weights mean


def _to_updates(folder: Path, config: LoraConfig, weights: dict[str, Tensor]) -> dict[str, LowRank]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, weight in weights.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ModelLoadError(
                f"The adapter {folder.name} changes {key.removeprefix('base_model.model.')}: only "
                "low-rank updates of linear layers between embeddings and head are supported."
            )
        pairs.setdefault(match["path"], {})[match["part"]] = weight
    if not pairs:
        raise ModelLoadError(f"{folder / WEIGHTS_FILE} is empty.")
    return {path: _to_update(folder, config, path, pair) for path, pair in pairs.items()}


def _to_update(folder: Path, config: LoraConfig, path: str, pair: dict[str, Tensor]) -> LowRank:
    rank, scaling = _find_scaling(config, path)
    down, up = pair.get("A"), pair.get("B")
    if down is None or up is None or down.shape[:-1] != (rank,) or up.shape[1:] != (rank,):
        raise ModelLoadError(
            f"{folder / WEIGHTS_FILE} is damaged: it has no update of rank {rank} for {path}."
        )
    scaled = up.float() * scaling
    if not all(bool((part.abs() <= _MAX_WEIGHT).all()) for part in (down, scaled)):
        raise ModelLoadError(
            f"{folder / WEIGHTS_FILE} is damaged: for {path}, it holds what is no number, or, with "
            f"a scaling of {scaling:g}, is too large for one of 16 bits."
        )
    return LowRank(down, scaled)


def _find_scaling(config: LoraConfig, path: str) -> tuple[int, float]:
    """Rank and scaling of the update of one layer."""
    from peft.utils.other import get_pattern_key

    def choose(pattern: dict[str, Any] | None, default: Any) -> Any:
        known = pattern or {}
        return known.get(get_pattern_key(list(known), path), default)

    rank = int(choose(config.rank_pattern, config.r))
    alpha = float(choose(config.alpha_pattern, config.lora_alpha))
    return rank, alpha / (rank**0.5 if config.use_rslora else rank)


def _check_base(name: str, config: LoraConfig, base: str, base_classes: Sequence[str]) -> None:
    """As far as its configuration tells. Raises ModelLoadError."""
    made_for = (config.auto_mapping or {}).get("base_model_class")
    named = (config.base_model_name_or_path or "").rstrip("/").rpartition("/")[2]
    if made_for and base_classes and made_for not in base_classes:
        raise ModelLoadError(
            f"The adapter {name} was made for another base model: for a {made_for}, and {base} is "
            f"a {' or '.join(base_classes)}."
        )
    if not made_for and named.lower() not in base.lower():
        logger.warning("The adapter %s was made for %s; it is loaded for %s", name, named, base)


def _refuse_base(
    name: str, config: LoraConfig, base: str, path: str, update: LowRank, shapes: Shapes
) -> ModelLoadError:
    made_for = config.base_model_name_or_path or "a model that it does not name"
    change = f"changes {path} ({update.shape[0]} × {update.shape[1]})"
    there = "has no such layer that adapters can change"
    if path in shapes:
        there = f"has {shapes[path][0]} × {shapes[path][1]} there"
    return ModelLoadError(
        f"The adapter {name} was made for another base model ({made_for}): it {change}, and {base} "
        f"{there}."
    )
