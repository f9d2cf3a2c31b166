"""SamplingParams: every knob of one generation, in the engine's own words, neutral by default.

Ranges are checked where the request enters (`extensions/openai/typing.py`); here values are meant.
"""

from dataclasses import dataclass
from enum import StrEnum


class SamplerStep(StrEnum):
    """What may be done to logits on their way to a token, in the order in which it is done unless
    a request wishes otherwise. Only the ban of n-grams always comes first.
    """

    REPETITION_PENALTY = "repetition_penalty"
    PRESENCE_PENALTY = "presence_penalty"
    FREQUENCY_PENALTY = "frequency_penalty"
    DRY = "dry"
    TOP_N_SIGMA = "top_n_sigma"
    TEMPERATURE = "temperature"
    DYNAMIC_TEMPERATURE = "dynamic_temperature"
    QUADRATIC_SAMPLING = "quadratic_sampling"
    TOP_K = "top_k"
    TOP_P = "top_p"
    TYPICAL_P = "typical_p"
    EPSILON_CUTOFF = "epsilon_cutoff"
    ETA_CUTOFF = "eta_cutoff"
    TFS = "tfs"
    TOP_A = "top_a"
    MIN_P = "min_p"
    ADAPTIVE_P = "adaptive_p"
    MIROSTAT = "mirostat"
    XTC = "xtc"
    ENCODER_REPETITION_PENALTY = "encoder_repetition_penalty"
    NO_REPEAT_NGRAM = "no_repeat_ngram"


# Only the top token is left long before this; below it, logits could leave the range of float32.
MIN_TEMPERATURE = 1e-5

DEFAULT_SAMPLER_ORDER = tuple(SamplerStep)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one sequence are chosen, and how many there may be.

    A neutral value (the default) means that the step is left out, so it costs nothing.
    """

    # How long
    max_tokens: int | None = None
    """Most tokens to generate; None: until the context is full."""
    min_tokens: int = 0
    """No token that would end the sequence before so many are generated."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the generation as the model's own end-of-sequence tokens do."""
    ban_eos: bool = False
    """The model's end-of-sequence tokens are never generated."""
    ignore_eos: bool = False
    """They are generated, and do not end the sequence."""

    # Chance
    temperature: float = 1.0
    """0 is greedy, and so is what is as good as 0."""
    dynamic_temperature: tuple[float, float, float] | None = None
    """Lowest, highest and exponent; takes the place of a `temperature` that is not greedy."""
    smoothing_factor: float = 0.0
    smoothing_curve: float = 1.0
    seed: int | None = None
    """None: a fresh random one."""
    sampler_order: tuple[SamplerStep, ...] = DEFAULT_SAMPLER_ORDER
    """Each step once."""

    # What is left out
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    tfs: float = 1.0
    top_a: float = 0.0
    epsilon_cutoff: float = 0.0
    """A probability."""
    eta_cutoff: float = 0.0
    """A probability."""
    top_n_sigma: float = 0.0
    xtc_threshold: float = 0.1
    xtc_probability: float = 0.0
    xtc_protected_token_ids: tuple[int, ...] = ()
    """Where one of them would be left out by XTC, nothing is."""
    mirostat_mode: int = 0
    """0 (off), 1 or 2."""
    mirostat_tau: float = 5.0
    """Bits of surprise per token."""
    mirostat_eta: float = 0.1
    adaptive_target: float | None = None
    """The probability that sampled tokens shall have on average."""
    adaptive_decay: float = 0.9

    # What is made less likely
    repetition_penalty: float = 1.0
    repetition_penalty_range: int = 1024
    """The last tokens of prompt and output that the repetition penalty and DRY look at; 0: all."""
    encoder_repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_breaker_token_ids: frozenset[int] = frozenset()
    """No repetition reaches across one of them."""

    # Single tokens
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added to their logits; minus infinity bans."""
    allowed_token_ids: tuple[int, ...] | None = None
    """No others are generated."""
    first_token_ids: tuple[int, ...] | None = None
    """The first token is one of them."""

    # Away from another prompt
    guidance_scale: float = 1.0
    """How far, where a request brings a negative prompt; 1: no way."""

    # Beside the tokens
    prompt_lookup_num_tokens: int = 0
    """Most tokens to guess from what came before, and to read at once. Changes no token."""
    num_logprobs: int | None = None
    """Report the log-probability of every sampled token, and of so many of the likeliest tokens
    in its place; None: of none."""
    processed_logprobs: bool = False
    """Report what the steps above have made of the probabilities, not what the model said."""
    prompt_logprobs: bool = False
    """Report them of the prompt's tokens too."""
    hidden_states: bool = False
    """With each log-probability, report the hidden state that it follows from."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE
