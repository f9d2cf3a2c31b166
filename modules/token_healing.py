"""Token healing: a prompt that ends inside a word is read without its last token, and the reply's
first token must begin with what was taken back.

Tokens are cut greedily, so a prompt's end may be one that the model has never seen there: after
"http:" it has hardly ever read "//", which comes as one token with the colon (Lundberg, "The art of
prompt design: prompt boundaries and token healing", 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from modules.detokenizer import IncrementalDetokenizer
from modules.engine.sampling_params import SamplingParams
from modules.loaded_model import LoadedModel


@dataclass(frozen=True, slots=True)
class HealedPrompt:
    token_ids: tuple[int, ...]
    """The prompt without its last token."""
    first_token_ids: tuple[int, ...]
    """Those that may come next."""
    num_repeated_chars: int
    """So much of the prompt's text does the reply begin with."""


def heal(
    model: LoadedModel,
    token_ids: tuple[int, ...],
    params: SamplingParams,
    skip_special_tokens: bool,
) -> HealedPrompt | None:
    """None where nothing can be taken back: from a prompt of one token, a special token, or where
    no token may follow that begins like it.
    """
    *rest, last = token_ids
    candidates = find_first_tokens(model, last, params)
    if not rest or not candidates:
        return None
    detokenizer = IncrementalDetokenizer(model, rest, (), skip_special_tokens)
    repeated = detokenizer.add(last) + detokenizer.finish()
    return HealedPrompt(tuple(rest), candidates, len(repeated))


def find_first_tokens(model: LoadedModel, token_id: int, params: SamplingParams) -> tuple[int, ...]:
    """The tokens that begin with all of `token_id`'s bytes, and are not ruled out otherwise; none
    for a special token.
    """
    prefix = model.vocabulary.bytes_of(token_id)
    found = model.vocabulary.find_with_prefix(prefix) if prefix else ()
    if token_id not in found:
        return ()
    banned = {token_id for token_id, bias in params.logit_bias if bias == -math.inf}
    banned.update(model.eos_token_ids, params.stop_token_ids)
    allowed = found if params.allowed_token_ids is None else params.allowed_token_ids
    return tuple(sorted(set(found).intersection(allowed) - banned))
