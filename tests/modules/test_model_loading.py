"""Finding a model, loading it, and what is said when that fails. Tiny models; no network."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
    MambaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from modules import memory, model_files, model_loading
from modules.engine.engine import Engine, EngineConfig
from modules.engine.outputs import FinishReason
from modules.engine.sampling_params import SamplingParams
from modules.errors import ModelError, ModelLoadError, ModelNotFoundError
from modules.literal_text import unmark
from modules.loaded_model import LoadedModel
from modules.memory import available_memory
from modules.model_files import find_model, how_to_get_bundled, list_models
from modules.model_loading import find_eos_token_ids, load_model, try_out
from modules.models import ModelManager
from modules.rotary_positions import pin_rotary_factors
from modules.settings import PROJECT_ROOT, Settings
from modules.text_generation import TextRequest, generate
from tests import fakes
from tests.engine import conftest
from tests.engine.conftest import CONFIGS, SHAPE, VOCAB_SIZE, request, run, token_ids
from tests.fakes import FakeEngine, build_tokenizer

NUM_LAYERS = CONFIGS["llama"].num_hidden_layers
KV_BYTES = NUM_LAYERS * 2 * 2 * 16 * 4  # of a token: keys and values, 2 heads of 16, float32
BUNDLED = "SmolLM2-135M-Instruct"


def build_model(name: str, configs: dict[str, PretrainedConfig] = CONFIGS) -> PreTrainedModel:
    """With a configuration of its own, as loading changes it."""
    return conftest.build_model(name, copy.deepcopy(configs))


def save(folder: Path, model: PreTrainedModel | None = None) -> Path:
    (model or build_model("llama")).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty, as are the hub's cache and the list of installed packages; the hub is far away."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(LocalEntryNotFoundError("far")))
    monkeypatch.setitem(
        model_files.BUNDLED_MODELS, BUNDLED, model_files.BundledModel("no_such", "x.gguf")
    )
    return folder


@pytest.fixture
def tiny(model_dir: Path, saved: Path) -> Path:
    """A model named tiny that a test may damage."""
    return shutil.copytree(saved, model_dir / "tiny")


def make_settings(model_dir: Path, **values: Any) -> Settings:
    return Settings(**{"model_dir": model_dir, "cpu": True, "kv_cache_memory": 0.01, **values})


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert "inference" not in {thread.name for thread in left}


class Hub:
    """In the place of `snapshot_download`: copies a folder into the cache, or fails."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.patterns: list[str] = []
        self.names: list[str] = []

    def __call__(self, name: str, *, allow_patterns: list[str], tqdm_class: type) -> str:
        self.names.append(name)
        self.patterns = allow_patterns
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(cache_as(name, self.answer))


def cache_as(name: str, source: Path) -> Path:
    """Put a folder where the hub's library keeps `name`."""
    repo = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text("abc123")
    return shutil.copytree(source, repo / "snapshots" / "abc123", dirs_exist_ok=True)


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Which models there are


def write_gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")  # enough to be found
    return path.resolve()


def test_lists_what_can_be_loaded(model_dir: Path, tiny: Path) -> None:
    write_gguf(model_dir / "loose.gguf")
    write_gguf(model_dir / "one" / "any-name.gguf")
    write_gguf(model_dir / "two" / "b.gguf")
    write_gguf(model_dir / "two" / "a.gguf")
    (model_dir / "empty").mkdir()
    (model_dir / ".converted" / "x").mkdir(parents=True)
    write_gguf(model_dir / ".converted" / "x.gguf")
    names = list_models(model_dir)
    assert names == ["loose", "one", "tiny", "two/a", "two/b"]
    for name in names:
        assert find_model(name, make_settings(model_dir)).name == name


def test_a_missing_model_folder_has_no_models(tmp_path: Path, model_dir: Path) -> None:
    assert list_models(tmp_path / "none") == []


def test_a_folder_of_several_files_says_which(model_dir: Path) -> None:
    a = write_gguf(model_dir / "two" / "a.gguf")
    write_gguf(model_dir / "two" / "b.gguf")
    assert find_model("two/a", make_settings(model_dir)).path == a
    with pytest.raises(ModelLoadError, match=r"several models.*two/a, two/b"):
        find_model("two", make_settings(model_dir))


