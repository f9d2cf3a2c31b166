"""Request + preset → SamplingParams: the only place where wire names become the engine's names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from extensions.openai.typing import MAX_NUM_BEAMS, GenerationOptions, SamplingOptions
from modules.context_fitting import Room
from modules.engine.beam_search import BeamOptions
from modules.engine.contrastive_search import ContrastiveOptions
from modules.engine.sampling_params import DEFAULT_SAMPLER_ORDER, SamplerStep, SamplingParams
from modules.engine.searches import SearchOptions
from modules.errors import InvalidRequestError
from modules.loaded_model import LoadedModel
from modules.presets import load_preset
from modules.prompt_tokens import Truncation

Options = TypeVar("Options", bound=GenerationOptions)

# Of which epsilon and eta cutoffs give a number.
PARTS_PER_UNIT = 10_000
# Of a truncated context, for replies that may be as long as they like.
NUM_RESERVED = 512
# Of a context that nobody has truncated, for any reply.
RESERVED_SHARE = 0.25
BANNED = -100.0
FORCED = 100.0
# One of them is to blame if no token is left, most likely the first that was used.
RESTRICTIONS = ("allowed_token_ids", "logit_bias", "custom_token_bans", "stop_token_ids")
TEMPERATURE_STEPS = (
    SamplerStep.TEMPERATURE,
    SamplerStep.DYNAMIC_TEMPERATURE,
    SamplerStep.QUADRATIC_SAMPLING,
)


def fill_from_preset(options: Options, root: Path) -> Options:
    """`options`, with what its preset says of the fields that the request left out.

    Raises DataFileNotFoundError, and InvalidRequestError where the file holds what a request may
    not.
    """
    if not options.preset:
        return options
    values = load_preset(root, options.preset)
    unknown = next((key for key in values if key not in SamplingOptions.model_fields), None)
    if unknown is not None:
        raise _blame_preset(options.preset, str(unknown), "There is no such parameter")
    try:
        preset = SamplingOptions.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        key = str(detail["loc"][0]) if detail["loc"] else ""
        raise _blame_preset(options.preset, key, detail["msg"]) from error
    left_out = preset.model_fields_set - options.model_fields_set
    return options.model_copy(update={name: getattr(preset, name) for name in left_out})


def _blame_preset(name: str, key: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The preset {name!r} cannot be used: {key}: {reason}", "preset")


def to_sampling_params(
    options: GenerationOptions,
    model: LoadedModel,
    *,
    max_tokens: int | None,
    num_logprobs: int | None = None,
) -> SamplingParams:
    """What `options` ask of `model`. The first DRY of all may take a second: call it in a thread.

    Raises InvalidRequestError where they name tokens that the model has not, or leave it none.
    """
    _check_token_ids(options, model)
    allowed = _to_allowed_token_ids(options)
    logit_bias = _to_logit_bias(options)
    _check_that_a_token_is_left(options, model, allowed, logit_bias)
    return SamplingParams(
        max_tokens=None if options.auto_max_new_tokens else max_tokens,
        min_tokens=options.min_tokens,
        stop_token_ids=tuple(options.stop_token_ids),
        ban_eos=options.ban_eos_token,
        ignore_eos=options.ignore_eos,
        temperature=0.0 if _is_greedy(options) else options.temperature,
        dynamic_temperature=_to_dynamic_temperature(options),
        smoothing_factor=options.smoothing_factor,
        smoothing_curve=options.smoothing_curve,
        # A generator takes -5 for 5; modulo 2**64, no two seeds are the same.
        seed=None if options.seed == -1 else options.seed % 2**64,
        sampler_order=_to_sampler_order(options),
        top_k=max(options.top_k, 0),
        top_p=options.top_p or 1.0,
        min_p=options.min_p,
        typical_p=options.typical_p,
        tfs=options.tfs,
        top_a=options.top_a,
        epsilon_cutoff=options.epsilon_cutoff / PARTS_PER_UNIT,
        eta_cutoff=options.eta_cutoff / PARTS_PER_UNIT,
        top_n_sigma=options.top_n_sigma,
        xtc_threshold=options.xtc_threshold,
        xtc_probability=options.xtc_probability,
        xtc_protected_token_ids=_find_xtc_protected(options, model),
        mirostat_mode=options.mirostat_mode,
        mirostat_tau=options.mirostat_tau,
        mirostat_eta=options.mirostat_eta,
        adaptive_target=options.adaptive_target or None,
        adaptive_decay=options.adaptive_decay,
        repetition_penalty=options.repetition_penalty,
        repetition_penalty_range=options.repetition_penalty_range,
        encoder_repetition_penalty=options.encoder_repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        dry_multiplier=options.dry_multiplier,
        dry_base=options.dry_base,
        dry_allowed_length=options.dry_allowed_length,
        dry_breaker_token_ids=_find_dry_breakers(options, model),
        logit_bias=logit_bias,
        allowed_token_ids=allowed,
        guidance_scale=options.guidance_scale,
        prompt_lookup_num_tokens=options.prompt_lookup_num_tokens,
        num_logprobs=num_logprobs,
    )


def to_max_tokens(options: GenerationOptions) -> int | None:
    """None: until the context is full."""
    if options.max_completion_tokens is not None:
        return options.max_completion_tokens
    return options.max_tokens


def to_chat_max_tokens(options: GenerationOptions) -> int | None:
    """0 means no limit in chats, as it always did in this API."""
    return to_max_tokens(options) or None


def to_room(options: GenerationOptions, model: LoadedModel) -> Room:
    """For the prompt of a chat. Raises InvalidRequestError if `max_tokens` leave none.

    What a reply may have is an upper limit, and often more than it will need: unless a length of
    both is given, no more than a part of the context is kept free for it.
    """
    max_tokens = to_chat_max_tokens(options)
    truncation = to_truncation(options, model, max_tokens)
    if truncation is not None:
        return Room(truncation.max_prompt_len, truncation.max_len - 1)
    max_len = model.max_model_len
    if to_negative_prompt(options) is not None:
        max_len = model.max_guided_len or max_len
    if not model.continues_prompt:
        return Room(max_len - 1, max_len - 1)
    num_reserved = min(max_tokens or NUM_RESERVED, int(max_len * RESERVED_SHARE))
    return Room(max_len - max(1, num_reserved), max_len - 1)


def to_truncation(
    options: GenerationOptions, model: LoadedModel, max_tokens: int | None
) -> Truncation | None:
    """Raises InvalidRequestError if `max_tokens` leave no room for a prompt."""
    if not options.truncation_length:
        return None
    if options.auto_max_new_tokens:
        max_tokens = None
    max_len = min(options.truncation_length, model.max_model_len)
    num_reserved = min(NUM_RESERVED, max_len // 2) if max_tokens is None else max_tokens
    if num_reserved >= max_len:
        named = options.max_completion_tokens is not None
        raise InvalidRequestError(
            f"A reply of {num_reserved} tokens leaves no room for a prompt: there are {max_len} "
            "for both.",
            "max_completion_tokens" if named else "max_tokens",
        )
    return Truncation(max_len, max(1, num_reserved))


def to_negative_prompt(options: GenerationOptions) -> str | None:
    return None if options.guidance_scale == 1 else options.negative_prompt


def to_search(options: GenerationOptions, num_candidates: int) -> SearchOptions | None:
    """Raises InvalidRequestError for what does not go together."""
    if options.num_beams > 1:
        if options.penalty_alpha:
            raise InvalidRequestError("Contrastive search has no beams.", "penalty_alpha")
        if num_candidates > options.num_beams:
            message = f"{options.num_beams} beams cannot give {num_candidates} choices."
            raise InvalidRequestError(message, "best_of" if num_candidates > options.n else "n")
        return BeamOptions(
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
        )
    if not options.penalty_alpha:
        return None
    if not _is_greedy(options):
        raise InvalidRequestError("Contrastive search needs do_sample: false.", "penalty_alpha")
    if options.top_k <= 1:
        raise InvalidRequestError("Contrastive search needs a top_k above 1.", "penalty_alpha")
    if options.top_k > MAX_NUM_BEAMS:
        message = f"Contrastive search tries out at most {MAX_NUM_BEAMS} tokens."
        raise InvalidRequestError(message, "top_k")
    return ContrastiveOptions(penalty_alpha=options.penalty_alpha, top_k=options.top_k)


# Chance


def _is_greedy(options: SamplingOptions) -> bool:
    """A nucleus of no probability still holds its first token."""
    return not options.do_sample or options.top_p == 0


def _to_dynamic_temperature(options: SamplingOptions) -> tuple[float, float, float] | None:
    if not options.dynamic_temperature:
        return None
    return options.dynatemp_low, options.dynatemp_high, options.dynatemp_exponent


def _to_sampler_order(options: SamplingOptions) -> tuple[SamplerStep, ...]:
    named = [SamplerStep(name) for name in options.sampler_priority]
    order = [*(step for step in DEFAULT_SAMPLER_ORDER if step not in named), *named]
    if options.temperature_last:
        order.sort(key=lambda step: step in TEMPERATURE_STEPS)
    return tuple(order)


# What only the tokenizer knows


def _find_dry_breakers(options: SamplingOptions, model: LoadedModel) -> frozenset[int]:
    if not options.dry_multiplier:
        return frozenset()
    found = (_find_breaker(text, model) for text in options.dry_sequence_breakers)
    return frozenset().union(*found)


def _find_breaker(text: str, model: LoadedModel) -> frozenset[int]:
    """The tokens that contain it; if none does, the one that it ends with."""
    containing = model.vocabulary.find_containing(text)
    return containing or frozenset(model.encode(text, add_special_tokens=False)[-1:])


def _find_xtc_protected(options: SamplingOptions, model: LoadedModel) -> tuple[int, ...]:
    """The ends of a line and of the text."""
    if not options.xtc_probability:
        return ()
    newline = model.encode("\n", add_special_tokens=False)[-1:]
    return tuple(sorted({*newline, *model.eos_token_ids}))


# Single tokens


def _check_token_ids(options: GenerationOptions, model: LoadedModel) -> None:
    model.check_token_ids(map(int, options.logit_bias), "logit_bias")
    model.check_token_ids(options.custom_token_bans, "custom_token_bans")
    model.check_token_ids(options.allowed_token_ids or (), "allowed_token_ids")
    model.check_token_ids(options.stop_token_ids, "stop_token_ids")


def _to_allowed_token_ids(options: GenerationOptions) -> tuple[int, ...] | None:
    """Those that are allowed by name, and of them those that are forced, if any are."""
    forced = [int(key) for key, bias in options.logit_bias.items() if bias == FORCED]
    allowed = options.allowed_token_ids
    if not forced:
        return None if allowed is None else tuple(sorted(set(allowed)))
    return tuple(sorted(set(forced) if allowed is None else set(forced) & set(allowed)))


def _to_logit_bias(options: GenerationOptions) -> tuple[tuple[int, float], ...]:
    biases = {int(key): bias for key, bias in options.logit_bias.items() if bias != FORCED}
    banned = [token_id for token_id, bias in biases.items() if bias == BANNED]
    bans = dict.fromkeys((*banned, *options.custom_token_bans), -math.inf)
    return tuple(sorted((biases | bans).items()))


def _check_that_a_token_is_left(
    options: GenerationOptions,
    model: LoadedModel,
    allowed: tuple[int, ...] | None,
    logit_bias: tuple[tuple[int, float], ...],
) -> None:
    banned = {token_id for token_id, bias in logit_bias if bias == -math.inf}
    if options.ban_eos_token or options.min_tokens or options.min_length:
        banned |= model.eos_token_ids
    if options.min_tokens or options.min_length:
        banned.update(options.stop_token_ids)
    left = range(model.vocab_size) if allowed is None else allowed
    if len(banned) >= len(left) and banned.issuperset(left):
        fields = [name for name in RESTRICTIONS if getattr(options, name)]
        raise InvalidRequestError("No token is left that could be generated.", fields[0])
