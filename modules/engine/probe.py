"""The probe: does this model say in packed batches what it says on its own, and if it does not, can
it be served on its own? Run once, at load.

Families differ in ways that no attribute of theirs tells: state outside the keys and values, masks
that only their own attention sees, arguments that get lost on the way. Nothing would fail then, the
text would just be wrong. So what a model can do is not looked up, it is tried.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modules.engine.attention import AttentionBatch, PagedAttention, Segment
from modules.engine.engine import EngineConfig
from modules.engine.generate_engine import GenerateEngine
from modules.engine.image_embeddings import (
    EmbeddedImage,
    PlacedImage,
    added,
    build_inputs,
    find_positions,
    find_rows,
    place_images,
    record_text_inputs,
    split_images,
)
from modules.engine.image_inputs import ImageInputs
from modules.engine.model_runner import ModelRunner, can_batch, choose_block_size, input_device
from modules.engine.sampling_params import SamplingParams
from modules.engine.scheduler import ScheduledBatch, ScheduledSequence
from modules.engine.sequence import Sequence, SequenceRequest
from modules.errors import ModelLoadError, NotBatchableError

# How far the two sequences have been read after each step. Then the first one reads another chunk,
# the second one a single token beside it.
STEPS = ((17, 11), (28, 12))
# In tokens: what the prompts outgrow.
WINDOW = 10
# Where the first one has a part of an image, if the model sees: it is read in two chunks.
IMAGE_PLACE = range(10, 24)
# What the text part of a model may be given.
TEXT_INPUTS = (
    "inputs_embeds",
    "position_ids",
    "attention_mask",
    "cache_position",
    "visual_pos_masks",
    "deepstack_visual_embeds",
)
# By a model alone: the first one is what follows the prompt, then it reads what it has said.
NUM_GENERATED_TOKENS = 3
# Of the logits' length as a vector. Both ways add the same numbers in another order: in float32
# that makes 1e-6 to 1e-4. The others round each layer's result to 8 or 11 bits, which makes up to
# a few per cent in a deep model. A mask or a state that is wrong makes tens of per cent.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_OF_HALVES = 0.1

# What code that was not written for this engine raises in it.
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def probe(model: PreTrainedModel, images: ImageInputs | None = None) -> None:
    """Let `model` read two sequences side by side and each alone, and compare; once more with
    what it makes of `images`, if there are any.

    It has its own attention afterwards, as before.

    Raises NotBatchableError if the results differ, or if the model cannot do it at all.
    """
    if not can_batch(model):
        raise _refusal(model, "it is no decoder whose attention can be exchanged")
    own_attention = _attention_of_parts(model)
    model.eval()
    try:
        with torch.inference_mode(), _short_windows(model):
            _compare(model)
            if images is not None:
                _compare(model, _embed(model, images))
    except torch.OutOfMemoryError:
        raise  # says nothing about the model
    except _FAULTS as error:
        raise _refusal(model, f"{type(error).__name__} in a trial run") from error
    finally:
        model.set_attn_implementation(own_attention)


def _attention_of_parts(model: PreTrainedModel) -> dict[str, Any]:
    """In the form that `set_attn_implementation` takes. The part that sees may have another."""
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **own}


@torch.inference_mode()
def count_kv_bytes(model: PreTrainedModel) -> int:
    """What the keys and values of one token take in all layers, as the engine stores them."""
    runner = ModelRunner(model, num_blocks=1, block_size=choose_block_size(model))
    seq = Sequence(SequenceRequest("probe", (0,)), max_model_len=2)
    runner.forward(ScheduledBatch((ScheduledSequence(seq, (0,), 0, 1, is_last_chunk=True),)))
    return runner.num_kv_bytes_per_token


def probe_alone(model: PreTrainedModel, images: ImageInputs | None = None) -> None:
    """Let `model` generate by itself, after images if there are any.

    Raises ModelLoadError if what it says is of no use.
    """
    model.eval()
    try:
        is_causal = _is_causal(model)
        _generate(model, images)
    except torch.OutOfMemoryError:
        raise
    except _FAULTS as error:
        raise _refusal_alone(model, f"{type(error).__name__} in a trial run") from error
    if not is_causal:
        raise _refusal_alone(model, "it generates no text, as every token looks at those after it")


def _compare(model: PreTrainedModel, image: EmbeddedImage | None = None) -> None:
    prompts = _prompts(model)
    # Eager is the definition; transformers' faster functions leave out what they do not know, such
    # as a soft cap.
    model.set_attn_implementation("eager")
    placed = place_images([image], [IMAGE_PLACE]) if image else ()
    own = [_read_alone(model, *each) for each in zip(prompts, (placed, ()), strict=True)]
    runner = _ProbedRunner(model)
    tolerance = _tolerance(model)
    for batch in _batches(prompts, placed):
        packed = runner.logits(batch)
        expected = torch.stack([own[item.block_table[0]][item.end - 1] for item in batch.items])
        if not _distance(packed, expected) <= tolerance:  # also if it is NaN
            raise _refusal(model, "in a batch its results would be wrong")
        if not runner.ledger.is_complete(batch, model.config.get_text_config().num_hidden_layers):
            raise _refusal(model, "it does not keep keys and values once per token and layer")


def _embed(model: PreTrainedModel, images: ImageInputs) -> EmbeddedImage:
    """What has its place in the prompt. Raises NotBatchableError if it is not read as a text is."""
    model.set_attn_implementation("eager")  # whose masks say what they hide
    handed = record_text_inputs(model, images, input_device(model))
    more = [name for name in handed if name not in TEXT_INPUTS and _has_tensors(handed[name])]
    if more:
        raise _refusal(model, f"images are more than embeddings to it, {more[0]} too")
    if _sees_ahead(handed.get("attention_mask")):
        raise _refusal(model, "it does not read images from left to right")
    image, *_ = split_images(images, handed)
    return _repeat(image, len(IMAGE_PLACE))


def _repeat(image: EmbeddedImage, num_tokens: int) -> EmbeddedImage:
    """As often as there is room for, the last time in part."""
    numbers = torch.arange(num_tokens)
    taken, times = numbers % image.num_tokens, numbers // image.num_tokens
    positions = image.positions[:, taken] + times * image.num_positions
    return EmbeddedImage(
        image.embeddings[taken],
        positions,
        int(positions.max()) + 1,
        image.additions[:, taken],
    )


def _has_tensors(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    is_group = isinstance(value, dict | list | tuple)
    return isinstance(value, Tensor) or (is_group and any(map(_has_tensors, parts)))


def _sees_ahead(mask: Any) -> bool:
    """`mask`: [..., num_queries, num_keys], false or very negative where nothing is seen; one for
    each kind of layer; or None.
    """
    if isinstance(mask, dict):
        return any(map(_sees_ahead, mask.values()))
    if mask is None or mask.dim() < 4:
        return False
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(seen.triu(1).any())


def _read_alone(model: PreTrainedModel, prompt: Tensor, placed: tuple[PlacedImage, ...]) -> Tensor:
    """Logits, [length, vocab_size], as `model` has them by its own attention."""
    length = prompt.shape[1]
    positions = torch.tensor([find_positions(placed, 0, length)], device=prompt.device)
    rows = tuple(find_rows(placed, 0, length, first_row=0))
    with added(model, rows, length):
        output = model(**build_inputs(model, prompt, positions, rows), use_cache=False)
    logits: Tensor = output.logits[0].float()
    return logits


@torch.inference_mode()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether the last token changes nothing before it, as it would in an encoder."""
    if model.config.is_encoder_decoder:
        return True  # its decoder is
    prompt = _prompts(model)[0]
    whole, part = (model(input_ids=ids).logits[0].float() for ids in (prompt, prompt[:, :-1]))
    return _distance(part, whole[:-1]) <= _tolerance(model)


