"""Adapters in batches against peft, which runs one at a time over transformers' own layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from modules.adapter_files import read_adapter
from modules.engine.async_engine import AsyncEngine
from modules.engine.beam_search import BeamOptions, search_beams
from modules.engine.engine import Engine, EngineConfig
from modules.engine.fused_layers import quantize_model
from modules.engine.sequence import SequenceRequest
from tests.adapters import save_adapter
from tests.engine.conftest import build_model, request, run, token_ids
from tests.engine.test_beam_search import collect
from tests.engine.test_engine import generate, random_prompts
from tests.engine.test_fused_layers import round_weights
from tests.engine.test_prompt_scores import SCORES, assert_scored

# As each other's company: the plain model, two adapters, and the sum of both.
MIXES: tuple[tuple[str, ...], ...] = ((), ("red",), ("blue",), ("red", "blue"))
OPTIONS = {
    "red": {"seed": 1, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "blue": {
        "seed": 2,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "alpha_pattern": {"v_proj": 16},
        "layers_to_transform": [1],
    },
}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def oracles(loras: Path) -> dict[tuple[str, ...], PreTrainedModel]:
    """By adapters, models as peft makes them."""
    base = build_base()
    models = {(name,): save_adapter(base, loras / name, **OPTIONS[name]) for name in OPTIONS}
    both = copy.deepcopy(models["red",])
    both.load_adapter(str(loras / "blue"), "blue")
    both.base_model.set_adapter(["default", "blue"])
    return {(): base, **models, ("red", "blue"): both}


def build_base() -> PreTrainedModel:
    """Whose weights are the same in 4 bits."""
    model = build_model("llama")
    round_weights(model)
    return model


class Adapted:
    """An engine, and the adapters for its layers."""

    def __init__(self, loras: Path, dtype: str | None = None, **options: object) -> None:
        model = build_base()
        if dtype is not None:
            assert quantize_model(model, dtype)
        config = {"max_model_len": 512, "num_cache_tokens": 4096, "block_size": 64, **options}
        self.engine = Engine(model, EngineConfig(**config))  # type: ignore[arg-type]
        layers = self.engine.runner.layers
        self.adapters = {
            name: layers.prepare(name, read_adapter(name, loras, "tiny", layers.shapes))
            for name in OPTIONS
        }

    def request(self, mix: tuple[str, ...], prompt: list[int], **params: object) -> SequenceRequest:
        wish = request(f"{mix} {random_id()}", prompt, **params)
        return replace(wish, adapters=tuple(self.adapters[name] for name in mix))

    def generate(self, *wishes: SequenceRequest) -> list[list[int]]:
        for wish in wishes:
            self.engine.add(wish)
        outputs = run(self.engine)
        return [token_ids(outputs[wish.request_id]) for wish in wishes]


_numbers = iter(range(10**6))


def random_id() -> int:
    return next(_numbers)


def generate_alone(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, max_new_tokens=num_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def test_each_row_of_a_batch_says_what_peft_says(
    loras: Path, oracles: dict[tuple[str, ...], PreTrainedModel]
) -> None:
    """Prompts of several chunks beside streams, more sequences than may run at once."""
    adapted = Adapted(loras, max_num_seqs=5, max_num_batched_tokens=32)
    prompts = random_prompts(8)
    mixes = [MIXES[i % 4] for i in range(8)]
    wishes = [adapted.request(*pair) for pair in zip(mixes, prompts, strict=True)]
    expected = [generate_alone(oracles[m], p, 12) for m, p in zip(mixes, prompts, strict=True)]
    assert adapted.generate(*wishes) == expected
    # Hooks that nobody needs are gone, so that a step without adapters costs what it did.
    adapted.generate(adapted.request((), [5, 6, 7]))
    assert not any(module._forward_hooks for module in adapted.engine.runner._model.modules())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_fused_layers_add_the_same_updates(
    dtype: str, loras: Path, oracles: dict[tuple[str, ...], PreTrainedModel]
) -> None:
    """Updates are float arithmetic in either case; what they are added to is off by a few per cent,
    as its activations have 8 bits. An update that is lost or added to other rows, columns or layers
    would be off by 50 per cent and more.
    """
    adapted = Adapted(loras, dtype)
    prompt = random_prompts(1, 70)[0]
    seen = spy_on_logits(adapted.engine)
    for mix in MIXES:
        adapted.engine.add(adapted.request(mix, prompt, max_tokens=1))
    run(adapted.engine)
    logits = torch.cat(seen)
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        expected = torch.stack([oracles[mix](input_ids=ids).logits[0, -1] for mix in MIXES])
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    changes = (expected[1:] - expected[0]).norm(dim=-1) / expected[0].norm()
    assert errors.max() < 0.05 < 0.5 < changes.min()


@pytest.mark.parametrize(
    ("config", "wishes"),
    [({"num_cache_tokens": 512}, {}), ({}, {"prompt_lookup_num_tokens": 5})],
    ids=["preemption", "drafts"],
)
def test_adapters_stay_with(
    config: dict[str, int],
    wishes: dict[str, int],
    loras: Path,
    oracles: dict[tuple[str, ...], PreTrainedModel],
) -> None:
    adapted = Adapted(loras, **config)
    scheduler = adapted.engine.scheduler
    seen: list[object] = []
    preempt, build_draft = scheduler._preempt, scheduler._build_draft
    scheduler._preempt = lambda unit: (seen.append(unit), preempt(unit))[1]
    scheduler._build_draft = lambda *args: (seen.extend(d := build_draft(*args)), d)[1]
    prompts = [prompt * 8 for prompt in random_prompts(4, 30)]
    requests = [
        adapted.request(mix, prompt, max_tokens=30, **wishes)
        for mix, prompt in zip(MIXES, prompts, strict=True)
    ]
    expected = [generate_alone(oracles[m], p, 30) for m, p in zip(MIXES, prompts, strict=True)]
    assert adapted.generate(*requests) == expected
    assert seen


def test_a_prompt_is_scored_with_its_adapters(
    loras: Path, oracles: dict[tuple[str, ...], PreTrainedModel]
) -> None:
    adapted = Adapted(loras, max_num_batched_tokens=32)
    prompt = random_prompts(1, 70)[0]
    wishes = {mix: adapted.request(mix, prompt, **SCORES) for mix in MIXES}
    adapted.generate(adapted.request((), prompt))  # which leaves the base model's keys and values
    for wish in wishes.values():
        adapted.engine.add(wish)
    outputs = run(adapted.engine)
    for mix, wish in wishes.items():
        assert_scored(outputs[wish.request_id], oracles[mix], prompt)


def test_beams_keep_their_adapter(
    loras: Path, oracles: dict[tuple[str, ...], PreTrainedModel]
) -> None:
    adapted = Adapted(loras)
    prompt = random_prompts(1, 40)[0]
    engine = AsyncEngine(adapted.engine)
    try:
        wish = adapted.request(("red",), prompt)
        found = collect(
            search_beams(engine.generate, [wish], BeamOptions(num_beams=3), frozenset())
        )
    finally:
        engine.stop()
    best = generate(oracles["red",], prompt, num_beams=3, max_new_tokens=12)
    assert token_ids(found[wish.request_id]) == best


@pytest.mark.usefixtures("oracles")  # which write the files
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_fused_rows_are_the_same_to_the_last_bit_in_any_company(dtype: str, loras: Path) -> None:
    adapted = Adapted(loras, dtype, num_retained_tokens=0)
    prompts = random_prompts(4, 40)
    seen = spy_on_logits(adapted.engine)
    wishes = [
        adapted.request(mix, prompt, max_tokens=1)
        for mix, prompt in zip(MIXES, prompts, strict=True)
    ]
    adapted.generate(*wishes)
    for wish in wishes:
        adapted.generate(wish)
    together, *alone = seen
    assert torch.equal(together, torch.cat(alone))


def spy_on_logits(engine: Engine) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: (seen.append(forward(batch)), seen[-1])[1]
    return seen
