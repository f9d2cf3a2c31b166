"""What leaves the engine: one TokenOutput per sampled token."""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenOutput:
    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    """Set on the last token of a sequence; an end-of-sequence token is reported like any other.
    With ERROR there is no token, and the id means nothing."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already, computed for another generation."""
    logprob: float | None = None
    """Natural logarithm of the token's probability before sampling filters, when asked for."""
