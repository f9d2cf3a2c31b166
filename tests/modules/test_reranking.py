"""Scores of pairs of texts: cosines, or what a cross-encoder says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from modules.embeddings import Embedder
from modules.errors import ModelLoadError
from modules.model_files import find_bundled
from modules.model_kinds import ModelKind
from modules.reranking import Reranker
from modules.settings import Settings

pytestmark = pytest.mark.anyio

NAME = "all-MiniLM-L6-v2"
PAIRS = [
    ("How long do cats sleep?", "A cat sleeps for most of the day."),
    ("How long do cats sleep?", "The stock market fell."),
    ("What fell?", "The stock market fell. " * 20),
    ("What fell?", "x"),
]


@pytest.fixture
async def embedder() -> AsyncIterator[Embedder]:
    embedder = Embedder(Settings(embedding_model=NAME))
    yield embedder
    embedder.close()


def build_cross_encoder(path: Path, num_labels: int = 1) -> Path:
    """Random weights, of a model that reads 64 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(find_bundled(NAME, ModelKind.EMBEDDING))
    tokenizer.model_max_length = 64
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        num_labels=num_labels,
        initializer_range=1.0,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


async def test_cosines(embedder: Embedder) -> None:
    scored = await Reranker(Settings(), embedder).score(PAIRS)
    texts = [text for pair in PAIRS for text in pair]
    vectors = (await embedder.embed(texts)).vectors
    np.testing.assert_allclose(scored.scores, (vectors[::2] * vectors[1::2]).sum(1), atol=1e-5)
    assert scored.scores[0] > 0.5 > 0.2 > scored.scores[1]
    assert scored.model == NAME
    assert scored.num_truncated == 0
    read_once = await embedder.embed(sorted(set(texts)))
    assert scored.num_tokens == sum(read_once.num_tokens)


async def test_a_cross_encoder(embedder: Embedder, tmp_path: Path) -> None:
    path = build_cross_encoder(tmp_path / "scorer")
    reranker = Reranker(Settings(rerank_model=str(path)), embedder)
    scored = await reranker.score(PAIRS)
    reranker.close()
    library = CrossEncoder(str(path), device="cpu", local_files_only=True)
    np.testing.assert_allclose(scored.scores, library.predict(PAIRS), atol=1e-6)
    assert len(set(scored.scores.tolist())) == 4
    assert scored.model == "scorer"
    assert scored.num_truncated == 1
    count = library.tokenizer
    lengths = [min(64, len(count(*pair)["input_ids"])) for pair in PAIRS]
    assert scored.num_tokens == sum(lengths)


async def test_a_cross_encoder_reads_only_the_beginnings_of_very_long_texts(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_cross_encoder(tmp_path / "scorer")
    long = "The stock market fell. " * 1000
    pairs = [(long, "x"), ("What fell?", long), (long, long)]
    library = CrossEncoder(str(path), device="cpu", local_files_only=True)
    expected = library.predict(pairs)
    lengths: list[int] = []
    encode = PreTrainedTokenizerFast._encode_plus

    def count(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.extend(len(each) for pair in text for each in pair)
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", count)
    reranker = Reranker(Settings(rerank_model=str(path)), embedder)
    scored = await reranker.score(pairs)
    reranker.close()
    assert len(lengths) == 6 and max(lengths) <= 64 * 16
    assert scored.num_truncated == 3
    np.testing.assert_allclose(scored.scores, expected, atol=1e-6)


async def test_a_classifier_is_no_reranker(embedder: Embedder, tmp_path: Path) -> None:
    path = build_cross_encoder(tmp_path / "classifier", num_labels=3)
    reranker = Reranker(Settings(rerank_model=str(path)), embedder)
    with pytest.raises(ModelLoadError, match="classifier gives 3 scores"):
        await reranker.score(PAIRS)
    reranker.close()
