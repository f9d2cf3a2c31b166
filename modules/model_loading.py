"""Loading a model: files → LoadedModel, with its engine running.

Sole caller of from_pretrained for models that write text. Which models are loaded at the same time
is `models.py`' business.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from modules import conversions
from modules.adapters import Adapters
from modules.engine.async_engine import AsyncEngine
from modules.engine.cache_manager import BLOCK_SIZE
from modules.engine.engine import Engine, EngineConfig
from modules.engine.fused_layers import FORMATS, quantize_model
from modules.engine.generate_engine import GenerateEngine
from modules.engine.inference_thread import InferenceThread
from modules.engine.probe import count_kv_bytes, probe, probe_alone
from modules.errors import (
    ModelLoadError,
    ModelNotFoundError,
    NotBatchableError,
    ServerError,
    UnfitSettingError,
)
from modules.image_processors import can_read_images, load_image_reader
from modules.image_reader import ImageReader
from modules.instruction_templates import ChatTemplate, choose_template
from modules.load_progress import LoadProgress, LoadStage, Report, report_nothing
from modules.loaded_model import LoadedModel
from modules.memory import GIB, KVBudget, KVPart, available_memory, free_card_memory
from modules.model_files import FoundModel, find_model
from modules.model_kinds import read_json
from modules.prequantized import prepare, quantization_of, unpack
from modules.prompt_encoder import PromptEncoder
from modules.rotary_positions import pin_rotary_factors, require_fixed_positions
from modules.settings import PROJECT_ROOT, Settings
from modules.vocabulary import Vocabulary
from modules.weight_files import check_weights, estimate_bytes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# So much more than the weights themselves does loading them take.
ROOM_FACTOR = 1.2
# Where a model says nothing about its context.
DEFAULT_MAX_MODEL_LEN = 2048

# What files that are damaged, or do not fit together, make the libraries raise.
_FILE_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    UnpicklingError,
    ValueError,
)


# Of transformers, which has told the rest in a report of hundreds of lines.
_IN_REPORT = "issues during automatic conversion of the weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What a model shares with those that it is loaded beside."""

    thread: InferenceThread = field(default_factory=InferenceThread)
    budget: KVBudget = field(default_factory=KVBudget)
    num_to_come: int = 1
    """How many models what is left of the budget is for: this one, and those to come after it."""
    replaced: tuple[LoadedModel, ...] = ()
    """Those that are closed as soon as this one is there."""


def load_model(name: str, settings: Settings, shared: Shared | None = None) -> LoadedModel:
    """Find `name`, load it and start its engine; `shared`: None means all to itself.

    Raises: ModelNotFoundError, ModelLoadError.
    """
    return start_loading(name, settings, shared).result()


def start_loading(
    name: str,
    settings: Settings,
    shared: Shared | None = None,
    report: Report = report_nothing,
) -> Future[LoadedModel]:
    """The same in a thread of its own, which nobody waits for when the program ends.

    OpenMP gives each thread that computes a team of helpers, and takes them back when it ends. With
    the teams of two threads there are more helpers than cores, and all of them sleep in the kernel
    between steps: a step of one token took 26 ms instead of 5. So the inference thread shall be the
    only one that computes and stays.
    """
    return _start(partial(_find_and_load, name, settings, shared or Shared(), report))


def start_looking_for_room(
    name: str, settings: Settings, report: Report = report_nothing
) -> Future[bool]:
    """Whether `name` can be loaded beside what is in memory already, in a thread likewise.

    Raises: ModelNotFoundError, ModelLoadError.
    """
    return _start(partial(_has_room, name, settings, report))


def _start(work: Callable[[], Result]) -> Future[Result]:
    future: Future[Result] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(work())
        except BaseException as error:  # the edge of the thread: it is raised where it is awaited
            future.set_exception(error)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return future


def _has_room(name: str, settings: Settings, report: Report) -> bool:
    """While weights are loaded, none of them are in fewer bits yet, but those that a card can leave
    as they are in the file.

    Where there is none, something else will have to go: what can be said of the files without their
    weights is said before that. Loading says the rest.
    """
    device = _choose_device(settings)
    found = _find(name, settings, report)
    try:
        itemsize = _choose_dtype(settings, device).itemsize
        needed = estimate_bytes(found.path, itemsize, unpacks=device == "cpu")
    except (ModelLoadError, *_FILE_FAULTS):
        return True
    if needed * ROOM_FACTOR <= _free_memory(device, settings):
        return True
    with blame(found):
        folder = to_folder(found.path, settings, report)
        _load_config(folder, settings)
        _load_tokenizer(folder, settings, is_converted=folder != found.path)
    return False


