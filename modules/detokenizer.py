"""IncrementalDetokenizer: token ids in, text that is safe to send out.

Owns the two reasons to hold text back: bytes of a character that is not complete yet, and a tail
that may still become a stop string. It does not know why or when a generation ends.
"""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# Enough earlier tokens for the decoder to see whether a word-initial space is meant.
NUM_CONTEXT_TOKENS = 5
# A character has at most four bytes; a run of undecodable tokens this long is not going to become
# one.
MAX_UNDECODED_TOKENS = 64


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...


class IncrementalDetokenizer:
    """Text of one sequence, piece by piece.

    The concatenation of what `add` and `finish` return is the decoded text up to the first stop
    string. The end of a stop string is what counts as first, so the result does not depend on how
    the text was cut into tokens; the stop string itself is never part of it.

    The text of new tokens is the difference of two decodings of a short window (the method of
    vLLM's detokenizer), so the cost of a token does not grow with the text.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
        num_repeated_chars: int = 0,
    ) -> None:
        """The first `num_repeated_chars` repeat the prompt's end: they are left out."""
        self._decoder = decoder
        self._stop_strings = tuple(stop for stop in stop_strings if stop)
        self._skip_special_tokens = skip_special_tokens
        # Window: tokens before _num_read are out (or prompt) and only give context.
        self._window = list(prompt_token_ids[-NUM_CONTEXT_TOKENS:])
        self._num_read = len(self._window)
        self._starts: list[int] = []  # places in the window where a character begins
        self._held = ""
        self._num_repeated = num_repeated_chars
        self.is_stopped = False

    def add(self, token_id: int) -> str:
        """The text that may be sent now that `token_id` is known; often empty, never taken back."""
        if self.is_stopped:
            return ""
        self._window.append(token_id)
        return self._release(self._read(final=False))

    def finish(self) -> str:
        """The rest, at an end that was not a stop string: what was held back must not be lost."""
        if self.is_stopped:
            return ""
        text = self._release(self._read(final=True))
        rest, self._held = self._held, ""
        return text + rest

    def discard(self) -> None:
        """Drop what is held back: nobody is going to read it."""
        self._held = ""
        self.is_stopped = True

    def _read(self, final: bool) -> str:
        """New decoded text; nothing while the last character is incomplete, unless `final`."""
        if self._num_read == len(self._window):
            return ""
        context = self._decode(self._window[: self._num_read])
        text = self._decode(self._window)
        is_incomplete = text.endswith(REPLACEMENT) and not final
        is_hopeless = len(self._window) - self._num_read >= MAX_UNDECODED_TOKENS
        if is_incomplete and not is_hopeless:
            return ""
        # A prompt that ends inside a character decodes to a replacement that new tokens heal.
        healed = context.rstrip(REPLACEMENT)
        new_text = text[len(healed if text.startswith(healed) else context) :]
        if is_incomplete:  # given up: as context it would be read once more
            self._window, self._starts, self._num_read = [], [], 0
        else:
            self._move_window()
        return new_text

    def _move_window(self) -> None:
        """All is read: forget what no context needs, but never begin inside a character."""
        self._num_read = len(self._window)
        self._starts.append(self._num_read)
        enough = self._num_read - NUM_CONTEXT_TOKENS
        start = max((start for start in self._starts if start <= enough), default=0)
        self._window = self._window[start:]
        self._starts = [other - start for other in self._starts if other > start]
        self._num_read -= start

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, self._skip_special_tokens)

    def _release(self, new_text: str) -> str:
        num_left_out = min(self._num_repeated, len(new_text))
        self._num_repeated -= num_left_out
        text = self._held + new_text[num_left_out:]
        cut = self._find_stop(text)
        if cut is not None:
            self.discard()
            return text[:cut]
        num_held = self._num_possible_stop(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def _find_stop(self, text: str) -> int | None:
        """Where to cut: the start of the match that ends first, the longest of those."""
        matches = [
            (start + len(stop), start)
            for stop in self._stop_strings
            if (start := text.find(stop)) >= 0
        ]
        return min(matches)[1] if matches else None

    def _num_possible_stop(self, text: str) -> int:
        """Length of the longest suffix that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_strings):
                return length
        return 0
