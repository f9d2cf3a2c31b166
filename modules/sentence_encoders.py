"""Models of sentence-transformers, and others that it can make an encoder of: texts → rows.

Every text is cut into tokens once, by itself or with its neighbours; then it can be computed in any
company. The numbers are those of the library's own `encode` and `predict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modules.batch_queue import BatchLimits, Prepared
from modules.errors import (
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    NotConfiguredError,
)
from modules.model_files import FoundModel, find_model
from modules.model_kinds import ModelKind
from modules.optional_packages import import_package
from modules.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TextInput = str | tuple[int, ...]
"""A text, or token ids of the model's own."""
PairInput = tuple[str, str]

PACKAGE = "sentence-transformers"
# What a batch costs before its first token is about 60 tokens' time on a CPU, and on a card, whose
# launches are slow beside its arithmetic, thousands. A core is not faster with more than 1024.
CPU_LIMITS = BatchLimits(max_items=32, max_tokens=1024, max_padding=64)
CARD_LIMITS = BatchLimits(max_items=256, max_tokens=16384, max_padding=2048)

# Of a text, so much is cut into tokens for each that the model reads; an English word has five
# characters. Cutting up the rest would take time, only to throw it away.
CHARS_PER_TOKEN = 64
# Less of two texts: the library makes every combination of what is over of the one and the other.
PAIR_CHARS_PER_TOKEN = 16
# How far from there an end of a word is looked for.
LONGEST_WORD = 128

Features = Mapping[str, Any]
ReadRows = Callable[[Features], "Tensor"]


