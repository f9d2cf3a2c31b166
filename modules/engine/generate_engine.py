"""GenerateEngine: Engine for models that cannot be batched, by transformers' `generate`.

State-space models, encoder-decoders and those with attention of their own keep what they have read
in a way that only they know. They run as transformers runs them, one sequence at a time, first
come, first served; tokens are chosen and ended as Engine's are. One of the background gives way to
any other, and is read again when it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from modules.engine.engine import EngineConfig
from modules.engine.guidance import apply_guidance
from modules.engine.hidden_states import record_hidden_states
from modules.engine.logprobs import Logprobs, compute_logprobs
from modules.engine.model_runner import NUM_THREADS, add_hidden_state
from modules.engine.outputs import FinishReason, TokenOutput
from modules.engine.sampler import sample
from modules.engine.scheduler import (
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    build_output,
    report_prompt,
)
from modules.engine.sequence import Sequence, SequenceRequest

# Of a prompt's logits, as many are turned into float32 at a time.
NUM_SCORED_ROWS = 256


class GenerateEngine:
    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        """Of `config` it needs the context and the tokens that end a sequence.

        With an encoder-decoder, prompt and output may each be as long as the context: their
        positions are counted apart.
        """
        model.generation_config = _to_neutral(model.generation_config)
        self.config = config
        self._model: Any = model.eval()
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._sequences: dict[str, Sequence] = {}
        # Of the sequence that has begun, there is one at most, and of its companion. With each goes
        # the model's cache.
        self._decoding: dict[str, list[Iterator[Tensor]]] = {}

    @property
    def max_guided_len(self) -> int:
        return self.config.max_model_len

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def has_foreground(self) -> bool:
        return any(not seq.is_background for seq in self._sequences.values())

    def add(self, request: SequenceRequest) -> None:
        """Queue a generation. The prompt must have a token, and be shorter than `max_model_len`.

        `prompt_logprobs` is not for an encoder-decoder: it gives no probabilities to its prompt.

        Raises ValueError if the id is that of a generation that has not ended.
        """
        if request.request_id in self._sequences:
            raise ValueError(f"{request.request_id} is running already")
        max_model_len = self.config.max_model_len
        if self._is_encoder_decoder:  # the token that a decoder starts with takes a place
            max_model_len += request.num_longest_prompt_tokens - 1
        self._sequences[request.request_id] = Sequence(
            request, max_model_len, self.config.eos_token_ids
        )

    def abort(self, request_id: str) -> None:
        """End a generation now and free what it holds; idempotent."""
        self._sequences.pop(request_id, None)
        self._decoding.pop(request_id, None)

    def step(self) -> list[TokenOutput]:
        """Let the sequence whose turn it is go on by one token."""
        return self.execute(self.schedule())

    def schedule(self) -> ScheduledBatch:
        by_turn = sorted(self._sequences.values(), key=self._must_wait)
        return ScheduledBatch(
            tuple(
                ScheduledSequence(seq, (), seq.num_computed_tokens, len(seq.token_ids), True)
                for seq in by_turn[:1]
            )
        )

    def _must_wait(self, seq: Sequence) -> bool:
        """Where nothing may be rounded in another way, who has begun goes on to the end."""
        has_begun = seq.request_id in self._decoding
        return seq.is_background and not (has_begun and self.config.is_deterministic)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> list[TokenOutput]:
        """Run a batch. If that raises, nothing is recorded: it may be tried again."""
        if self._model.device.type == "cpu":
            torch.set_num_threads(NUM_THREADS)
        return [output for item in batch.items for output in self._execute(item.seq)]

    def fail(self, request_id: str) -> TokenOutput:
        """End a generation that cannot go on; the output that says so."""
        self.abort(request_id)
        return TokenOutput(request_id, token_id=0, finish_reason=FinishReason.ERROR)

    def _execute(self, seq: Sequence) -> list[TokenOutput]:
        scores = [] if seq.is_scored else self._score_prompt(seq)
        if seq.only_scores:
            self.abort(seq.request_id)
            return report_prompt(seq, scores)
        token = self._sample(seq)
        prompt = report_prompt(seq, scores)
        seq.append(token.token_id, token.sampler_state)
        reason = seq.find_finish_reason()
        if reason is not None:
            self.abort(seq.request_id)
        return [*prompt, build_output(seq, token, reason)]

    def _sample(self, seq: Sequence) -> SampledToken:
        # It is put back only after a success: otherwise the cache may be in any state.
        decoding = self._decoding.pop(seq.request_id, None) or [*map(self._start, seq.unit)]
        self._decoding.clear()  # of one that has to wait now
        with record_hidden_states(self._model, seq.params.hidden_states) as recorded:
            logits, *negative = [next(member) for member in decoding]
        if negative:
            scale = torch.tensor([seq.params.guidance_scale], device=logits.device)
            logits = apply_guidance(logits, negative[0], scale)
        (token,) = sample(logits, [seq])
        if recorded:
            token = add_hidden_state(token, recorded[0][-1].numpy())
        self._decoding[seq.request_id] = decoding
        seq.num_computed_tokens = len(seq.token_ids)
        return token

    def _score_prompt(self, seq: Sequence) -> list[Logprobs]:
        """Of every token but the first, read once more for that: `generate` has no use for them."""
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        _reset_rotary_modules(self._model)
        ids = torch.tensor([prompt], device=self._model.device)
        options = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        options |= self._to_image_arguments(seq, prompt)
        with record_hidden_states(self._model, seq.params.hidden_states) as recorded:
            logits = self._model(ids, **options).logits[0]
        scores: list[Logprobs] = []
        for start in range(0, len(prompt) - 1, NUM_SCORED_ROWS):
            targets = prompt[start + 1 :][:NUM_SCORED_ROWS]
            rows = logits[start : start + len(targets)].float()
            num_tops = [seq.params.num_logprobs or 0] * len(targets)
            scores += compute_logprobs(rows, targets, num_tops)
        states = recorded[0].numpy()[:-1] if recorded else [None] * len(scores)
        return [replace(s, hidden_state=own) for s, own in zip(scores, states, strict=True)]

    def _start(self, seq: Sequence) -> Iterator[Tensor]:
        """Logits of each next token, [1, vocab_size], float32, as `seq` grows.

        Also of a sequence that has output already: it is read again.
        """
        read = seq.token_ids
        options = self._to_image_arguments(seq, read)
        if self._is_encoder_decoder:
            start = self._model.generation_config.decoder_start_token_id
            written = [start, *seq.token_ids[seq.num_prompt_tokens :]]
            options["decoder_input_ids"] = torch.tensor([written], device=self._model.device)
            read = seq.token_ids[: seq.num_prompt_tokens]
        _reset_rotary_modules(self._model)
        inputs = torch.tensor([read], device=self._model.device)
        decoding: Iterator[Tensor] = self._model.generate(
            inputs,
            # Else a token of the prompt that is also the padding would be hidden.
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=seq.max_tokens,
            custom_generate=_decode,
            seq=seq,
            **options,
        )
        return decoding

    def _to_image_arguments(self, seq: Sequence, read: list[int]) -> dict[str, Any]:
        if not seq.images:
            return {}
        (images,) = seq.images  # here, those of one prompt are read together
        return images.to_arguments(read, self._model.device, self._model.dtype)


def _decode(
    model: Any,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    seq: Sequence,
    use_cache: bool,
    stopping_criteria: object,
    generation_config: object,
    **model_kwargs: Any,
) -> Iterator[Tensor]:
    """The loop of `generate`, which prepares all that it is given; tokens are chosen outside."""
    is_first = True
    while True:
        outputs = model(
            **model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=1 if use_cache and not is_first else None,
                is_first_iteration=is_first,
                use_cache=use_cache,
                **model_kwargs,
            ),
            return_dict=True,
        )
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        del outputs  # a prompt's logits may be large
        yield logits_processor(input_ids, logits)
        is_first = False
        last = input_ids.new_tensor([seq.token_ids[-1:]])
        input_ids = torch.cat([input_ids, last], dim=-1)


def _to_neutral(own: GenerationConfig | None) -> GenerationConfig:
    """What of a model's generation configuration belongs to its format, without its tastes."""
    own = own or GenerationConfig()
    start = own.decoder_start_token_id
    return GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        decoder_start_token_id=own.bos_token_id if start is None else start,
        forced_bos_token_id=own.forced_bos_token_id,
        use_cache=True,
    )


def _reset_rotary_modules(model: PreTrainedModel) -> None:
    """Positions that follow the length (`dynamic`) are those of the longest sequence so far: no
    sequence may find those of an earlier one. A first position by itself makes them forget.
    """
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", None)):
            first = torch.zeros(1, 1, device=model.device)
            module(first, first.long())