def _free_memory(device: str, settings: Settings) -> int:
    if device == "cpu":
        return available_memory()
    current = torch.cuda.current_device()
    indices = range(torch.cuda.device_count()) if settings.device_map else [current]
    return free_card_memory([torch.device("cuda", index) for index in indices])


def _find_and_load(name: str, settings: Settings, shared: Shared, report: Report) -> LoadedModel:
    found = _find(name, settings, report)
    with blame(found), ExitStack() as undo:
        model = _load(found, settings, shared, report, undo)
        undo.pop_all()
        return model


def _find(name: str, settings: Settings, report: Report) -> FoundModel:
    try:
        return find_model(name, settings, report=report)
    except OSError as error:  # a folder that may not be read
        raise ModelLoadError(f"{name} cannot be looked for: {error.strerror}") from error


def _load(
    found: FoundModel, settings: Settings, shared: Shared, report: Report, undo: ExitStack
) -> LoadedModel:
    """`undo` gets what has to be done if it fails."""
    device = _choose_device(settings)
    folder = to_folder(found.path, settings, report)
    report(LoadProgress(LoadStage.LOADING_WEIGHTS))
    config = _load_config(folder, settings)
    tokenizer = _load_tokenizer(folder, settings, is_converted=folder != found.path)
    reader = load_image_reader(folder, _source_options(settings))
    model = _load_weights(folder, config, settings, device, reads_images=reader is not None)
    wished_model_len = _wished_model_len(model.config, tokenizer, settings)
    report(LoadProgress(LoadStage.TRYING_OUT))
    with _blame_weights(found.path, model):
        is_batched = try_out(found.name, model, wished_model_len, reader)
        if reader is not None and is_batched:
            reader.try_apart()  # so that each is looked at once, whatever comes after it
    # After the probe, which compares with the model's own layers.
    # As the files have them, unless they have become numbers again.
    stored = None if settings.dtype in FORMATS else quantization_of(model.config)
    wished = None if stored else _quantized_dtype(settings, device)
    is_quantized = is_batched and wished is not None and quantize_model(model, wished)
    if settings.dtype in FORMATS and device == "cpu" and not is_quantized:
        raise UnfitSettingError(
            f"{found.name} cannot be loaded in {settings.dtype}: its layers are not known.", "dtype"
        )
    # Nobody knows what the cache of a model that runs alone takes.
    kv_part = _reserve(model, wished_model_len, settings, shared) if is_batched else None
    if kv_part is not None:
        undo.callback(kv_part.give_back)
    engine_config = _choose_config(model, tokenizer, wished_model_len, kv_part, settings)
    if is_batched:
        pin_rotary_factors(model, engine_config.max_model_len)
    engine = Engine(model, engine_config) if is_batched else GenerateEngine(model, engine_config)
    adapters = Adapters(
        found.name,
        settings.lora_dir,
        engine.runner.layers if isinstance(engine, Engine) else None,
        base_classes=_classes_of(model, is_converted=folder != found.path),
    )
    _load_adapters(adapters, settings)
    # The length is checked where a prompt comes in; transformers would only warn of it.
    tokenizer.model_max_length = int(1e30)
    return LoadedModel(
        name=found.name,
        path=found.path,
        settings=settings,
        tokenizer=tokenizer,
        vocab_size=_vocab_size(model),
        vocabulary=Vocabulary(tokenizer, _vocab_size(model)),
        prompt_encoder=PromptEncoder(
            tokenizer,
            engine_config.eos_token_ids,
            reads_special_tokens=settings.special_tokens_in_messages,
            image_token=reader.placeholder if reader else None,
        ),
        image_reader=reader,
        max_model_len=engine_config.max_model_len,
        chat_template=_choose_template(found.name, tokenizer, reader, settings),
        eos_token_ids=engine_config.eos_token_ids,
        max_guided_len=engine.max_guided_len,
        continues_prompt=not model.config.is_encoder_decoder,
        device=device,
        dtype=stored or (wished if wished and is_quantized else _dtype_name(model, settings)),
        kv_part=kv_part,
        adapters=adapters,
        engine=AsyncEngine(engine, shared.thread),  # last: nobody would stop it
    )


