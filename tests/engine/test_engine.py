"""The engine against transformers' own generate, and what it holds afterwards."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from modules.engine.cache_manager import BLOCK_SIZE
from modules.engine.engine import Engine
from modules.engine.outputs import FinishReason
from modules.engine.prompt_lookup import PromptLookup
from tests.engine.conftest import CONFIGS, VOCAB_SIZE, build_model, request, run, token_ids


def random_prompts(count: int, longest: int = 60, seed: int = 3) -> list[list[int]]:
    draw = random.Random(seed)
    lengths = [draw.randrange(1, longest) for _ in range(count)]
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def generate(model: PreTrainedModel, prompt: list[int], **options: object) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    return output[0, start:].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_staggered_batch_equals_generate(name: str, make_engine) -> None:
    model = build_model(name)
    engine = make_engine(model, max_num_batched_tokens=16, max_num_seqs=5)
    prompts = random_prompts(9)
    outputs: dict[str, list] = {}
    for number, prompt in enumerate(prompts):
        engine.add(request(str(number), prompt))
        for _ in range(number % 3):  # the next one arrives while this one is running
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
    for name_, rest in run(engine).items():
        outputs.setdefault(name_, []).extend(rest)

    for number, prompt in enumerate(prompts):
        assert token_ids(outputs[str(number)]) == generate(model, prompt), f"prompt {number}"


def test_growing_past_a_block_equals_generate(make_engine, tiny_model) -> None:
    engine = make_engine()
    prompt = random_prompts(1, seed=5)[0]
    engine.add(request("long", prompt, max_tokens=150))
    assert token_ids(run(engine)["long"]) == generate(tiny_model, prompt, max_new_tokens=150)


def test_preempted_sequences_start_over_and_end_the_same(make_engine, tiny_model) -> None:
    # 512 tokens for six sequences of 100 + 100: they cannot all stay.
    engine = make_engine(max_model_len=512, num_cache_tokens=512, max_num_seqs=6)
    prompts = [prompt * 4 for prompt in random_prompts(6, 30)]
    for number, prompt in enumerate(prompts):
        engine.add(request(str(number), prompt, max_tokens=100))
    preempted = []
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda unit: (preempted.append(unit), preempt(unit))[1]
    outputs = run(engine)
    assert preempted
    for number, prompt in enumerate(prompts):
        expected = generate(tiny_model, prompt, max_new_tokens=100)
        assert token_ids(outputs[str(number)]) == expected


def test_repetition_penalty_equals_generate(make_engine, tiny_model) -> None:
    prompts = random_prompts(3)
    engine = make_engine()
    for number, prompt in enumerate(prompts):
        wish = {"repetition_penalty": 1.5, "repetition_penalty_range": 0}
        engine.add(request(str(number), prompt, **wish, max_tokens=30))
    outputs = run(engine)
    for number, prompt in enumerate(prompts):
        expected = generate(tiny_model, prompt, repetition_penalty=1.5, max_new_tokens=30)
        assert token_ids(outputs[str(number)]) == expected


def test_a_long_prompt_does_not_stop_running_streams(make_engine) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    engine.add(request("stream", [5, 6, 7], max_tokens=40))
    engine.step()
    engine.add(request("long", random_prompts(1, 400, seed=8)[0] * 2, max_tokens=1))
    while any(seq.request_id == "long" for seq in _unfinished(engine)):
        assert "stream" in {output.request_id for output in engine.step()}


def _unfinished(engine: Engine) -> list:
    return [*engine.scheduler.running, *engine.scheduler.waiting]


@pytest.mark.parametrize(
    ("params", "reason", "count"),
    [
        ({"max_tokens": 3}, FinishReason.LENGTH, 3),
        ({"max_tokens": None}, FinishReason.LENGTH, 64 - 4),
        ({"max_tokens": 1000}, FinishReason.LENGTH, 64 - 4),
    ],
)
def test_length_ends(make_engine, params, reason, count) -> None:
    engine = make_engine(max_model_len=64)
    engine.add(request("a", [5, 6, 7, 8], **params))
    outputs = run(engine)["a"]
    assert len(outputs) == count
    assert outputs[-1].finish_reason is reason
    assert all(output.finish_reason is None for output in outputs[:-1])


def test_end_of_sequence_tokens(make_engine, tiny_model) -> None:
    expected = generate(tiny_model, [5, 6, 7])
    eos = expected[4]
    first = expected.index(eos)
    ignoring = make_engine(eos_token_ids=frozenset({eos}))
    ignoring.add(request("stops", [5, 6, 7]))
    ignoring.add(request("ignores", [5, 6, 7], ignore_eos=True))
    ignoring.add(request("own", [5, 6, 7], ignore_eos=True, stop_token_ids=(expected[0],)))
    outputs = run(ignoring)
    assert token_ids(outputs["stops"]) == expected[: first + 1]
    assert outputs["stops"][-1].finish_reason is FinishReason.STOP
    assert token_ids(outputs["ignores"]) == expected
    assert token_ids(outputs["own"]) == expected[:1]


def test_abort_frees_at_once_wherever_the_sequence_is(make_engine) -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=8)
    for name in ("running", "reading", "waiting"):
        engine.add(request(name, list(range(5, 35)), max_tokens=50))
    for _ in range(5):
        engine.step()
    free = engine.cache_manager.num_free_blocks
    for name in ("waiting", "reading", "running", "running", "unknown"):
        engine.abort(name)
        engine.cache_manager.check_integrity()
    assert not engine.has_unfinished
    assert free < engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks


def test_same_seed_same_tokens_alone_or_in_company(make_engine) -> None:
    prompts = random_prompts(12)
    wishes = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.05},
        {"temperature": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ]
    together = make_engine()
    alone = {}
    for number, prompt in enumerate(prompts):
        wish = request(str(number), prompt, seed=number, **wishes[number % 4])
        together.add(wish)
        engine = make_engine()
        engine.add(wish)
        alone |= run(engine)
    assert {k: token_ids(v) for k, v in run(together).items()} == {
        k: token_ids(v) for k, v in alone.items()
    }


def test_without_a_seed_every_run_differs(make_engine) -> None:
    engine = make_engine()
    for number in range(2):
        engine.add(request(str(number), [5, 6, 7], temperature=2.0, max_tokens=20))
    outputs = run(engine)
    assert token_ids(outputs["0"]) != token_ids(outputs["1"])


def test_memory_of_ended_sequences_is_used_again(make_engine) -> None:
    engine = make_engine()
    tables = []
    for number in range(8):
        engine.add(request(str(number), [5, 6, number]))
        engine.step()
        tables.append(engine.scheduler.running[0].block_table[:])
        run(engine)
    assert tables == tables[:1] * 8
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks


@pytest.mark.parametrize("name", CONFIGS)
def test_later_turns_are_the_same_as_without_the_earlier_ones(name: str, make_engine) -> None:
    model = build_model(name)
    engine = make_engine(model, max_num_batched_tokens=256)
    conversation = random_prompts(1, 400, seed=4)[0]
    for turn in range(4):
        wish = request(
            str(turn), conversation, max_tokens=70, seed=turn, temperature=float(turn % 2)
        )
        engine.add(wish)
        cold = make_engine(model, max_num_batched_tokens=256)
        cold.add(wish)
        outputs, expected = run(engine)[str(turn)], run(cold)[str(turn)]
        assert token_ids(outputs) == token_ids(expected)
        assert expected[0].num_cached_tokens == 0
        if turn:
            known = len(conversation) - 1 - 5  # the last token of a turn is never computed
            assert outputs[0].num_cached_tokens == known // BLOCK_SIZE * BLOCK_SIZE
        conversation = [*conversation, *token_ids(outputs), *range(5, 10)]


def test_equal_prompts_are_read_once(make_engine, tiny_model) -> None:
    engine = make_engine(max_num_batched_tokens=128)
    prompt = [number % 290 + 5 for number in range(300)]
    for number in range(4):
        engine.add(request(str(number), prompt, max_tokens=1))
    outputs, num_read = {}, 0
    while engine.has_unfinished:
        batch = engine.schedule()
        num_read += sum(item.num_tokens for item in batch.items)
        outputs |= {output.request_id: output.token_id for output in engine.execute(batch)}
    num_shared = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert num_shared > BLOCK_SIZE
    assert num_read == len(prompt) + 3 * (len(prompt) - num_shared)
    assert {*outputs.values()} == {*generate(tiny_model, prompt, max_new_tokens=1)}


def test_what_ended_generations_leave_is_bounded(make_engine) -> None:
    engine = make_engine(max_model_len=128, num_cache_tokens=2048)
    for number in range(20):
        engine.add(request(str(number), [number, *range(10, 110)], max_tokens=1))
        run(engine)
    assert engine.cache_manager.num_retained_blocks == 128 // BLOCK_SIZE


LOOKUP_WISHES = {
    "greedy": {},
    "sampled": {"temperature": 0.5},
    "sorted": {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "penalised": {
        "temperature": 0.3,
        "repetition_penalty": 1.05,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
    },
    "penalised greedily": {"frequency_penalty": 0.5},
}


@pytest.mark.parametrize("wishes", LOOKUP_WISHES.values(), ids=LOOKUP_WISHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_prompt_lookup_changes_no_token(name: str, wishes: dict, make_engine) -> None:
    model = build_model(name)
    prompts = [prompt * 3 for prompt in random_prompts(6, 40)]
    results, num_reads = [], []
    for number in (0, 10):
        engine = make_engine(model)
        for index, prompt in enumerate(prompts):
            lookup = {"prompt_lookup_num_tokens": number, "num_logprobs": 0, **wishes}
            engine.add(request(str(index), prompt, max_tokens=80, seed=index, **lookup))
        outputs: dict[str, list] = {}
        num_reads.append(0)
        while engine.has_unfinished:
            batch = engine.schedule()
            num_reads[-1] += len(batch.sampled)
            for output in engine.execute(batch):
                outputs.setdefault(output.request_id, []).append(output)
            engine.cache_manager.check_integrity()
        results.append(outputs)
    for index in map(str, range(6)):
        without, with_lookup = (outputs[index] for outputs in results)
        assert token_ids(with_lookup) == token_ids(without)
        assert [o.logprob for o in with_lookup] == pytest.approx(
            [o.logprob for o in without], abs=1e-3
        )
    if (name, wishes) == ("llama", {}):
        assert num_reads[1] < num_reads[0], "no guess was right"


@pytest.mark.parametrize("name", CONFIGS)
def test_right_and_wrong_guesses_of_any_length_change_no_token(
    name: str, make_engine, monkeypatch
) -> None:
    model = build_model(name)
    prompt = [5, 6, 7]
    plain = make_engine(model)
    plain.add(request("a", prompt, max_tokens=150, temperature=0.8, seed=1))
    expected = token_ids(run(plain)["a"])
    draw = random.Random(0)

    def guess(self: PromptLookup, token_ids: list[int], room: int) -> tuple[int, ...]:
        right = expected[len(token_ids) - 3 :][: min(room, draw.randrange(9))]
        return tuple(t if draw.random() < 0.8 else 9 for t in right)

    monkeypatch.setattr(PromptLookup, "propose", guess)
    engine = make_engine(model)
    wish = {"max_tokens": 150, "temperature": 0.8, "seed": 1, "prompt_lookup_num_tokens": 9}
    engine.add(request("a", prompt, **wish))
    num_steps = 0
    tokens = []
    while engine.has_unfinished:
        tokens += token_ids(engine.step())
        engine.cache_manager.check_integrity()
        num_steps += 1
    assert tokens == expected
    assert num_steps < 80
    cold = make_engine(model)
    for target in (engine, cold):  # nothing wrong has been left behind
        target.add(request("next", [*prompt, *expected], max_tokens=20))
    assert token_ids(run(engine)["next"]) == token_ids(run(cold)["next"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_engines_always_say_the_same(dtype: torch.dtype, make_engine) -> None:
    model = build_model("llama").to(dtype)
    wishes = [
        request(str(i), prompt * 4, temperature=1.0, seed=i, max_tokens=40)
        for i, prompt in enumerate(random_prompts(32))
    ]
    wishes[1] = replace(wishes[1], prompt_token_ids=wishes[0].prompt_token_ids)
    guided = replace(wishes[2].params, guidance_scale=1.5)
    wishes[2] = replace(wishes[2], params=guided, negative_prompt_token_ids=(5, 6, 7))
    guessing = replace(wishes[3].params, prompt_lookup_num_tokens=10)
    busy = make_engine(model, is_deterministic=True)
    for wish in (*wishes[:3], replace(wishes[3], params=guessing), *wishes[4:]):
        busy.add(wish)
    together: dict[str, list] = {}
    while busy.has_unfinished:
        for output in busy.step():
            together.setdefault(output.request_id, []).append(output.token_id)
        assert len(busy.scheduler.running) <= 2
        busy.cache_manager.check_integrity()
    assert busy.cache_manager.num_retained_blocks == 0
    for wish in wishes[:6]:
        fresh = make_engine(model, is_deterministic=True)
        fresh.add(wish)
        assert token_ids(run(fresh)[wish.request_id]) == together[wish.request_id]


def test_the_background_says_the_same_however_often_it_pauses(make_engine) -> None:
    """Paused, preempted and read again: beside others that come and go as chance has it."""
    prompts = [prompt * 2 for prompt in random_prompts(9, 50, seed=11)]
    wishes = [
        {"temperature": 1.0, "seed": 7, "max_tokens": 30},
        {"max_tokens": 40, "prompt_lookup_num_tokens": 5},
        {"temperature": 0.8, "seed": 8, "top_p": 0.9, "repetition_penalty": 1.2},
    ]
    requests = [
        replace(request(str(n), prompt, **wishes[n % 3]), is_background=n % 2 == 0)
        for n, prompt in enumerate(prompts)
    ]
    requests[4] = replace(requests[4], negative_prompt_token_ids=(5, 6, 7))
    alone = {}
    for wish in requests:
        engine = make_engine()
        engine.add(wish)
        alone |= {name: token_ids(outputs) for name, outputs in run(engine).items()}
    for seed in range(3):
        draw = random.Random(seed)
        engine = make_engine(num_cache_tokens=512, max_num_seqs=draw.randrange(3, 8))
        waiting = draw.sample(requests, len(requests))
        found: dict[str, list[int]] = {}
        while waiting or engine.has_unfinished:
            if waiting and (not engine.has_unfinished or draw.random() < 0.15):
                engine.add(waiting.pop())
            for output in engine.step():
                found.setdefault(output.request_id, []).append(output.token_id)
            engine.cache_manager.check_integrity()
        assert found == alone


def test_beside_a_full_background_a_stream_gets_a_token_in_every_step(make_engine) -> None:
    """The pace that somebody sees is the pace without a background: counted, not timed."""
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=64)
    for number, prompt in enumerate(random_prompts(8, 60)):
        wish = request(f"behind {number}", prompt, max_tokens=200)
        engine.add(replace(wish, is_background=True))
    for _ in range(10):
        engine.step()
    assert len(engine.scheduler.running) == 4
    engine.add(request("asked", list(range(5, 30)), max_tokens=50))
    for _ in range(50):
        assert [output.request_id for output in engine.step()] == ["asked"]
    assert {output.request_id for output in engine.step()} == {f"behind {n}" for n in range(4)}
