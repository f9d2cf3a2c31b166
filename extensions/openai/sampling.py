"""Request → SamplingParams: the only place where wire names become the engine's names."""

from extensions.openai.typing import GenerationOptions
from modules.engine.sampling_params import SamplingParams

# Only the top token is left long before this; below it, logits could leave the range of float32.
MIN_TEMPERATURE = 1e-5


def to_sampling_params(
    options: GenerationOptions, *, max_tokens: int | None, num_logprobs: int | None = None
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if _is_greedy(options) else options.temperature,
        top_k=max(options.top_k, 0),
        top_p=options.top_p or 1.0,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        repetition_penalty_range=options.repetition_penalty_range,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        # A generator takes -5 for 5; modulo 2**64, no two seeds are the same.
        seed=None if options.seed == -1 else options.seed % 2**64,
        stop_token_ids=tuple(options.stop_token_ids),
        ignore_eos=options.ban_eos_token or options.ignore_eos,
        prompt_lookup_num_tokens=options.prompt_lookup_num_tokens,
        num_logprobs=num_logprobs,
    )


def to_max_tokens(options: GenerationOptions) -> int | None:
    """None: until the context is full."""
    if options.max_completion_tokens is not None:
        return options.max_completion_tokens
    return options.max_tokens


def _is_greedy(options: GenerationOptions) -> bool:
    """A nucleus of no probability still holds its first token."""
    return not options.do_sample or options.top_p == 0 or options.temperature < MIN_TEMPERATURE