def _generate(model: PreTrainedModel, images: ImageInputs | None) -> None:
    shown = images.separated_token_ids if images else ()
    prompt = (*shown, *_prompts(model)[0][0].tolist())
    length = 2 * len(prompt)
    engine = GenerateEngine(model, EngineConfig(max_model_len=length, num_cache_tokens=length))
    params = SamplingParams(temperature=0.0, max_tokens=NUM_GENERATED_TOKENS)
    engine.add(SequenceRequest("probe", prompt, params, images=(images,) if images else ()))
    while engine.has_unfinished:
        engine.step()


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Let no window be longer than the prompts.

    Some families build masks by their configuration's window, but do not tell the attention of it:
    only beyond the window is that seen. One that spans the whole context never ends anywhere.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    owners: list[Any] = [config, *model.modules()]
    windows = [(owner, getattr(owner, "sliding_window", None)) for owner in owners]
    long = [(o, size) for o, size in windows if isinstance(size, int) and WINDOW < size < longest]
    try:
        for owner, _ in long:
            owner.sliding_window = WINDOW
        yield
    finally:
        for owner, size in long:
            owner.sliding_window = size


class _Ledger:
    """An attention that counts the tokens that it is called with."""

    def __init__(self, attention: PagedAttention) -> None:
        self._attention = attention
        self.num_written: Counter[int] = Counter()

    @property
    def num_bytes_per_token(self) -> int:
        return self._attention.num_bytes_per_token

    def batch(self, segments: tuple[Segment, ...]) -> AttentionBatch:
        return _CountedBatch(self._attention.batch(segments), self.num_written)

    def is_complete(self, batch: ScheduledBatch, num_layers: int) -> bool:
        """Whether each layer has written each token of the batch's sequences exactly once."""
        layers = {*self.num_written, *range(num_layers)}
        return self.num_written == dict.fromkeys(layers, sum(item.end for item in batch.items))


