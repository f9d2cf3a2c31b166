"""EncodedPrompt: the token ids of a prompt, and what of them must stay when it is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modules.loaded_model import LoadedModel


@dataclass(frozen=True, slots=True)
class Truncation:
    """Cut prompts that leave no room for their replies, instead of refusing them."""

    max_len: int
    """Most tokens of prompt and reply together."""
    num_reserved: int
    """Of these, the reply's; at least one, and less than all."""

    @property
    def max_prompt_len(self) -> int:
        return self.max_len - self.num_reserved


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    text: tuple[int, ...]
    """What may be cut."""
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.start, *self.text, *self.end)

    def cut(self, max_len: int) -> EncodedPrompt:
        """With the last tokens of the text, so many that there are `max_len` in all; at least one.

        A prompt that is too long without its text stays too long.
        """
        num_kept = max(1, max_len - len(self.start) - len(self.end))
        return replace(self, text=self.text[-num_kept:])


def encode_prompt(
    model: LoadedModel, prompt: str | tuple[int, ...], add_bos: bool
) -> EncodedPrompt:
    """Token ids are taken as they are; of a text's, `add_bos` False leaves the leading
    beginning-of-sequence tokens out.
    """
    bos = model.tokenizer.bos_token_id
    token_ids = model.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
    if isinstance(prompt, str) and not add_bos:
        return EncodedPrompt(strip_bos(token_ids, bos))
    if not token_ids or token_ids[0] != bos:
        return EncodedPrompt(token_ids)
    return EncodedPrompt(token_ids[1:], start=token_ids[:1])


def strip_bos(token_ids: tuple[int, ...], bos_token_id: int | None) -> tuple[int, ...]:
    num_bos = next((i for i, id in enumerate(token_ids) if id != bos_token_id), len(token_ids))
    return token_ids[num_bos:]
