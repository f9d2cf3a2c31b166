"""Loading a model, and what is said when that fails. Tiny models; no network."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2Model,
    MambaConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from modules import memory, model_loading
from modules.engine.engine import Engine, EngineConfig
from modules.engine.outputs import FinishReason
from modules.engine.sampling_params import SamplingParams
from modules.errors import ModelLoadError, UnfitSettingError
from modules.literal_text import unmark
from modules.loaded_model import LoadedModel
from modules.memory import available_memory
from modules.model_loading import find_eos_token_ids, load_model, try_out
from modules.models import ModelManager
from modules.rotary_positions import pin_rotary_factors
from modules.settings import PROJECT_ROOT, Settings
from modules.text_generation import TextRequest, generate
from tests import fakes
from tests.engine.conftest import CONFIGS, SHAPE, VOCAB_SIZE, request, run, token_ids
from tests.fakes import FakeEngine, build_tokenizer
from tests.modules.conftest import build_model, make_settings, one_line, save, write_gguf

NUM_LAYERS = CONFIGS["llama"].num_hidden_layers
KV_BYTES = NUM_LAYERS * 2 * 2 * 16 * 4  # of a token: keys and values, 2 heads of 16, float32
BUNDLED = "SmolLM2-135M-Instruct"


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert "inference" not in {thread.name for thread in left}


def test_loads_lists_and_unloads(
    model_dir: Path, tiny: Path, no_threads_left: None, capfd: pytest.CaptureFixture[str]
) -> None:
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
    assert capfd.readouterr() == ("", "")  # in the middle of the server's output


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
    ("ids", "expected"),
    [
        (7, {7, 258}),
        ([7, 8], {7, 8, 258}),
        (None, {258}),
        (258, {258}),
        ([7, -1, VOCAB_SIZE], {7, 258}),  # which the model cannot write
    ],
)
def test_every_token_that_ends_a_reply(ids: Any, expected: set[int]) -> None:
    model = build_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=ids)
    assert find_eos_token_ids(model, build_tokenizer()) == expected


@pytest.mark.parametrize("ids", ["</s>", [7, "</s>"], 7.0, True, [[7]], {"a": 7}])
def test_what_is_no_token_id_is_refused_before_it_is_needed(ids: Any) -> None:
    model = build_model("llama")
    model.generation_config.eos_token_id = ids
    with pytest.raises(ValueError, match="generation_config.json has no token ids as eos_token_id"):
        find_eos_token_ids(model, build_tokenizer())


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


NAN = "model__layers__0__self_attn__q_proj__weight"
DAMAGE: dict[str, tuple[Any, str]] = {
    "truncated weights": (lambda d: truncate(d / "model.safetensors"), "safetensors is incomplete"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "its header"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "There are no weights in"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be loaded"),
    "a list for a configuration": (
        lambda d: (d / "config.json").write_text("[1]"),
        "cannot be loaded",
    ),
    "an unknown kind": (lambda d: edit_config(d, model_type="nonsense"), "nonsense"),
    "no causal model": (lambda d: edit_config(d, model_type="clip"), "cannot be loaded"),
    "no configuration": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "no heads": (lambda d: edit_config(d, num_attention_heads=0), "config.json cannot be loaded"),
    "a word for a quantization": (
        lambda d: edit_config(d, quantization_config="awq"),
        "config.json cannot be loaded",
    ),
    "a layer too few": (
        lambda d: edit_config(d, num_hidden_layers=NUM_LAYERS - 1),
        f"config.json tells of {NUM_LAYERS - 1} model.layers only, and there are weights of more: "
        f"model.layers.{NUM_LAYERS - 1}.",
    ),
    "a layer too many": (
        lambda d: edit_config(d, num_hidden_layers=NUM_LAYERS + 1),
        f"config.json tells of {NUM_LAYERS + 1} layers, and there are weights of only {NUM_LAYERS}",
    ),
    "a million layers": (
        lambda d: edit_config(d, num_hidden_layers=10**6),
        f"config.json tells of 1000000 layers, and there are weights of only {NUM_LAYERS}",
    ),
    "weights that are no numbers": (
        lambda d: replace_weights(d, **{NAN: torch.full((64, 64), torch.nan)}),
        f"tiny hold what is no number: {NAN.replace('__', '.')}.",
    ),
    "a lost weight": (
        lambda d: replace_weights(d, model__norm__weight=None),
        "lacks 1 of the model's weights: model.norm.weight.",
    ),
    "other shapes": (
        lambda d: replace_weights(d, model__norm__weight=torch.ones(8)),
        "has in another shape than its config.json says 1 of the model's weights: model.norm",
    ),
    "a damaged tokenizer": (lambda d: truncate(d / "tokenizer.json"), "tokenizer.json cannot be"),
    "an empty tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("{}"),
        "tokenizer.json cannot be loaded",
    ),
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


def test_what_a_model_does_not_need_may_be_there(model_dir: Path, tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    more = ("model.layers.0.self_attn.rotary_emb.inv_freq", "medusa_head.7.weight")
    weights = load_file(tiny / "model.safetensors") | {name: torch.ones(8) for name in more}
    # Of layers that guess at tokens to come.
    weights[f"model.layers.{NUM_LAYERS}.eh_proj.weight"] = torch.ones(8)
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    edit_config(tiny, num_nextn_predict_layers=1)
    load_model("tiny", make_settings(model_dir)).close()


def test_layers_too_few_are_told_whatever_they_are_called(model_dir: Path) -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=64)
    save(model_dir / "gpt2", GPT2Model(config))  # its names lack the first part
    edit_config(model_dir / "gpt2", n_layer=1)
    with pytest.raises(ModelLoadError, match=r"tells of 1 h only, .* more: h\.1\."):
        load_model("gpt2", make_settings(model_dir))


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
    with pytest.raises(UnfitSettingError, match="300 tokens of context.*of 200 tokens fit") as told:
        load_model("tiny", settings)
    assert told.value.settings == ("max_model_len", "kv_cache_memory")


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
    with pytest.raises(UnfitSettingError, match="no room for a context") as told:
        load_model("tiny", make_settings(model_dir, kv_cache_memory=memory_for(20)))
    assert told.value.settings == ("kv_cache_memory",)


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
    with pytest.raises(UnfitSettingError, match="int8: its layers are not known") as told:
        load_model("dynamic", make_settings(model_dir, dtype="int8"))
    assert told.value.settings == ("dtype",)


def test_adapters_that_cannot_be_had_are_a_matter_of_the_settings(
    model_dir: Path, tiny: Path, no_threads_left: None
) -> None:
    settings = make_settings(model_dir, lora=("nobody",), lora_dir=model_dir)
    with pytest.raises(UnfitSettingError, match="no adapter 'nobody'") as told:
        load_model("tiny", settings)
    assert told.value.settings == ("lora",)


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