def test_the_nearest_place_comes_first(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hub, the hub's cache, a bundled file, a .gguf file, a folder: each hides the former."""
    settings = make_settings(model_dir)
    hub = Hub(saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    on_hub = find_model("org/name", settings)
    assert (on_hub.name, hub.names) == ("org/name", ["org/name"])

    hub.answer = AssertionError("not asked again")  # type: ignore[assignment]
    assert find_model("org/name", settings) == on_hub

    package = tmp_path / "packages" / "carrier"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not for import')")
    write_gguf(package / "file.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(
        model_files.BUNDLED_MODELS, "org/name", model_files.BundledModel("carrier", "file.gguf")
    )
    assert find_model("org/name", settings).path == package / "file.gguf"
    assert "org/name" in list_models(model_dir)

    file = write_gguf(model_dir / "org" / "name.gguf")
    assert find_model("org/name", settings).path == file
    folder = shutil.copytree(saved, model_dir / "org" / "name")
    assert find_model("org/name", settings).path == folder.resolve()


def test_a_path_is_a_name(model_dir: Path, saved: Path, tmp_path: Path) -> None:
    settings = make_settings(model_dir)
    found = find_model(str(saved), settings)
    assert (found.name, found.path) == ("tiny", saved.resolve())
    file = write_gguf(tmp_path / "elsewhere" / "some.Q8_0.gguf")
    assert find_model(str(file), settings).name == "some.Q8_0"
    assert find_model(str(file.parent), settings).name == "elsewhere"


def test_the_case_of_letters_does_not_matter(model_dir: Path, tiny: Path) -> None:
    assert find_model("Tiny", make_settings(model_dir)).path == tiny.resolve()
    with pytest.raises(ModelNotFoundError) as error:
        find_model(BUNDLED.lower(), make_settings(model_dir))
    assert one_line(error) == f"{BUNDLED} is not installed. {how_to_get_bundled()}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "There is no file or folder ./nope."),
        ("/no/such/path", "There is no file or folder /no/such/path."),
        ("./nope.gguf", "There is no file or folder ./nope.gguf."),
        ("tinny", "Did you mean tiny?"),
        ("smollm2-135m-instuct", f"Did you mean {BUNDLED}?"),
        ("smollm2", f"Did you mean {BUNDLED}?"),
        ("tinny", "Models on this machine: tiny."),
        ("org/name", "the hub cannot be reached"),
        ("", "There is no model"),
    ],
)
def test_says_what_it_did_not_find(model_dir: Path, tiny: Path, name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        find_model(name, make_settings(model_dir))
    assert message in one_line(error)


def test_a_folder_that_is_no_model_says_so(model_dir: Path) -> None:
    (model_dir / "notes").mkdir()
    with pytest.raises(ModelLoadError, match=r"notes is no model: it has no config.json"):
        find_model("notes", make_settings(model_dir))


# The hub


class FakeResponse:
    headers: dict[str, str] = {}
    request = None
    status_code = 500


def hub_error(kind: type[HfHubHTTPError], text: str) -> HfHubHTTPError:
    return kind(text, response=FakeResponse())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("outgoing traffic\nhas been disabled"), "cannot be reached"),
        (OfflineModeIsEnabled("offline"), "cannot be reached"),
        (HfHubHTTPError.__bases__[0]("no route"), "cannot be reached"),
        (hub_error(RepositoryNotFoundError, "404"), "not on the hub, or private there"),
        (hub_error(HfHubHTTPError, "500\nmore"), "the hub did not give it (500)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_says_why_the_hub_did_not_help(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(error))
    with pytest.raises(ModelNotFoundError) as caught:
        find_model("org/name", make_settings(model_dir))
    assert message in one_line(caught)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_interrupted_download_is_taken_up_again(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    part = cache_as("org/name", saved)
    (part / missing).unlink()
    hub = Hub(saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    found = find_model("org/name", make_settings(model_dir))
    assert hub.names == ["org/name"]
    assert (found.path / missing).is_file()


def test_a_download_that_cannot_go_on_is_no_model(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = shutil.copytree(saved, tmp_path / "part")
    (part / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(part))
    with pytest.raises(ModelLoadError, match=r"org/name is incomplete"):
        find_model("org/name", make_settings(model_dir))


def test_every_shard_must_be_there(model_dir: Path, saved: Path) -> None:
    folder = cache_as("org/name", saved)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(ModelNotFoundError):
        find_model("org/name", make_settings(model_dir))
    (folder / "model-2.safetensors").touch()
    assert find_model("org/name", make_settings(model_dir)).path == folder


def test_code_is_fetched_only_to_be_run(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    find_model("org/name", make_settings(model_dir))
    assert "*.py" not in hub.patterns

    folder = cache_as("org/name", saved)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    find_model("org/name", make_settings(model_dir))
    assert len(hub.names) == 1
    find_model("org/name", make_settings(model_dir, trust_remote_code=True))
    assert len(hub.names) == 2
    assert "*.py" in hub.patterns


# Loading one


def test_loads_lists_and_unloads(model_dir: Path, tiny: Path, no_threads_left: None) -> None:
    manager = ModelManager(make_settings(model_dir, dtype="float32"))
    assert not manager.is_loaded
    model = asyncio.run(manager.load("tiny"))
    assert manager.current is model
    assert manager.list_names() == ["tiny"]
    assert (model.name, model.vocab_size, model.max_model_len) == ("tiny", 300, 512)
    assert (model.device, model.dtype) == ("cpu", "float32")
    assert "inference" in {thread.name for thread in threading.enumerate()}
    manager.close()
    manager.close()
    assert not manager.is_loaded


@pytest.mark.parametrize(
    ("dtype", "has_instructions", "expected"),
    [
        ("auto", True, "int8"),
        ("auto", False, "float32"),
        ("int8", False, "int8"),
        ("int4", True, "int4"),
    ],
)
def test_integers_where_the_cpu_has_instructions_for_it_or_if_asked(
    model_dir: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, dtype, has_instructions, expected
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_instructions)
    manager = ModelManager(make_settings(model_dir, dtype=dtype))
    assert asyncio.run(manager.load("tiny")).dtype == expected
    manager.close()


@pytest.mark.parametrize(
    ("wishes", "installed", "missing"),
    [
        ({"dtype": "int8"}, [], "--load-in-8bit .*pip install bitsandbytes"),
        ({"dtype": "int4"}, ["bitsandbytes"], "--load-in-4bit .*pip install accelerate"),
        ({"device_map": "auto"}, [], "--device-map .*pip install accelerate"),
    ],
)
def test_says_what_a_card_needs(wishes, installed, missing, monkeypatch) -> None:
    monkeypatch.setattr(
        model_loading, "find_spec", lambda name: name if name in installed else None
    )
    with pytest.raises(ModelLoadError, match=missing):
        model_loading._placement(Settings(**wishes), "cuda")


def test_weights_in_fewer_bits_go_where_they_are_to_be(monkeypatch) -> None:
    monkeypatch.setattr(model_loading, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert model_loading._placement(Settings(), "cuda") == {}
    assert model_loading._placement(Settings(device_map="auto"), "cpu") == {}
    four = model_loading._placement(Settings(dtype="int4"), "cuda")
    assert four["device_map"] == {"": 1}
    assert four["quantization_config"].load_in_4bit
    assert not four["quantization_config"].load_in_8bit
    eight = model_loading._placement(Settings(dtype="int8", device_map="auto"), "cuda")
    assert eight["device_map"] == "auto"
    assert eight["quantization_config"].load_in_8bit


def test_the_fullest_card_says_how_much_is_free(monkeypatch) -> None:
    free = {"cuda:0": 300, "cuda:1": 200}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[str(card)], 1000))
    assert memory.free_card_memory([torch.device("cuda:0"), torch.device("cuda:1")]) == 400


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integers_for_layers_that_are_not_known(model_dir: Path, dtype) -> None:
    save(model_dir / "gemma", build_model("gemma2-softcap-sliding"))
    manager = ModelManager(make_settings(model_dir, dtype=dtype))
    with pytest.raises(ModelLoadError, match=f"{dtype}: its layers are not known"):
        asyncio.run(manager.load("gemma"))
    manager = ModelManager(make_settings(model_dir))
    assert asyncio.run(manager.load("gemma")).dtype == "float32"
    manager.close()


def test_special_tokens_are_a_matter_of_choice(model_dir: Path, tiny: Path) -> None:
    manager = ModelManager(make_settings(model_dir))
    model = asyncio.run(manager.load("tiny"))
    manager.close()
    ids = model.encode("hi ,<|im_end|>", add_special_tokens=False)
    assert ids == (*b"hi ,", 258)
    assert model.decode(ids, skip_special_tokens=True) == "hi ,"
    assert model.decode(ids, skip_special_tokens=False) == "hi ,<|im_end|>"


def test_a_long_prompt_is_nothing_to_warn_of(
    model_dir: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 8}))
    manager = ModelManager(make_settings(model_dir))
    model = asyncio.run(manager.load("tiny"))
    manager.close()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        assert len(model.encode("a" * 1000, add_special_tokens=False)) == 1000
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    ("ids", "expected"), [(7, {7, 258}), ([7, 8], {7, 8, 258}), (None, {258}), (258, {258})]
)
def test_every_token_that_ends_a_reply(ids: Any, expected: set[int]) -> None:
    model = build_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=ids)
    assert find_eos_token_ids(model, build_tokenizer()) == expected