def _load_adapters(adapters: Adapters, settings: Settings) -> None:
    try:
        adapters.load(settings.lora)
    except (ModelNotFoundError, ModelLoadError) as error:
        raise UnfitSettingError(str(error), "lora") from error


def _choose_device(settings: Settings) -> str:
    return "cuda" if torch.cuda.is_available() and not settings.cpu else "cpu"


def _dtype_name(model: PreTrainedModel, settings: Settings) -> str:
    if model.device.type == "cuda" and settings.dtype in FORMATS:
        return settings.dtype
    return str(model.dtype).removeprefix("torch.")


def try_out(
    name: str, model: PreTrainedModel, max_model_len: int, reader: ImageReader | None = None
) -> bool:
    """Whether `model` is for batches, also with images if there is a reader; if not, it runs alone.

    Raises ModelLoadError if it does not run at all.
    """
    images = reader.sample if reader else None
    try:
        require_fixed_positions(model.config.get_text_config(), max_model_len)
        probe(model, images)
    except NotBatchableError as error:
        probe_alone(model, images)
        logger.warning("%s: %s Requests run one at a time.", name, error)
        return False
    return True


def _choose_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wished_model_len: int,
    kv_part: KVPart | None,
    settings: Settings,
) -> EngineConfig:
    num_cache_tokens = wished_model_len
    if kv_part is not None:
        num_cache_tokens = kv_part.num_bytes // count_kv_bytes(model)
    return EngineConfig(
        max_model_len=_fit_model_len(wished_model_len, num_cache_tokens, settings),
        eos_token_ids=find_eos_token_ids(model, tokenizer),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        is_deterministic=settings.deterministic,
        num_cache_tokens=num_cache_tokens,
        # A card's memory is taken anyway.
        num_retained_tokens=num_cache_tokens if model.device.type == "cuda" else None,
    )


def _classes_of(model: PreTrainedModel, is_converted: bool) -> tuple[str, ...]:
    """In a GGUF file, a Mistral is called a Llama: it has the same layers."""
    name = type(model).__name__
    return (name, "MistralForCausalLM") if is_converted and name == "LlamaForCausalLM" else (name,)


def _vocab_size(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)


@contextmanager
def blame(found: FoundModel) -> Iterator[None]:
    """Whatever the files of a model make a library raise becomes one line that names them."""
    try:
        yield
    except ServerError:
        raise
    except _FILE_FAULTS as error:
        raise ModelLoadError(
            f"{found.name} cannot be loaded from {found.path}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    """transformers explains at length what to do in a program of one's own."""
    if isinstance(error, UnpicklingError):  # torch explains how to run what is in it
        return "a pickle of it is damaged, or holds other things than weights."
    lines = str(error).strip().splitlines()
    if lines and _IN_REPORT in lines[0]:
        return "weights are missing or damaged, or not what its config.json says."
    if isinstance(error, OSError | RuntimeError | SafetensorError | ValueError) and lines:
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def to_folder(path: Path, settings: Settings, report: Report = report_nothing) -> Path:
    """The folder of a model in transformers' format, whose weights are whole as far as can be seen
    at once. Raises ModelLoadError, which names the file that is not.
    """
    if path.is_dir():
        check_weights(path, settings.allow_pickle)
        return path
    # Here and not above: it leans on parts of transformers that other versions do not have, and
    # models of other kinds need none of them.
    from modules import gguf

    def tell(line: str) -> None:
        print(line)
        report(LoadProgress(LoadStage.CONVERTING))

    return gguf.convert(path, settings.model_dir / conversions.FOLDER, tell)


def _load_config(folder: Path, settings: Settings) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, **_source_options(settings))
    except _FILE_FAULTS as error:
        raise ModelLoadError(
            f"{folder / 'config.json'} cannot be loaded: {_first_line(error)}"
        ) from error
    return config


def _load_tokenizer(
    folder: Path, settings: Settings, is_converted: bool
) -> PreTrainedTokenizerBase:
    # What we converted says all about its tokenizer; AutoTokenizer would overrule some of it.
    tokenizer_class = PreTrainedTokenizerFast if is_converted else AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = tokenizer_class.from_pretrained(
            folder, **_source_options(settings)
        )
    except Exception as error:  # tokenizers raises that very class where a file is damaged
        raise ModelLoadError(
            f"The tokenizer in {_tokenizer_file(folder)} cannot be loaded: {_first_line(error)}"
        ) from error
    return tokenizer


