"""Images in the engine: tensors beside the tokens, through interruptions, faults and scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from modules.engine.image_inputs import ImageInputs
from modules.engine.sequence import SequenceRequest
from tests.engine.conftest import request, run, token_ids
from tests.engine.test_generate_engine import fail_once, make
from tests.vision import IDS, PATCH, QWEN_IDS, SEPARATOR, build_vision_model

PLACES = {"llava": IDS["<image>"], "qwen2_vl": IDS["<|image_pad|>"]}


def build_inputs(kind: str, seed: int = 0) -> ImageInputs:
    """Of one image, which has four tokens."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "llava":
        pixels = torch.randn(1, 3, 2 * PATCH, 2 * PATCH, generator=generator)
        return _inputs(kind, seed, {"pixel_values": pixels}, {})
    patches = torch.randn(16, 2 * 3 * PATCH**2, generator=generator)
    grid = torch.tensor([[1, 4, 4]])
    kinds = {"mm_token_type_ids": {PLACES[kind]: 1}}
    return _inputs(kind, seed, {"pixel_values": patches, "image_grid_thw": grid}, kinds)


def _inputs(kind: str, seed: int, tensors: dict[str, Any], kinds: dict[str, Any]) -> ImageInputs:
    return ImageInputs(((PLACES[kind],) * 4,), (seed,), SEPARATOR, tensors, kinds)


def show(kind: str, name: str, seed: int = 0, **params: object) -> SequenceRequest:
    start = [QWEN_IDS["vision_start_token_id"]]
    prompt = [40, 41, *start, *[PLACES[kind]] * 4, 42, 43]
    return replace(request(name, prompt, **params), images=(build_inputs(kind, seed),))


def generate(model: PreTrainedModel, wish: SequenceRequest) -> list[int]:
    """By transformers."""
    ids = torch.tensor([wish.prompt_token_ids])
    inputs = wish.images[0].to_arguments(wish.prompt_token_ids, model.device, model.dtype)
    output = model.generate(ids, do_sample=False, max_new_tokens=12, **inputs)
    return output[0, ids.shape[1] :].tolist()


@pytest.fixture(params=PLACES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_arguments() -> None:
    arguments = build_inputs("qwen2_vl").to_arguments(
        (1, PLACES["qwen2_vl"], 2), torch.device("cpu"), torch.bfloat16
    )
    assert {name: tensor.dtype for name, tensor in arguments.items()} == {
        "pixel_values": torch.bfloat16,
        "image_grid_thw": torch.int64,
        "mm_token_type_ids": torch.int64,
    }
    assert arguments["mm_token_type_ids"].tolist() == [[0, 1, 0]]


def test_who_is_interrupted_looks_again(kind: str) -> None:
    """The text in between has positions of its own."""
    model = build_vision_model(kind)
    wishes = [show(kind, "behind"), show(kind, "other", seed=1)]
    expected = [generate(model, wish) for wish in wishes]
    assert expected[0] != expected[1]
    engine = make(model)
    engine.add(replace(wishes[0], is_background=True))
    outputs = [output for _ in range(5) for output in engine.step()]
    engine.add(request("text", [50, 51, 52], max_tokens=2))
    engine.add(wishes[1])
    while engine.has_unfinished:
        outputs += engine.step()
    own = [token_ids([o for o in outputs if o.request_id == w.request_id]) for w in wishes]
    assert own == expected


def test_a_step_that_failed_is_tried_again(kind: str) -> None:
    model = build_vision_model(kind)
    wish = show(kind, "a")
    expected = generate(model, wish)
    engine = make(model)
    engine.add(wish)
    fail_once(model, 4)
    tokens: list[int] = []
    while engine.has_unfinished:
        batch = engine.schedule()
        try:
            tokens += token_ids(engine.execute(batch))
        except RuntimeError:
            assert len(tokens) == 3
    assert tokens == expected


def test_a_prompt_is_scored_with_its_images(kind: str) -> None:
    model = build_vision_model(kind)
    wish = show(kind, "a", prompt_logprobs=True, num_logprobs=0, max_tokens=2)
    ids = torch.tensor([wish.prompt_token_ids])
    inputs = wish.images[0].to_arguments(wish.prompt_token_ids, model.device, model.dtype)
    with torch.inference_mode():
        logprobs = model(input_ids=ids, **inputs).logits[0].log_softmax(-1)
    engine = make(model)
    engine.add(wish)
    scored = [output.logprob for output in run(engine)["a"] if output.is_prompt]
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[0, 1:])]
    assert scored[1:] == pytest.approx(expected, abs=1e-3)


def test_guidance_leads_away_from_a_text(kind: str) -> None:
    """Whose tokens are read beside those of the images, by the same model."""
    model = build_vision_model(kind)
    plain = show(kind, "a")
    steered = show(kind, "b", guidance_scale=1.0)
    steered = replace(steered, negative_prompt_token_ids=(60, 61, 62))
    engine = make(model)
    for wish in (plain, steered):
        engine.add(wish)
    outputs = run(engine)
    assert token_ids(outputs["a"]) == token_ids(outputs["b"])  # a scale of 1 leads nowhere