@dataclass(frozen=True, slots=True)
class _CountedBatch:
    batch: AttentionBatch
    num_written: Counter[int]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        self.num_written[layer] += len(key)
        return self.batch.attend(layer, query, key, value, **options)


class _ProbedRunner(ModelRunner):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, len(STEPS[-1]), choose_block_size(model))
        self.ledger = _Ledger(self._attention)
        self._attention: PagedAttention = self.ledger

    def logits(self, batch: ScheduledBatch) -> Tensor:
        return self.forward(batch)


def _prompts(model: PreTrainedModel) -> list[Tensor]:
    """Token ids, [1, length] each. From the middle of the vocabulary: the special ones, of which
    some mean an image or padding, are at its ends.
    """
    embeddings: Any = model.get_input_embeddings()
    vocab_size = int(embeddings.num_embeddings)
    generator = torch.Generator().manual_seed(0)
    low, high = vocab_size // 4, max(3 * vocab_size // 4, 1)
    return [
        torch.randint(low, high, (1, length), generator=generator).to(model.device)
        for length in STEPS[-1]
    ]


def _batches(prompts: list[Tensor], placed: tuple[PlacedImage, ...]) -> list[ScheduledBatch]:
    seqs = []
    for number, prompt in enumerate(prompts):
        ids = tuple(prompt[0].tolist())
        seqs.append(Sequence(SequenceRequest(f"probe-{number}", ids), len(ids) + 1))
    seqs[0].placed_images = placed
    batches = []
    starts = (0,) * len(seqs)
    for ends in STEPS:
        batches.append(
            ScheduledBatch(
                tuple(
                    # Each is called the last chunk, so that there are logits to compare.
                    ScheduledSequence(seq, (block,), start, end, True)
                    for block, (seq, start, end) in enumerate(zip(seqs, starts, ends, strict=True))
                )
            )
        )
        starts = ends
    return batches


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Between rows, relative to the expected one; the largest. What softmax ignores is left out."""
    logits = logits - logits.mean(-1, keepdim=True)
    expected = expected - expected.mean(-1, keepdim=True)
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _tolerance(model: PreTrainedModel) -> float:
    return TOLERANCES.get(model.dtype, TOLERANCE_OF_HALVES)


def _refusal(model: PreTrainedModel, reason: str) -> NotBatchableError:
    kind = model.config.model_type
    return NotBatchableError(f'This kind of model ("{kind}") cannot be batched: {reason}.')


def _refusal_alone(model: PreTrainedModel, reason: str) -> ModelLoadError:
    kind = model.config.model_type
    return ModelLoadError(f'This kind of model ("{kind}") cannot be served: {reason}.')