class SentenceEncoder:
    """See batch_worker.BatchModel. `read_rows` finds the result in what the model has computed."""

    def __init__(self, name: str, model: Any, read_rows: ReadRows) -> None:
        self.name = name
        self._model = model.eval()
        self._read_rows = read_rows
        self._tokenizer = model.tokenizer
        self._prompt: str | None = model.prompts.get(model.default_prompt_name)

    @property
    def is_on_card(self) -> bool:
        return bool(self._model.device.type != "cpu")

    @property
    def limits(self) -> BatchLimits:
        return CARD_LIMITS if self.is_on_card else CPU_LIMITS

    def prepare(self, inputs: Sequence[TextInput | PairInput]) -> list[Prepared]:
        wholes = [self._to_text(given) for given in inputs]
        texts = [self._shorten(whole) for whole in wholes]
        features = self._preprocess(texts)
        rows = _split(features, len(texts))
        if rows is None:  # no rows of tokens: each by itself
            rows = [self._preprocess([text]) for text in texts]
            encodings = None
        else:
            encodings = getattr(features, "encodings", None)
        return [
            Prepared(
                row,
                num_tokens,
                text != whole
                or self._is_truncated(text, num_tokens, encodings[i] if encodings else None),
            )
            for i, (whole, text, row) in enumerate(zip(wholes, texts, rows, strict=True))
            for num_tokens in (int(row["input_ids"].numel()),)
        ]

    def compute(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            if all(_is_row(prepared.features) for prepared in batch):
                rows = self._forward(self._join([prepared.features for prepared in batch]))
            else:
                rows = torch.cat([self._forward(prepared.features) for prepared in batch])
            computed: NDArray[np.float32] = rows.float().cpu().numpy()
        return computed

    def _to_text(self, given: TextInput | PairInput) -> str | PairInput:
        """Raises InvalidRequestError for token ids that the model does not know."""
        if isinstance(given, str) or not given or isinstance(given[0], str):
            return given  # type: ignore[return-value]
        vocab_size = _count_tokens(self._tokenizer)
        unknown = next((each for each in given if not 0 <= each < vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"Invalid value for 'input': Token id {unknown} is outside the vocabulary of "
                f"{self.name}, which has {vocab_size} tokens.",
                "input",
            )
        text: str = self._tokenizer.decode(list(given), skip_special_tokens=True)
        if not text:
            raise InvalidRequestError("Invalid value for 'input': There is no text in it.", "input")
        return text

    def _shorten(self, text: str | PairInput) -> str | PairInput:
        """Without most of what the model does not read."""
        longest = self._model.max_seq_length
        if longest is None or self._tokenizer is None:
            return text
        from_end = getattr(self._tokenizer, "truncation_side", "right") == "left"
        if isinstance(text, str):
            return _cut(text, longest * CHARS_PER_TOKEN, from_end)
        first, second = (_cut(part, longest * PAIR_CHARS_PER_TOKEN, from_end) for part in text)
        return first, second

    def _preprocess(self, texts: Sequence[str | PairInput]) -> Features:
        features: Features = self._model.preprocess(list(texts), prompt=self._prompt)
        return features

    def _is_truncated(self, text: str | PairInput, num_tokens: int, encoding: Any | None) -> bool:
        """Whether the text had more tokens: `encoding` knows; without one, by a second look."""
        longest = self._model.max_seq_length
        if longest is None or self._tokenizer is None or num_tokens < longest:
            return False
        if encoding is not None:
            return bool(encoding.overflowing)
        first, second = (text, None) if isinstance(text, str) else text
        token_ids = self._tokenizer(f"{self._prompt or ''}{first}", second, verbose=False)
        return len(token_ids["input_ids"]) > num_tokens

    def _join(self, rows: Sequence[Mapping[str, Any]]) -> Features:
        """Rows of tokens in one tensor each, padded to the longest."""
        from torch.nn.utils.rnn import pad_sequence

        fillings = {
            "input_ids": self._tokenizer.pad_token_id,
            "token_type_ids": self._tokenizer.pad_token_type_id,
        }
        joined = dict(rows[0])
        for name, value in joined.items():
            if _is_tensor(value):
                joined[name] = pad_sequence(
                    [row[name] for row in rows],
                    batch_first=True,
                    padding_value=fillings.get(name, 0),
                    padding_side=self._tokenizer.padding_side,
                )
        return joined

    def _forward(self, features: Mapping[str, Any]) -> Tensor:
        device = self._model.device
        moved = {
            name: value.to(device) if _is_tensor(value) else value
            for name, value in features.items()
        }
        return self._read_rows(self._model(moved))


def _cut(text: str, num_chars: int, from_end: bool) -> str:
    """The first characters, or the last ones, from or to the end of a word if there is one near."""
    if len(text) <= num_chars:
        return text
    if from_end:
        start = len(text) - num_chars
        return text[max(start, text.find(" ", start, start + LONGEST_WORD)) :]
    space = text.rfind(" ", max(0, num_chars - LONGEST_WORD), num_chars)
    return text[: space if space > 0 else num_chars]


def _count_tokens(tokenizer: Any) -> int:
    """Of transformers' tokenizers, or of the ones that they are made of."""
    return len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.get_vocab_size()


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _is_row(features: Mapping[str, Any]) -> bool:
    return "attention_mask" in features and features["attention_mask"].ndim == 1


def _split(features: Features, num_rows: int) -> list[Features] | None:
    """Each text's tokens without padding; None if there is more in it than rows of tokens."""
    mask = features.get("attention_mask")
    tensors = [value for value in features.values() if _is_tensor(value)]
    if mask is None or mask.ndim != 2 or len(mask) != num_rows:
        return None
    if any(tensor.shape != mask.shape for tensor in tensors):
        return None
    return [
        {
            name: value[i][mask[i].bool()] if _is_tensor(value) else value
            for name, value in features.items()
        }
        for i in range(num_rows)
    ]


# Loading


def load_sentence_transformer(name: str, settings: Settings) -> SentenceEncoder:
    """The model of the setting `embedding_model`, or whichever is named, as vectors of length 1.

    A model of another kind becomes one as the library does it: with the mean of all tokens, or, if
    it was made to write text, the last token.

    Raises: MissingPackageError, NotConfiguredError, ModelLoadError.
    """
    import torch

    def read_rows(features: Features) -> Tensor:
        vectors: Tensor = features["sentence_embedding"][:, : model.truncate_dim]
        return torch.nn.functional.normalize(vectors, p=2, dim=1)

    found, model = _load("SentenceTransformer", "Embeddings", name, ModelKind.EMBEDDING, settings)
    return SentenceEncoder(found.name, model, read_rows)


def load_cross_encoder(name: str, settings: Settings) -> SentenceEncoder:
    """The same for a model that gives a pair of texts one score. Raises as above."""

    def read_rows(features: Features) -> Tensor:
        scores: Tensor = model.activation_fn(features["scores"].float())
        return scores.reshape(-1)

    found, model = _load("CrossEncoder", "Scores", name, ModelKind.SCORE, settings)
    if model.num_labels != 1:
        raise ModelLoadError(
            f"{found.name} gives {model.num_labels} scores for each pair of texts; a model for "
            "reranking gives one."
        )
    return SentenceEncoder(found.name, model, read_rows)


def _load(
    class_name: str, capability: str, name: str, kind: ModelKind, settings: Settings
) -> tuple[FoundModel, Any]:
    library = import_package("sentence_transformers", capability, PACKAGE)
    # Here and not above: it loads slowly, and only this needs it.
    from modules.model_loading import blame, to_folder

    device = _choose_device(settings)
    try:
        found = find_model(name, settings, kind)
    except ModelNotFoundError as error:
        # What the client has asked for is there; what the settings name is not.
        raise NotConfiguredError(f"{capability} cannot be had. {error}") from error
    with blame(found), _without_bars():
        model = getattr(library, class_name)(
            str(to_folder(found.path, settings)),
            device=str(device),
            local_files_only=True,
            trust_remote_code=settings.trust_remote_code,
            model_kwargs=_choose_dtype(device),
        )
    _fill_pad_token(model)
    return found, model


def _choose_device(settings: Settings) -> torch.device:
    import torch

    wished = settings.embedding_device
    if wished == "auto":
        wished = "cuda" if torch.cuda.is_available() and not settings.cpu else "cpu"
    try:
        device = torch.device(wished)
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise NotConfiguredError(
            "The setting openai-embedding_device names a device that cannot be used here: "
            f"{wished}. Choose auto, cpu or cuda."
        ) from error
    return device


def _choose_dtype(device: torch.device) -> dict[str, Any]:
    """A CPU computes most numbers of 16 bits slowly; a card takes what the model has."""
    import torch

    return {"dtype": torch.float32} if device.type == "cpu" else {}


def _fill_pad_token(model: Any) -> None:
    """Models that write text often have none; which one it is does not matter, it is masked."""
    tokenizer = model.tokenizer
    if tokenizer is not None and getattr(tokenizer, "pad_token", "") is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without a bar for each of the model's weights, in the middle of the server's output."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