def _tokenizer_file(folder: Path) -> Path:
    """The damaged one; the folder if that is not known."""
    path = folder / "tokenizer.json"
    return path if path.is_file() and "model" not in read_json(path) else folder


def _load_weights(
    folder: Path, config: PretrainedConfig, settings: Settings, device: str, *, reads_images: bool
) -> PreTrainedModel:
    options = _source_options(settings)
    prepare(folder, config, settings, device)
    placement = _placement(settings, device, is_quantized=quantization_of(config) is not None)
    auto_model = _choose_auto_model(config, reads_images)
    with _without_reports():
        result: Any = auto_model.from_pretrained(
            folder,
            config=config,
            dtype=_choose_dtype(settings, device),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            **placement,
            **options,
        )
        model, info = result
        if device == "cpu":
            unpack(folder, model, _choose_dtype(settings, device))
    _require_all_weights(folder, info)
    _require_all_layers(folder, model, info["unexpected_keys"])
    # What is on the CPU is there already, and some formats cannot be moved.
    loaded: PreTrainedModel = model if placement or device == "cpu" else model.to(device)
    return loaded


def _choose_auto_model(config: PretrainedConfig, reads_images: bool) -> Any:
    """Some image-text models are also there without the part that sees, for text alone."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    is_text_model = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    sees = can_read_images(config) and (reads_images or not is_text_model)
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


@contextmanager
def _without_reports() -> Iterator[None]:
    """Without transformers' table of keys: what matters of it becomes an error here. And without
    its bar, in the middle of the server's output.
    """
    verbosity = transformers.logging.get_verbosity()
    has_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bars:
            transformers.logging.enable_progress_bar()


def _require_all_weights(folder: Path, info: dict[str, Any]) -> None:
    """transformers fills what is missing with random numbers, and goes on."""
    faults = {
        "lacks": sorted(info["missing_keys"]),
        "has in another shape than its config.json says": sorted(
            key for key, *_ in info["mismatched_keys"]
        ),
    }
    for fault, names in faults.items():
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ModelLoadError(f"{folder} {fault} {len(names)} of the model's weights: {some}.")


def _require_all_layers(folder: Path, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """A model that leaves out the last layers of its weights answers, but not as it should.

    All else that a model does not know, such as a head of another kind, it does not need.
    """
    # Some files leave out the first part of the names.
    modules = (*model.base_model.named_modules(), *model.named_modules())
    counts = {name: len(each) for name, each in modules if isinstance(each, nn.ModuleList)}
    # They only guess at tokens to come.
    num_more = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    for name in sorted(unexpected):
        for found in re.finditer(r"\.(\d+)\.", name):
            owner = name[: found.start()]
            count = counts.get(owner)
            if count is not None and int(found[1]) >= count + num_more:
                raise ModelLoadError(
                    f"{folder / 'config.json'} tells of {count} {owner} only, and there are "
                    f"weights of more: {name}."
                )


@contextmanager
def _blame_weights(path: Path, model: PreTrainedModel) -> Iterator[None]:
    """If a trial run fails since weights are NaN or infinite, they are to blame, not the model."""
    try:
        yield
    except ModelLoadError as error:
        for name, weight in model.named_parameters():
            # torch cannot tell it of those of 8 bits.
            if weight.is_floating_point() and weight.itemsize > 1 and not weight.isfinite().all():
                raise ModelLoadError(
                    f"The weights in {path} hold what is no number: {name}."
                ) from error
        raise


def _source_options(settings: Settings) -> dict[str, Any]:
    # What has been found is on this disk: nothing else may be asked for while loading it.
    return {"local_files_only": True, "trust_remote_code": settings.trust_remote_code}


def _choose_dtype(settings: Settings, device: str) -> torch.dtype:
    """Of the weights as they are loaded, or of what is not in fewer bits."""
    if settings.dtype not in ("auto", *FORMATS):
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    return torch.bfloat16 if device == "cuda" else torch.float32


def _quantized_dtype(settings: Settings, device: str) -> str | None:
    """Of `FORMATS`: if nothing is asked for, int8 on a CPU that has instructions for it."""
    if device != "cpu":
        return None
    if settings.dtype == "auto":
        return "int8" if torch.cpu._is_vnni_supported() else None
    return settings.dtype if settings.dtype in FORMATS else None


def _placement(settings: Settings, device: str, is_quantized: bool = False) -> dict[str, Any]:
    """Options of from_pretrained that put weights on cards themselves, some of them in fewer bits.
    `is_quantized`: the files have them so.

    Raises ModelLoadError if a library that does it is missing.
    """
    if device != "cuda":  # some libraries would choose a card that is there, and some want no map
        is_card_there = torch.cuda.is_available()
        return {"device_map": {"": device}} if is_quantized and is_card_there else {}
    options: dict[str, Any] = {}
    if settings.device_map is not None:
        _require_package("accelerate", "--device-map", "device_map")
        options["device_map"] = settings.device_map
    if is_quantized:
        options.setdefault("device_map", {"": torch.cuda.current_device()})
    elif settings.dtype in FORMATS:
        flag = f"--load-in-{settings.dtype[3:]}bit"
        _require_package("bitsandbytes", flag, "dtype")
        _require_package("accelerate", flag, "dtype")
        options.setdefault("device_map", {"": torch.cuda.current_device()})
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=settings.dtype == "int8",
            load_in_4bit=settings.dtype == "int4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return options


def _require_package(name: str, flag: str, setting: str) -> None:
    if find_spec(name) is None:
        message = f"{flag} needs a package that is missing: pip install {name}"
        raise UnfitSettingError(message, setting)


def _choose_template(
    name: str, tokenizer: PreTrainedTokenizerBase, reader: ImageReader | None, settings: Settings
) -> ChatTemplate:
    own = reader and reader.chat_template
    return choose_template(
        root=PROJECT_ROOT,
        model_name=name,
        model_chat_template=own or tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens_map,
        vocabulary=tokenizer.get_added_vocab(),
        settings_name=settings.instruction_template,
        settings_text=settings.instruction_template_str,
    )


def find_eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Every token that ends a reply: the generation configuration may name one or a list."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    listed = ids if isinstance(ids, list) else [ids]
    if not all(i is None or type(i) is int for i in listed):
        raise ValueError(f"generation_config.json has no token ids as eos_token_id, but {ids!r}")
    # What the model cannot write ends nothing; some configurations say -1 where there is none.
    possible = range(_vocab_size(model))
    return frozenset(i for i in (*listed, tokenizer.eos_token_id) if i in possible)


# How long a context may be


def _wished_model_len(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> int:
    """Of what the model was made for, as much as is asked for, in tokens."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer that knows no limit says so with an astronomical number.
    known = tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else None
    asked = settings.max_model_len
    limit = int(own or known or asked or DEFAULT_MAX_MODEL_LEN)
    if limit < 2:
        raise ValueError(f"a context of {limit} tokens has no room for a prompt and a reply")
    return min(limit, asked or limit)


