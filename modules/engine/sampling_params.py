"""SamplingParams: every knob of one generation, in the engine's own words, neutral by default.

Ranges are checked where the request enters (`extensions/openai/typing.py`); here values are meant.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one sequence are chosen, and how many there may be.

    A neutral value (the default) means that the step is left out, so it costs nothing.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None: until the context is full."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_penalty_range: int = 1024
    """The last tokens of prompt and output that the repetition penalty looks at; 0: all."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None: a fresh random one."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the generation as the model's own end-of-sequence tokens do."""
    ignore_eos: bool = False
    prompt_lookup_num_tokens: int = 0
    """Most tokens to guess from what came before, and to read at once. Changes no token."""
    logprobs: bool = False
    """Report the log-probability of every sampled token."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0