def test_without_an_end_token_there_is_none() -> None:
    model = build_model("llama")
    model.generation_config = None
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    assert find_eos_token_ids(model, tokenizer) == frozenset()


# Files that are damaged


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def replace_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        weights.pop(name)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Any, str]] = {
    "truncated weights": (lambda d: truncate(d / "model.safetensors"), "tiny cannot be loaded"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "tiny cannot be loaded from"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be loaded"),
    "a list for a configuration": (
        lambda d: (d / "config.json").write_text("[1]"),
        "cannot be loaded",
    ),
    "an unknown kind": (lambda d: edit_config(d, model_type="nonsense"), "nonsense"),
    "no causal model": (lambda d: edit_config(d, model_type="clip"), "cannot be loaded"),
    "a layer too many": (
        lambda d: edit_config(d, num_hidden_layers=NUM_LAYERS + 1),
        f"lacks 9 of the model's weights: model.layers.{NUM_LAYERS}.",
    ),
    "a lost weight": (
        lambda d: replace_weights(d, model__norm__weight=None),
        "lacks 1 of the model's weights: model.norm.weight.",
    ),
    "other shapes": (
        lambda d: replace_weights(d, model__norm__weight=torch.ones(8)),
        "has in another shape than its config.json says 1 of the model's weights: model.norm",
    ),
    "a damaged tokenizer": (lambda d: truncate(d / "tokenizer.json"), "The tokenizer in"),
    "no tokenizer": (
        lambda d: [path.unlink() for path in d.glob("tokenizer*")],
        "The tokenizer in",
    ),
    "a length of words": (lambda d: edit_config(d, max_position_embeddings="many"), "cannot be"),
    "a length of nothing": (lambda d: edit_config(d, max_position_embeddings=-5), "cannot be"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model_is_one_line(
    model_dir: Path, tiny: Path, kind: str, no_threads_left: None
) -> None:
    damage, message = DAMAGE[kind]
    damage(tiny)
    with pytest.raises(ModelLoadError) as error:
        load_model("tiny", make_settings(model_dir))
    assert message in one_line(error)
    assert "tiny" in one_line(error)


@pytest.mark.parametrize(
    ("encoder", "message"), [(BertModel, "lacks"), (BertForMaskedLM, "it generates no text")]
)
def test_an_encoder_is_refused(
    model_dir: Path, encoder: type[PreTrainedModel], message: str
) -> None:
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    save(model_dir / "encoder", encoder(config))
    with pytest.raises(ModelLoadError, match=message):
        load_model("encoder", make_settings(model_dir))


def test_a_damaged_gguf_file_is_one_line(model_dir: Path, no_threads_left: None) -> None:
    write_gguf(model_dir / "bad.gguf")
    with pytest.raises(ModelLoadError) as error:
        load_model("bad", make_settings(model_dir))
    assert "bad.gguf cannot be loaded" in one_line(error)


def test_a_failing_load_leaves_the_old_model(model_dir: Path, tiny: Path) -> None:
    manager = ModelManager(make_settings(model_dir))
    model = asyncio.run(manager.load("tiny"))
    truncate(tiny / "model.safetensors")
    with pytest.raises(ModelLoadError):
        asyncio.run(manager.load("tiny"))
    assert manager.current is model
    model.engine.check_health()
    manager.close()


def test_a_wrong_template_leaves_no_thread(
    model_dir: Path, tiny: Path, no_threads_left: None
) -> None:
    from modules.errors import ServerError

    with pytest.raises(ServerError):
        load_model("tiny", make_settings(model_dir, instruction_template="no such"))


def test_models_of_other_kinds_load_without_the_gguf_converter() -> None:
    """It leans on parts of transformers that other versions do not have."""
    code = "import sys, modules.models; print('modules.gguf' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


# How long a context may be


def memory_for(num_tokens: int) -> float:
    return num_tokens * KV_BYTES / 2**30


def test_the_context_is_what_fits_into_memory(
    model_dir: Path, tiny: Path, caplog: pytest.LogCaptureFixture, no_threads_left: None
) -> None:
    manager = ModelManager(
        make_settings(model_dir, kv_cache_memory=memory_for(200), dtype="float32")
    )
    assert asyncio.run(manager.load("tiny")).max_model_len == 200
    manager.close()
    assert "context limited to 200 of 512 tokens by memory" in caplog.text


def test_a_context_that_was_asked_for_must_fit(
    model_dir: Path, tiny: Path, no_threads_left: None
) -> None:
    settings = make_settings(
        model_dir, kv_cache_memory=memory_for(200), max_model_len=300, dtype="float32"
    )
    with pytest.raises(ModelLoadError, match="300 tokens of context.*of 200 tokens fit"):
        load_model("tiny", settings)


@pytest.mark.parametrize("allowed", [False, True])
def test_settings_say_whether_messages_spell_special_tokens(
    model_dir: Path, tiny: Path, no_threads_left: None, allowed: bool
) -> None:
    manager = ModelManager(make_settings(model_dir, special_tokens_in_messages=allowed))
    model = asyncio.run(manager.load("tiny"))
    eos = model.tokenizer.eos_token
    text, marks = unmark(model.prompt_encoder.choose_marker("").mark(eos))
    ids = model.prompt_encoder.encode(text, marks)
    assert (ids == (model.tokenizer.eos_token_id,)) is allowed
    manager.close()


@pytest.mark.parametrize(("asked", "expected"), [(100, 100), (5000, 512)])
def test_the_models_own_limit_holds(
    model_dir: Path, tiny: Path, asked: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    manager = ModelManager(make_settings(model_dir, max_model_len=asked))
    assert asyncio.run(manager.load("tiny")).max_model_len == expected
    manager.close()
    assert "context limited" not in caplog.text


def test_no_memory_at_all_is_an_error(model_dir: Path, tiny: Path, no_threads_left: None) -> None:
    with pytest.raises(ModelLoadError, match="no room for a context"):
        load_model("tiny", make_settings(model_dir, kv_cache_memory=memory_for(20)))


def write_group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = {
    "memory/memory.limit_in_bytes": "5000\n",
    "memory/memory.usage_in_bytes": "3000\n",
    "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 700\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 1\n"}, 2000),
        (
            {
                "memory.max": "5000",
                "memory.current": "3000",
                "memory.stat": "anon 1\ninactive_file 500\n",
            },
            2500,
        ),
        ({"memory.max": "100", "memory.current": "200", "memory.stat": ""}, 0),
        (V1, 2700),
    ],
    ids=["v2", "v2, with files", "v2, full", "v1"],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_memory(write_group(tmp_path, files)) == expected


def test_without_a_limit_the_host_counts(tmp_path: Path) -> None:
    files = {"memory.max": "max\n", "memory.current": "3000\n", "memory.stat": ""}
    for root in (tmp_path / "none", write_group(tmp_path, files)):
        assert available_memory(root) > 2**20


# Rotary positions that depend on the length


def long_rope(**overrides: Any) -> PreTrainedModel:
    config = Phi3Config(
        **{**SHAPE, "max_position_embeddings": 256, "original_max_position_embeddings": 64},
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
            **overrides,
        },
    )
    return build_model("phi3", {"phi3": config})


def replies(model: PreTrainedModel, lengths: tuple[int, ...]) -> dict[str, list[int]]:
    engine = Engine(model, EngineConfig(max_model_len=256, num_cache_tokens=1024))
    for length in lengths:
        engine.add(request(str(length), [(7 * i + length) % 250 + 5 for i in range(length)]))
    return {name: token_ids(outputs) for name, outputs in run(engine).items()}


def test_a_long_prompt_does_not_change_a_short_one() -> None:
    model = long_rope()
    pin_rotary_factors(model, 256)
    alone = replies(model, (20,)) | replies(model, (150,))
    assert replies(model, (20, 150)) == alone


@pytest.mark.parametrize(("max_model_len", "used"), [(64, "short"), (65, "long")])
def test_the_factors_are_those_of_the_longest_sequence(max_model_len: int, used: str) -> None:
    def frequencies(model: PreTrainedModel, length: int) -> torch.Tensor:
        rotary: Any = model.get_submodule("model.rotary_emb")
        rotary(torch.zeros(1), torch.arange(length)[None])
        return rotary.inv_freq.clone()

    expected = frequencies(long_rope(), 20 if used == "short" else 200)
    model = long_rope()
    frequencies(model, 200)  # as if the other set had been in use before
    pin_rotary_factors(model, max_model_len)
    for length in (20, 200, 20):
        assert torch.equal(frequencies(model, length), expected)


def dynamic_rope() -> PreTrainedModel:
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    return build_model("llama", {"llama": type(CONFIGS["llama"])(**SHAPE, rope_parameters=rope)})


def chunked_attention() -> PreTrainedModel:
    model = build_model("llama")
    model.config.attention_chunk_size = 128
    model.config.layer_types = ["chunked_attention"] * NUM_LAYERS
    return model


@pytest.mark.parametrize("build", [dynamic_rope, chunked_attention])
def test_what_depends_on_the_length_of_the_row_is_not_batched(
    build: Callable[[], PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    assert try_out("tiny", build(), 128)
    assert "one at a time" not in caplog.text
    assert not try_out("tiny", build(), 129)
    assert "With --max-model-len 128 it is. Requests run one at a time." in caplog.text


# What cannot be batched


def build_mamba() -> PreTrainedModel:
    config = MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, state_size=8, num_hidden_layers=2, eos_token_id=258
    )
    return build_model("mamba", {"mamba": config})


def build_t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        eos_token_id=258,
        decoder_start_token_id=0,
    )
    return build_model("t5", {"t5": config})


def ask(
    model: LoadedModel, *prompts: str | tuple[int, ...], **params: Any
) -> tuple[list[str], int]:
    """Replies to all prompts at once, and in how many pieces they came."""

    async def collect() -> tuple[list[str], int]:
        wishes = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
        request = TextRequest(prompts=prompts, params=wishes)
        generation = await generate(model, request)
        replies, num_pieces = [""] * len(prompts), 0
        async for delta in generation.deltas:
            replies[delta.index] += delta.text
            num_pieces += 1
        return replies, num_pieces

    return asyncio.run(collect())


@pytest.mark.parametrize("build", [build_mamba, build_t5])
def test_a_model_that_cannot_be_batched_answers_all_the_same(
    model_dir: Path,
    build: Callable[[], PreTrainedModel],
    caplog: pytest.LogCaptureFixture,
    no_threads_left: None,
) -> None:
    save(model_dir / "odd", build())
    manager = ModelManager(make_settings(model_dir))
    with caplog.at_level(logging.WARNING):
        model = asyncio.run(manager.load("odd"))
    (warning,) = [r for r in caplog.records if r.name == "modules.model_loading"]
    assert warning.getMessage().startswith("odd: This kind of model")
    assert warning.getMessage().endswith("exchanged. Requests run one at a time.")
    assert (model.dtype, model.max_model_len) == ("float32", 2048)
    assert model.continues_prompt == (build is build_mamba)

    prompts = ("one", "a longer one", "two")
    together, num_pieces = ask(model, *prompts, seed=5)
    assert num_pieces > 2 * len(prompts)
    assert together == [ask(model, prompt, seed=5)[0][0] for prompt in prompts]
    manager.close()


def test_int8_is_only_for_what_is_batched(model_dir: Path, no_threads_left: None) -> None:
    save(model_dir / "dynamic", dynamic_rope())
    with pytest.raises(ModelLoadError, match="int8: its layers are not known"):
        load_model("dynamic", make_settings(model_dir, dtype="int8"))


def test_without_a_limit_of_its_own_a_model_has_the_context_that_is_asked_for(
    model_dir: Path,
) -> None:
    save(model_dir / "mamba", build_mamba())
    manager = ModelManager(make_settings(model_dir, max_model_len=5000))
    assert asyncio.run(manager.load("mamba")).max_model_len == 5000
    manager.close()


def test_trying_a_model_leaves_the_tokens_that_end_its_replies() -> None:
    model = build_mamba()
    model.generation_config.eos_token_id = [7, 8]
    try_out("mamba", model, 100)
    assert find_eos_token_ids(model, build_tokenizer()) == {7, 8, 258}


@pytest.mark.parametrize(("continues_prompt", "text"), [(True, " b"), (False, "b")])
def test_only_a_continuation_begins_with_the_space_of_its_word(
    continues_prompt: bool, text: str
) -> None:
    words = Tokenizer(WordLevel({"\u2581a": 0, "\u2581b": 1}, unk_token="\u2581a"))
    words.decoder = Metaspace()
    engine = FakeEngine()
    engine.enqueue((1,), finish_reason=FinishReason.LENGTH)
    model = replace(
        fakes.build_model(engine, PreTrainedTokenizerFast(tokenizer_object=words)),
        continues_prompt=continues_prompt,
    )
    assert ask(model, (0,))[0] == [text]