def _fit_model_len(wished: int, num_cache_tokens: int, settings: Settings) -> int:
    """What is wished for, or what fits into memory.

    Raises UnfitSettingError if it was asked for and does not fit, or if nothing does.
    """
    if num_cache_tokens >= wished:
        return wished
    room = f"the keys and values of {num_cache_tokens} tokens fit into the memory that is left"
    if settings.max_model_len is not None:
        raise UnfitSettingError(
            f"{wished} tokens of context are too many: {room}. "
            "Lower --max-model-len, raise --kv-cache-memory, or unload another model.",
            "max_model_len",
            "kv_cache_memory",
        )
    if num_cache_tokens < BLOCK_SIZE:
        raise UnfitSettingError(
            f"There is no room for a context: {room}. "
            "Raise --kv-cache-memory, or unload another model.",
            "kv_cache_memory",
        )
    logger.warning("context limited to %d of %d tokens by memory", num_cache_tokens, wished)
    return num_cache_tokens


def _reserve(
    model: PreTrainedModel, wished_model_len: int, settings: Settings, shared: Shared
) -> KVPart:
    """Measured after the weights, whatever they are made of."""
    device = model.device.type
    total = settings.kv_cache_memory
    # All that may run at once, and one more context to begin with again. A card's memory is taken
    # anyway, and what is left of it retained.
    most = (max(2, settings.max_num_seqs) + 1) * wished_model_len * count_kv_bytes(model)
    return shared.budget.reserve(
        device,
        free_card_memory(_cards(model)) if device == "cuda" else available_memory(),
        total=None if total is None else int(total * GIB),
        most=most if device == "cpu" else None,
        num_to_come=shared.num_to_come,
        replaced=[other.kv_part for other in shared.replaced if other.kv_part is not None],
    )


def _cards(model: PreTrainedModel) -> list[torch.device]:
    parameters = {parameter.device for parameter in model.parameters()}
    return sorted((d for d in parameters if d.type == "cuda"), key=str)
