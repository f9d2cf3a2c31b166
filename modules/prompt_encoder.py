"""PromptEncoder: a rendered prompt → token ids, where only the template's special tokens are such.

Also counts the tokens of messages, and remembers the counts. transformers has a sanitizer of its
own (`sanitize_control_tokens`); it encodes a forged token apart from the text around it, and
refuses tokenizers whose model knows special tokens as words.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modules.literal_text import Marker, is_marked

MAX_REMEMBERED_COUNTS = 65_536
# In front of every special token in the guarded tokenizer; nobody can guess it.
GUARD = f"\ue000{secrets.token_hex(12)}\ue001"


class PromptEncoder:
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int] = (),
        *,
        reads_special_tokens: bool = False,
        image_token: str | None = None,
    ) -> None:
        """`reads_special_tokens`: those that messages spell are special tokens like any other, but
        for `image_token`, behind which there would be no image.
        """
        self._tokenizer = tokenizer
        self._image_tokens = {image_token} if image_token else set[str]()
        self._reads_special_tokens = reads_special_tokens
        added = tokenizer.added_tokens_decoder
        self._names = {id: token.content for id, token in added.items() if _can_be_guarded(token)}
        self._special_names = {
            name for id, name in self._names.items() if added[id].special or id in eos_token_ids
        }
        longest_first = sorted(self._names.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.max_token_chars = max(map(len, tokenizer.get_vocab()))
        """No token stands for more characters of a text."""
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._lock = Lock()
        self.choose_marker = lru_cache(maxsize=64)(self._choose_marker)

    def _choose_marker(self, turn_text: str, sought: frozenset[str] = frozenset()) -> Marker:
        """For a template that writes `turn_text` around messages, and looks for what is `sought`
        inside of them.

        Not all tokens that begin or end a turn are declared as special ones; those that a template
        writes there are guarded too.
        """
        if self._reads_special_tokens:
            return Marker(self._image_tokens)
        written = set(self._pattern.findall(turn_text)) - sought
        return Marker(self._special_names | self._image_tokens | written)

    def encode(
        self, text: str, marks: Sequence[int] = (), add_special_tokens: bool = False
    ) -> tuple[int, ...]:
        """What looks like a special token and has one of `marks` inside is read as plain text."""
        matches = list(self._pattern.finditer(text))
        literals = {m.start() for m in matches if is_marked(m.start(), m.end(), marks)}
        if not literals:
            ids = tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
            num_added = self._tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
            if self._reads_special_tokens or self._count_names(ids) <= len(matches) + num_added:
                return ids
            # More than were written: a normalizer makes them of letters that look alike, and the
            # model behind it may know them as words.
        parts, end = [], 0
        for match in matches:
            guard = "" if match.start() in literals else GUARD
            parts += [text[end : match.start()], guard, match[0]]
            end = match.end()
        return self._guarded.encode("".join((*parts, text[end:])), add_special_tokens)

    def _count_names(self, ids: Sequence[int]) -> int:
        """Not of the unknown token, which stands for all that the tokenizer does not know."""
        names, unknown = self._names, self._tokenizer.unk_token_id
        return sum(id in names and id != unknown for id in ids)

    @cached_property
    def _guarded(self) -> GuardedTokenizer:
        return GuardedTokenizer(self._tokenizer, set(self._names.values()))

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, alone and without special tokens."""
        keys = [_digest(text) for text in texts]
        with self._lock:
            known = {key: self._counts[key] for key in keys if key in self._counts}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            ids = self._tokenizer(list(new.values()), add_special_tokens=False)["input_ids"]
            known |= dict(zip(new, map(len, ids), strict=True))
        with self._lock:
            for key in keys:
                self._counts[key] = known[key]
                self._counts.move_to_end(key)
            while len(self._counts) > MAX_REMEMBERED_COUNTS:
                self._counts.popitem(last=False)
        return [known[key] for key in keys]


def _can_be_guarded(token: AddedToken) -> bool:
    """Not those that are only read as whole words, nor white space, which tokenizers may have added
    in all lengths: no turn begins with either alone.
    """
    return not token.single_word and bool(token.content.replace("▁", " ").strip())


def _digest(text: str) -> bytes:
    """The texts themselves are not kept."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class GuardedTokenizer:
    """The same tokenizer, but added tokens of these names are only read where GUARD stands before
    them.

    It is made of the other's own description, in which each of them gets another name, so that
    text between them goes the same way to the same ids. A tokenizer that is not described so, being
    Python code, gets a space into what must not be a token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: set[str]) -> None:
        self._plain = tokenizer
        self._names = names
        self._backend = (
            _rename(tokenizer.backend_tokenizer, names)
            if isinstance(tokenizer, PreTrainedTokenizerFast)
            else None
        )

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """`text` has GUARD before each special token that is to be one."""
        if self._backend is not None:
            return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        names = "|".join(map(re.escape, sorted(self._names, key=len, reverse=True)))
        spaced = re.sub(f"(?<!{GUARD})(?:{names})", lambda m: f"{m[0][0]} {m[0][1:]}", text)
        ids = self._plain.encode(spaced.replace(GUARD, ""), add_special_tokens=add_special_tokens)
        return tuple(ids)


def _rename(backend: Tokenizer, names: set[str]) -> Tokenizer:
    def rename(name: str) -> str:
        return GUARD + name if name in names else name

    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["content"] = rename(token["content"])
    model = description["model"]
    model["vocab"] = _rename_vocabulary(model["vocab"], rename)
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = rename(model["unk_token"])
    if "merges" in model:  # which would make of parts what now has another name
        model["merges"] = [
            pair for pair in model["merges"] if names.isdisjoint((*pair, "".join(pair)))
        ]
    return Tokenizer.from_str(json.dumps(description))


def _rename_vocabulary(
    vocabulary: dict[str, int] | list[list[Any]], rename: Callable[[str], str]
) -> dict[str, int] | list[list[Any]]:
    if isinstance(vocabulary, dict):
        return {rename(text): id for text, id in vocabulary.items()}
    return [[rename(text), score] for text, score in vocabulary]
