"""Images in batches: what is said is what transformers' own generate says, whoever is beside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from modules.engine.cache_manager import BLOCK_SIZE
from modules.engine.engine import Engine
from modules.engine.fused_layers import quantize_model
from modules.engine.image_embeddings import ImageEmbedder
from modules.engine.image_inputs import ImageInputs
from modules.engine.low_rank import LowRank
from modules.engine.probe import probe
from modules.engine.sequence import SequenceRequest
from modules.engine.text_part import find_text_part
from modules.errors import NotBatchableError
from tests.engine.conftest import EngineFactory, request, run, token_ids
from tests.engine.test_fused_layers import round_weights
from tests.engine.test_low_rank import spy_on_logits
from tests.vision import IDS, PATCH, SEPARATOR, TEXT, VISION, build_vision_model

PLACES = {"llava": IDS["<image>"], "qwen2_vl": IDS["<|image_pad|>"]}
TEXT_BETWEEN = (60, 61, 62)


def build_inputs(kind: str, *seeds: int) -> ImageInputs:
    """Images of four, six and eight tokens where their size may differ, else of four."""
    if kind == "llava":
        tokens = [(PLACES[kind],) * 4 for _ in seeds]
        tensors = {"pixel_values": torch.stack([_draw(seed, 3, 28, 28) for seed in seeds])}
        return ImageInputs(tuple(tokens), seeds, SEPARATOR, tensors, {})
    sizes = [(2, 2 + seed % 3) for seed in seeds]
    patches = [_draw(s, 4 * h * w, 6 * PATCH**2) for s, (h, w) in zip(seeds, sizes, strict=True)]
    tensors = {
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]),
    }
    tokens = [(PLACES[kind],) * (h * w) for h, w in sizes]
    kinds = {"mm_token_type_ids": {PLACES[kind]: 1}}
    return ImageInputs(tuple(tokens), seeds, SEPARATOR, tensors, kinds)


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def show(kind: str, name: str, *seeds: int, before: int = 5, **params: object) -> SequenceRequest:
    """The first two images are read together, each other one apart."""
    groups = [seeds[:2], *((seed,) for seed in seeds[2:])]
    images = tuple(build_inputs(kind, *group) for group in groups)
    prompt = [*range(100, 100 + before)]
    for own in chain.from_iterable(group.token_ids for group in images):
        prompt += [*own, *TEXT_BETWEEN]
    return replace(request(name, prompt, **params), images=images)


def generate(model: PreTrainedModel, wish: SequenceRequest) -> list[int]:
    """By transformers."""
    ids = torch.tensor([wish.prompt_token_ids])
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if wish.images:
        images = join(wish.images)
        inputs |= images.to_arguments(wish.prompt_token_ids, model.device, model.dtype)
    inputs["max_new_tokens"] = wish.params.max_tokens
    output = model.generate(ids, do_sample=False, pad_token_id=0, **inputs)
    return output[0, ids.shape[1] :].tolist()


def join(groups: tuple[ImageInputs, ...]) -> ImageInputs:
    """As if they had been read together."""
    tensors = {
        name: torch.cat([group.tensors[name] for group in groups]) for name in groups[0].tensors
    }
    return replace(groups[0], tensors=tensors)


@pytest.fixture(params=PLACES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str) -> PreTrainedModel:
    return build_vision_model(kind)


@contextmanager
def counted_looks(engine: Engine) -> Iterator[list[int]]:
    """The list gets the number of images of each run of the part that sees."""
    looks: list[int] = []
    text_part = find_text_part(engine.runner._model).module

    def note(_: object, args: object, arguments: dict[str, Any]) -> None:
        if "attention_batch" not in arguments:
            looks.append(len(arguments["inputs_embeds"]))

    handle = text_part.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    yield looks
    handle.remove()


def test_ragged_staggered_batch_equals_generate(
    kind: str, model: PreTrainedModel, make_engine: EngineFactory
) -> None:
    """Prompts are read in chunks of eight tokens, so images are cut."""
    engine = make_engine(model, max_num_batched_tokens=16, max_num_seqs=5)
    wishes = [
        show(kind, "one", 1),
        request("text", [*range(60, 90)]),
        show(kind, "three", 2, 3, 4, before=1),
        show(kind, "two", 5, 6, before=20, max_tokens=30),
        request("other text", [77]),
        show(kind, "first", 7, before=0),
    ]
    outputs: dict[str, list[Any]] = {}
    for number, wish in enumerate(wishes):
        engine.add(wish)
        for _ in range(number % 3):
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
    for name, rest in run(engine).items():
        outputs.setdefault(name, []).extend(rest)
    for wish in wishes:
        assert token_ids(outputs[wish.request_id]) == generate(model, wish), wish.request_id


def test_preempted_sequences_start_over_and_end_the_same(
    kind: str, model: PreTrainedModel, make_engine: EngineFactory
) -> None:
    engine = make_engine(model, max_model_len=256, num_cache_tokens=256, max_num_seqs=4)
    wishes = [show(kind, str(seed), seed, before=40, max_tokens=60) for seed in range(4)]
    for wish in wishes:
        engine.add(wish)
    preempted = []
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda unit: (preempted.append(unit), preempt(unit))[1]  # type: ignore[method-assign,func-returns-value,assignment]
    outputs = run(engine)
    assert preempted
    for wish in wishes:
        assert token_ids(outputs[wish.request_id]) == generate(model, wish)


def test_what_begins_alike_is_read_once(
    kind: str, model: PreTrainedModel, make_engine: EngineFactory
) -> None:
    """Another picture is another beginning, though its tokens are the same."""
    engine = make_engine(model)
    cached = {}
    wishes = [
        show(kind, "first", 3, before=60),
        show(kind, "again", 3, before=60),
        show(kind, "other", 6, before=60),
        show(kind, "and one more", 3, 7, before=60),
        show(kind, "behind", 3, before=124),
        show(kind, "other behind", 6, before=124),
    ]
    assert wishes[0].prompt_token_ids == wishes[2].prompt_token_ids
    for wish in wishes:
        engine.add(wish)
        outputs = run(engine)[wish.request_id]
        assert token_ids(outputs) == generate(model, wish)
        cached[wish.request_id] = outputs[0].num_cached_tokens
    assert BLOCK_SIZE == 64
    assert cached == {
        "first": 0,
        "again": 64,
        "other": 0,
        "and one more": 64,
        "behind": 0,
        "other behind": 64,
    }


def test_a_picture_is_looked_at_once(
    kind: str, model: PreTrainedModel, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    wishes = [show(kind, "a", 1), show(kind, "b", 1, before=9), show(kind, "c", 1, max_tokens=2)]
    with counted_looks(engine) as looks:
        for wish in wishes:
            engine.add(wish)
        run(engine)
        assert looks == [1]
        engine.add(show(kind, "turn", 1, before=7))
        run(engine)
        assert looks == [1]
        show_more = show(kind, "more", 1), show(kind, "apart", 5)
        images = tuple(group for wish in show_more for group in wish.images)
        prompt = sum([wish.prompt_token_ids for wish in show_more], ())
        engine.add(replace(show_more[0], prompt_token_ids=prompt, images=images))
        run(engine)
        assert looks == [1, 1], "only the new one"
        monkeypatch.setattr("modules.engine.image_embeddings.MAX_KEPT_BYTES", 1)
        for seed in (2, 1):  # of which only the last one is kept
            engine.add(show(kind, "next", seed))
            run(engine)
        assert looks == [1] * 4
    for wish in wishes:
        engine.add(wish)
    assert {name: token_ids(outputs) for name, outputs in run(engine).items()} == {
        wish.request_id: generate(model, wish) for wish in wishes
    }


def test_a_step_looks_for_one_only(
    kind: str, model: PreTrainedModel, make_engine: EngineFactory
) -> None:
    """So the others get their next tokens in between."""
    engine = make_engine(model)
    engine.add(request("text", [70, 71], max_tokens=30))
    engine.step()
    for seed in range(3):
        engine.add(show(kind, str(seed), seed))
    engine.add(request("late", [72]))
    with counted_looks(engine) as looks:
        for number in range(1, 4):
            ids = [output.request_id for output in engine.step()]
            assert looks == [1] * number
            assert {"text", "late"} < {*ids}
    run(engine)


def test_a_look_that_fails_is_one_generations_fault(
    kind: str, model: PreTrainedModel, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    embed = ImageEmbedder.embed

    def fail(self: ImageEmbedder, images: ImageInputs) -> Any:
        if 1 in images.keys:
            raise RuntimeError("no such picture")
        return embed(self, images)

    monkeypatch.setattr(ImageEmbedder, "embed", fail)
    good = show(kind, "good", 2)
    for wish in (show(kind, "bad", 1), good):
        engine.add(wish)
    outputs = []
    while engine.has_unfinished:
        for unit in engine.schedule().units:
            try:
                outputs += engine.execute(unit)
            except RuntimeError:
                outputs.append(engine.fail(unit.items[0].seq.request_id))
    assert token_ids([o for o in outputs if o.request_id == "good"]) == generate(model, good)
    assert [o.token_id for o in outputs if o.request_id == "bad"] == [0]


def test_an_adapter_changes_the_part_that_reads(
    kind: str, model: PreTrainedModel, make_engine: EngineFactory
) -> None:
    engine = make_engine(model)
    shapes = engine.runner.layers.shapes
    assert all(path.startswith("model.language_model.layers.") for path in shapes)
    path = "model.language_model.layers.1.mlp.up_proj"
    num_inputs, num_outputs = shapes[path]
    update = LowRank(_draw(0, 4, num_inputs), _draw(1, num_outputs, 4))
    adapted = copy.deepcopy(model)
    adapted.get_submodule(path).weight.data += update.up @ update.down
    adapter = engine.runner.layers.prepare("a", {path: update})
    plain = show(kind, "plain", 1)
    own = replace(show(kind, "own", 1), adapters=(adapter,))
    for wish in (own, plain, request("text", [70, 71])):
        engine.add(wish)
    outputs = run(engine)
    expected = generate(model, plain), generate(adapted, own)
    assert (token_ids(outputs["plain"]), token_ids(outputs["own"])) == expected
    assert expected[0] != expected[1]


def test_only_images_that_are_in_the_prompt(kind: str, make_engine: EngineFactory) -> None:
    engine = make_engine(build_vision_model(kind))
    wish = show(kind, "a", 1, 2)
    with pytest.raises(ValueError, match="not in"):
        engine.add(replace(wish, prompt_token_ids=wish.prompt_token_ids[:12]))
    nothing = replace(build_inputs(kind, 1), token_ids=((),))
    with pytest.raises(ValueError, match="no tokens"):
        engine.add(replace(wish, images=(nothing,)))
    assert not engine.has_unfinished


# Families

PLACE = 100
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 4 * PATCH,
    "patch_size": PATCH,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SIDE = 4 * PATCH


def text(model_type: str, **more: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": model_type, **more}


Build = Callable[[], tuple[PretrainedConfig, int, dict[str, Tensor]]]


def build_idefics3() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    config = Idefics3Config(
        text_config=text("llama"), vision_config=CLIP, image_token_id=PLACE, scale_factor=2
    )
    return config, 4, {"pixel_values": _draw(0, 1, 1, 3, SIDE, SIDE)}


def build_smolvlm() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    config = SmolVLMConfig(
        text_config=text("llama"), vision_config=CLIP, image_token_id=PLACE, scale_factor=2
    )
    return config, 4, {"pixel_values": _draw(0, 1, 1, 3, SIDE, SIDE)}


def build_llava_onevision() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    config = LlavaOnevisionConfig(
        text_config=text("qwen2"),
        vision_config={**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=PLACE,
        image_grid_pinpoints=[[SIDE, SIDE]],
    )
    sizes = torch.tensor([[SIDE, SIDE]])
    return config, 36, {"pixel_values": _draw(0, 1, 2, 3, SIDE, SIDE), "image_sizes": sizes}


def build_paligemma() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    config = PaliGemmaConfig(
        text_config=text("gemma"),
        vision_config={
            **CLIP,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "projection_dim": 64,
        },
        image_token_index=PLACE,
        projection_dim=64,
    )
    return config, 16, {"pixel_values": _draw(0, 1, 3, SIDE, SIDE)}


def build_internvl() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    sizes = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    config = InternVLConfig(
        text_config=text("qwen2"), vision_config={**CLIP, **sizes}, image_token_id=PLACE
    )
    return config, 4, {"pixel_values": _draw(0, 1, 3, SIDE, SIDE)}


def build_mistral3() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    config = Mistral3Config(
        text_config=text("mistral"),
        vision_config={**CLIP, "model_type": "pixtral", "head_dim": 16},
        image_token_index=PLACE,
        spatial_merge_size=2,
    )
    sizes = torch.tensor([[SIDE, SIDE]])
    return config, 4, {"pixel_values": _draw(0, 1, 3, SIDE, SIDE), "image_sizes": sizes}


def build_llava_next() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    config = LlavaNextConfig(
        text_config=text("llama"),
        vision_config={**CLIP, "model_type": "clip_vision_model"},
        image_token_index=PLACE,
        image_grid_pinpoints=[[SIDE, SIDE]],
        vision_feature_layer=-1,
    )
    sizes = torch.tensor([[SIDE, SIDE]])
    return config, 36, {"pixel_values": _draw(0, 1, 2, 3, SIDE, SIDE), "image_sizes": sizes}


def build_gemma3() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    config = Gemma3Config(
        text_config={**TEXT, **layers, "query_pre_attn_scalar": 16},
        vision_config={**CLIP, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=PLACE,
    )
    return config, 4, {"pixel_values": _draw(0, 1, 3, SIDE, SIDE)}


def build_qwen3_vl() -> tuple[PretrainedConfig, int, dict[str, Tensor]]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    config = Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": SECTIONS},
        vision_config={**VISION, **sizes, "deepstack_visual_indexes": [0]},
        image_token_id=PLACE,
        video_token_id=PLACE + 1,
        vision_start_token_id=PLACE + 2,
        vision_end_token_id=PLACE + 3,
    )
    grid = torch.tensor([[1, 4, 4]])
    return config, 4, {"pixel_values": _draw(0, 16, 6 * PATCH**2), "image_grid_thw": grid}


KINDS_OF_TOKENS = {"gemma3": "token_type_ids", "qwen3_vl": "mm_token_type_ids"}


def build_family(name: str, build: Build) -> tuple[PreTrainedModel, ImageInputs]:
    config, num_tokens, tensors = build()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = None
    kinds = {KINDS_OF_TOKENS[name]: {PLACE: 1}} if name in KINDS_OF_TOKENS else {}
    return model, ImageInputs(((PLACE,) * num_tokens,), (0,), SEPARATOR, tensors, kinds)


BATCHED: dict[str, Build] = {
    "idefics3": build_idefics3,
    "internvl": build_internvl,
    "llava_next": build_llava_next,
    "llava_onevision": build_llava_onevision,
    "mistral3": build_mistral3,
    "qwen3_vl": build_qwen3_vl,
    "smolvlm": build_smolvlm,
}


@pytest.mark.parametrize("name", BATCHED)
def test_families_that_the_probe_lets_through(name: str, make_engine: EngineFactory) -> None:
    model, images = build_family(name, BATCHED[name])
    wishes = [
        replace(request(name, [*prompt, *images.token_ids[0], 52, 53]), images=(images,))
        for name, prompt in {"a": (50, 51), "b": (60,)}.items()
    ]
    expected = [generate(model, wish) for wish in wishes]
    assert expected[0] != generate(model, replace(wishes[0], images=()))
    attention = [module.config._attn_implementation for module in own_parts(model)]
    probe(model, images)
    assert [module.config._attn_implementation for module in own_parts(model)] == attention
    engine = make_engine(model, max_num_batched_tokens=16, max_num_seqs=4)
    for wish in (*wishes, request("text", [60, 61])):
        engine.add(wish)
    outputs = run(engine)
    assert [token_ids(outputs[wish.request_id]) for wish in wishes] == expected


def test_what_looks_ahead_in_images_is_refused() -> None:
    model, images = build_family("gemma3", build_gemma3)
    attention = [module.config._attn_implementation for module in own_parts(model)]
    probe(copy.deepcopy(model))  # its texts could be
    with pytest.raises(NotBatchableError, match="does not read images from left to right"):
        probe(model, images)
    assert [module.config._attn_implementation for module in own_parts(model)] == attention


def test_what_looks_ahead_in_texts_too_is_refused() -> None:
    model, images = build_family("paligemma", build_paligemma)
    with pytest.raises(NotBatchableError, match="its results would be wrong"):
        probe(model, images)


def test_images_that_are_more_than_embeddings_are_refused() -> None:
    """What a text part is given and nothing here knows of would be lost."""
    model, images = build_family("mistral3", build_mistral3)
    find_text_part(model).module.register_forward_pre_hook(
        lambda _, args, arguments: (args, {**arguments, "per_layer": [torch.zeros(1)]}),
        with_kwargs=True,
    )
    with pytest.raises(NotBatchableError, match="more than embeddings to it, per_layer too"):
        probe(model, images)


def own_parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_in_fewer_bits_an_image_says_nearly_the_same(
    dtype: str, make_engine: EngineFactory
) -> None:
    model = build_vision_model("llava")
    if dtype == "int4":
        round_weights(model.model.language_model)
    wish = show("llava", "a", 1, 2, max_tokens=1)
    (images,) = wish.images
    # Some families write words among an image's tokens, as marks.
    marked = tuple((50, *own[:2], 51, *own[2:]) for own in images.token_ids)
    prompt = [*wish.prompt_token_ids[:5], *marked[0], 60, *marked[1], 61]
    images = replace(images, token_ids=marked)
    wish = replace(wish, prompt_token_ids=tuple(prompt), images=(images,))
    quantized = copy.deepcopy(model)
    assert quantize_model(quantized, dtype)
    rows = []
    for each in (model, quantized):
        engine = make_engine(each)
        logits = spy_on_logits(engine)
        engine.add(wish)
        run(engine)
        rows.append(logits[-1])
    assert torch.linalg.norm(rows[1] - rows[0]) / torch.linalg.norm(rows[0]) < 0.05


def test_layers_that_have_several_axes_stay_in_float() -> None:
    assert not quantize_model(build_vision_model("qwen2_vl"))
