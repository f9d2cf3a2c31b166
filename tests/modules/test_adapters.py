"""Adapters on disk and beside a loaded model: what is read, what is refused, and who keeps what."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modules import conversions
from modules.adapter_files import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, list_adapters
from modules.adapters import Adapters
from modules.engine.engine import Engine, EngineConfig
from modules.errors import AdapterNotFoundError, ModelLoadError, ModelNotFoundError
from modules.gguf import convert
from modules.loaded_model import LoadedModel
from modules.model_loading import load_model
from modules.models import ModelManager
from modules.settings import Settings
from tests import fakes
from tests.adapters import save_adapter
from tests.engine.conftest import CONFIGS, build_model, request, run, token_ids
from tests.fakes import FakeEngine, build_tokenizer
from tests.modules.conftest import make_settings
from tests.modules.test_gguf import write_llama

PROMPT = list(range(3, 80))


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = EngineConfig(max_model_len=512, num_cache_tokens=4096)
    return Engine(build_model("llama"), config)


@pytest.fixture
def lora_dir(tmp_path: Path) -> Path:
    save_adapter(build_model("llama"), tmp_path / "pirate")
    return tmp_path


@pytest.fixture
def adapters(engine: Engine, lora_dir: Path) -> Adapters:
    return Adapters("tiny", lora_dir, engine.runner.layers, ["LlamaForCausalLM"])


def generate(engine: Engine, adapters: Adapters, *names: str) -> list[int]:
    own = tuple(adapters.get(name, "lora") for name in names)
    engine.add(replace(request("x", PROMPT), adapters=own))
    return token_ids(run(engine)["x"])


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, **values: torch.Tensor | None) -> None:
    weights = load_file(folder / WEIGHTS_FILE) | values
    save_file(
        {key: value for key, value in weights.items() if value is not None}, folder / WEIGHTS_FILE
    )


def test_which_there_are(adapters: Adapters, lora_dir: Path) -> None:
    (lora_dir / "empty").mkdir()
    save_adapter(build_model("llama"), lora_dir / "a b", target_modules=["q_proj"])
    assert adapters.list_names() == ["a b", "pirate"]
    assert list_adapters(lora_dir / "nowhere") == []
    with pytest.raises(ModelNotFoundError, match="'pirat' .* These are there: pirate"):
        adapters.load(["pirat"])
    for path in ("../pirate", str(lora_dir / "pirate"), "", "."):
        with pytest.raises(ModelNotFoundError):
            adapters.load([path])


def test_only_the_nearest_of_many_are_told(adapters: Adapters, lora_dir: Path) -> None:
    for number in range(6):
        (lora_dir / f"p{number}").mkdir()
        (lora_dir / f"p{number}" / CONFIG_FILE).touch()
    with pytest.raises(ModelNotFoundError, match="Of 7, the nearest are: pirate, p"):
        adapters.load(["pirat"])


def test_one_that_fails_changes_nothing(adapters: Adapters) -> None:
    adapters.load(["pirate"])
    before = adapters.all
    with pytest.raises(ModelNotFoundError):
        adapters.load(["pirate", "nobody"])
    assert adapters.all == before


@pytest.mark.parametrize(
    ("name", "changes"),
    [("other sizes", {"hidden_size": 128}), ("more layers", {"num_hidden_layers": 3})],
)
def test_of_another_base_model(name: str, changes: dict[str, int], adapters: Adapters) -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    for key, value in changes.items():
        setattr(config, key, value)
    other = build_model("other", {"other": config})
    folder = adapters._lora_dir / name
    save_adapter(other, folder)
    edit_config(folder, base_model_name_or_path="org/other", auto_mapping=None)
    with pytest.raises(ModelLoadError, match=r"another base model \(org/other\): .* tiny has"):
        adapters.load([name])


def test_of_another_architecture_with_the_same_shapes(
    adapters: Adapters, lora_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(lora_dir / "pirate", auto_mapping={"base_model_class": "Gemma2ForCausalLM"})
    with pytest.raises(ModelLoadError, match="Gemma2ForCausalLM, and tiny is a LlamaForCausalLM"):
        adapters.load(["pirate"])
    for named, warns in (("org/Tiny", False), (None, False), ("org/huge", True)):
        edit_config(lora_dir / "pirate", auto_mapping=None, base_model_name_or_path=named)
        caplog.clear()
        adapters.load(["pirate"])
        assert ("was made for huge" in caplog.text) is warns


def test_a_gguf_file_may_be_a_mistral(tmp_path: Path) -> None:
    """Which llama.cpp calls a Llama."""
    path = write_llama(tmp_path / "tiny.gguf")
    base = AutoModelForCausalLM.from_pretrained(convert(path, tmp_path / conversions.FOLDER))
    save_adapter(base, tmp_path / "pirate")
    model = load_model("tiny", make_settings(tmp_path, lora_dir=tmp_path))
    try:
        edit_config(tmp_path / "pirate", auto_mapping={"base_model_class": "MistralForCausalLM"})
        model.adapters.load(["pirate"])
        edit_config(tmp_path / "pirate", auto_mapping={"base_model_class": "Gemma2ForCausalLM"})
        with pytest.raises(ModelLoadError, match="a LlamaForCausalLM or MistralForCausalLM"):
            model.adapters.load(["pirate"])
    finally:
        model.engine.stop()


def test_names_with_a_colon(adapters: Adapters, lora_dir: Path) -> None:
    """Where would a model's name end?"""
    (lora_dir / "pirate").rename(lora_dir / "with:colon")
    with pytest.raises(ModelLoadError, match="No adapter can be called with:colon"):
        adapters.load(["with:colon"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "uses use_dora"),
    "bias": ({"bias": "all"}, "uses bias"),
    "modules_to_save": ({"modules_to_save": ["norm"]}, "uses modules_to_save"),
    "head": ({"target_modules": ["lm_head"]}, "changes lm_head"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "changes model.embed_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_update_of_linear_layers(name: str, adapters: Adapters) -> None:
    options, message = REFUSED[name]
    save_adapter(build_model("llama"), adapters._lora_dir / name, **options)
    with pytest.raises(ModelLoadError, match=message):
        adapters.load([name])


def test_of_another_kind(adapters: Adapters) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(build_model("llama"), config).save_pretrained(adapters._lora_dir / "ia3")
    with pytest.raises(ModelLoadError, match="of the kind IA3, not LORA"):
        adapters.load(["ia3"])


def test_files_that_are_damaged(adapters: Adapters, lora_dir: Path) -> None:
    folder = lora_dir / "pirate"
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    whole, text = weights.read_bytes(), config.read_text()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format

    def refuse(message: str) -> None:
        with pytest.raises(ModelLoadError, match=message):
            adapters.load(["pirate"])
        weights.write_bytes(whole)
        config.write_text(text)

    weights.write_bytes(whole[:1000])
    refuse(f"{WEIGHTS_FILE} is damaged")
    edit_weights(folder, **{key("A"): None})
    refuse("no update of rank 4 for model.layers.0.self_attn.q_proj")
    edit_config(folder, r=8)
    refuse("no update of rank 8")
    edit_weights(folder, **{key("B"): torch.full((64, 4), torch.nan)})
    refuse("no number")
    edit_weights(folder, **{key("B"): torch.full((64, 4), 1e38)})
    refuse("too large")
    edit_config(folder, lora_alpha=1e30)
    refuse("with a scaling of 2.5e\\+29, is too large")
    config.write_text("{")
    refuse(f"{CONFIG_FILE} is damaged")
    edit_config(folder, some_future_feature=True)
    refuse("uses some_future_feature")
    edit_config(folder, init_lora_weights="pissa")
    refuse("uses init_lora_weights: pissa")
    weights.rename(folder / PICKLE_FILE)
    with pytest.raises(ModelLoadError, match=f"{PICKLE_FILE} could run code"):
        adapters.load(["pirate"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", None),
        ("lora_alpha", "x"),
        ("lora_alpha", None),
        ("lora_alpha", float("inf")),
        ("alpha_pattern", {"q_proj": "z"}),
        ("rank_pattern", {"(": 8}),
        ("rank_pattern", [1]),
        ("auto_mapping", "x"),
        ("base_model_name_or_path", 5),
    ],
)
def test_values_that_are_damaged(key: str, value: Any, adapters: Adapters, lora_dir: Path) -> None:
    edit_config(lora_dir / "pirate", **{key: value})
    with pytest.raises(ModelLoadError, match=f"pirate/{CONFIG_FILE} is damaged: {key} is"):
        adapters.load(["pirate"])


def test_keys_and_values_of_one_are_for_no_other(
    engine: Engine, adapters: Adapters, lora_dir: Path
) -> None:
    """Not even for one of the same name whose files have changed."""

    def count_cached(*names: str) -> int:
        own = tuple(adapters.get(name, "lora") for name in names)
        engine.add(replace(request("x", PROMPT), adapters=own))
        return run(engine)["x"][0].num_cached_tokens

    adapters.load(["pirate"])
    assert [count_cached(), count_cached(), count_cached("pirate"), count_cached("pirate")] == [
        0,
        64,
        0,
        64,
    ]
    before = generate(engine, adapters, "pirate")
    save_adapter(build_model("llama"), lora_dir / "pirate", seed=5)
    adapters.load(["pirate"])
    assert count_cached("pirate") == 0
    assert generate(engine, adapters, "pirate") != before
    assert count_cached() == 64


def test_unloaded_while_it_is_used(engine: Engine, adapters: Adapters) -> None:
    adapters.load(["pirate"])
    expected = generate(engine, adapters, "pirate")
    engine.add(replace(request("x", PROMPT), adapters=adapters.all))
    begun = engine.step()
    adapters.unload()
    with pytest.raises(AdapterNotFoundError, match="'pirate' is not loaded. None is") as raised:
        adapters.get("pirate", "lora")
    assert raised.value.param == "lora"
    assert token_ids(begun + run(engine)["x"]) == expected


def test_a_guided_sequence_and_its_companion(engine: Engine, adapters: Adapters) -> None:
    """With a scale of 1, it says what it says alone; the companion has read with the adapter."""
    adapters.load(["pirate"])
    expected = generate(engine, adapters, "pirate")
    wish = replace(request("x", PROMPT, guidance_scale=2.0), adapters=adapters.all)
    engine.add(replace(wish, negative_prompt_token_ids=tuple(PROMPT)))
    assert token_ids(run(engine)["x"]) == expected  # away from itself: nowhere


@pytest.fixture
def model(adapters: Adapters) -> Iterator[LoadedModel]:
    yield replace(fakes.build_model(FakeEngine(), build_tokenizer()), adapters=adapters)


def test_which_one_a_request_gets(model: LoadedModel, lora_dir: Path) -> None:
    assert model.with_adapter(None) is model
    save_adapter(build_model("llama"), lora_dir / "poet")
    model.adapters.load(["poet", "pirate"])
    poet, pirate = model.adapters.all
    assert (poet.name, pirate.name) == ("poet", "pirate")
    assert model.with_adapter(None).applied_adapters == (poet, pirate)
    assert model.with_adapter(None).name == "tiny"
    assert model.with_adapter("pirate").applied_adapters == (pirate,)
    assert model.with_adapter("pirate").name == "tiny:pirate"
    assert model.with_adapter("none").applied_adapters == ()
    with pytest.raises(AdapterNotFoundError, match="Loaded are: poet, pirate"):
        model.with_adapter("nobody")


def test_a_model_that_runs_one_request_at_a_time(lora_dir: Path) -> None:
    with pytest.raises(ModelLoadError, match="one request at a time"):
        Adapters("mamba", lora_dir, None).load(["pirate"])


@pytest.mark.anyio
async def test_those_of_the_start_are_for_the_first_model(lora_dir: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        build_model("llama").save_pretrained(tmp_path / "models" / name)
        build_tokenizer().save_pretrained(tmp_path / "models" / name)
    settings = Settings(
        model=("first", "second"),
        model_dir=tmp_path / "models",
        lora=("pirate",),
        lora_dir=lora_dir,
        cpu=True,
        kv_cache_memory=0.01,
        model_aliases={"alias": "second"},
    )
    edit_config(lora_dir / "pirate", r=0)
    with pytest.raises(ModelLoadError, match=f"^{lora_dir}/pirate/{CONFIG_FILE} is damaged"):
        await ModelManager(settings).load_all(settings.model)
    edit_config(lora_dir / "pirate", r=4)
    manager = ModelManager(settings)
    try:
        await manager.load_all(settings.model)
        assert [model.adapters.names for model in manager.loaded] == [("pirate",), ()]
        with manager.lease() as lease:
            assert (await lease.get("first:pirate")).name == "first:pirate"
        manager.find("second").adapters.load(["pirate"])
        with manager.lease() as lease:
            assert (await lease.get("alias:pirate")).name == "second:pirate"
    finally:
        manager.close()
