"""Vectors as sentence-transformers' own `encode` makes them, whatever the company of a text."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from modules.embeddings import Embedder
from modules.errors import (
    InvalidRequestError,
    MissingPackageError,
    ModelLoadError,
    NotConfiguredError,
)
from modules.model_files import find_bundled
from modules.model_kinds import ModelKind
from modules.sentence_encoders import TextInput
from modules.settings import Settings
from tests.fakes import VOCAB_SIZE, build_tokenizer

pytestmark = pytest.mark.anyio

NAME = "all-MiniLM-L6-v2"
WORDS = (
    "time",
    "people",
    "a",
    "school",
    "state",
    "gardens",
    "übung",
    "東京",
    "don't",
    "unbelievable",
)


@pytest.fixture(scope="module")
def bundled() -> Path:
    path = find_bundled(NAME, ModelKind.EMBEDDING)
    assert path is not None
    return path


@pytest.fixture(scope="module")
def reference(bundled: Path) -> Any:
    return SentenceTransformer(str(bundled), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    embedder = Embedder(Settings(embedding_model=NAME))
    yield embedder
    embedder.close()


def make_texts(count: int, longest: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


async def test_alone(embedder: Embedder, reference: Any) -> None:
    for text in ("a", "Hello, world!", "word " * 100, "  \n ", "🙂"):
        embedded = await embedder.embed([text])
        (expected,) = reference.encode([text], normalize_embeddings=True)
        assert embedded.vectors.dtype == np.float32
        assert embedded.vectors.shape == (1, 384)
        np.testing.assert_allclose(embedded.vectors[0], expected, atol=2e-6)
        assert embedded.model == NAME


async def test_in_company(embedder: Embedder, reference: Any) -> None:
    """Six clients at once, with texts from one word to more than the model reads."""
    texts = [*make_texts(50, 20), *make_texts(8, 300), "x" * 3000]
    parts = [texts[start::6] for start in range(6)]
    answers = await asyncio.gather(*[embedder.embed(part) for part in parts])
    for part, embedded in zip(parts, answers, strict=True):
        expected = reference.encode(part, normalize_embeddings=True)
        np.testing.assert_allclose(embedded.vectors, expected, atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(embedded.vectors, axis=1), 1, atol=1e-5)


async def test_tokens_are_counted_as_the_model_reads_them(embedder: Embedder) -> None:
    embedded = await embedder.embed(["hello world", "hello", "word " * 254, "word " * 255])
    assert embedded.num_tokens == (4, 3, 256, 256)
    assert embedded.num_truncated == 1


@pytest.fixture
def read_chars(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every text that a tokenizer cuts."""
    lengths: list[int] = []
    encode = PreTrainedTokenizerFast._encode_plus

    def count(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.extend(map(len, [text] if isinstance(text, str) else text))
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", count)
    return lengths


async def test_each_text_is_cut_into_tokens_once(embedder: Embedder, read_chars: list[int]) -> None:
    texts = ["word " * 300, "word", "word " * 254]
    assert (await embedder.embed(texts)).num_truncated == 1
    assert read_chars == [1500, 4, 1270]


async def test_of_a_very_long_text_only_the_beginning_is_cut_into_tokens(
    embedder: Embedder, reference: Any, read_chars: list[int]
) -> None:
    """With the library's vector, even if its words are as long as words can be."""
    texts = ["unbelievable gardens " * 5000, ("abcdefghi" * 11 + " ") * 500, "x" * 50_000]
    embedded = await embedder.embed(texts)
    assert len(read_chars) == 3 and max(read_chars) <= 256 * 64
    assert embedded.num_truncated == 3
    expected = reference.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(embedded.vectors, expected, atol=2e-6)


async def test_token_ids_are_the_models_own(embedder: Embedder) -> None:
    by_text = await embedder.embed(["hello world"])
    by_ids = await embedder.embed([(101, 7592, 2088, 102), (7592, 2088)])
    np.testing.assert_allclose(by_ids.vectors, by_text.vectors.repeat(2, axis=0), atol=2e-6)
    for ids in ((7592, 30522), (-1,)):
        with pytest.raises(InvalidRequestError, match=f"Token id {ids[-1]} .* 30522 tokens"):
            await embedder.embed([ids])
    with pytest.raises(InvalidRequestError, match="no text"):
        await embedder.embed([(101, 102)])


# Which model


async def test_nothing_is_loaded_before_it_is_needed() -> None:
    Embedder(Settings(embedding_model="/no/such/model")).close()


@pytest.mark.parametrize(
    "name", [f"sentence-transformers/{NAME}", NAME.lower(), f"sentence-transformers/{NAME}".lower()]
)
async def test_a_short_name_and_a_whole_one_are_the_same(name: str, embedder: Embedder) -> None:
    named = Embedder(Settings(embedding_model=name))
    by_name, by_short_name = await named.embed(["a"]), await embedder.embed(["a"])
    named.close()
    assert by_name.model == NAME
    np.testing.assert_allclose(by_name.vectors, by_short_name.vectors, atol=2e-6)


async def embed_once(path: Path, *texts: TextInput, **settings: Any) -> Any:
    embedder = Embedder(Settings(embedding_model=str(path), **settings))
    try:
        return await embedder.embed(texts)
    finally:
        embedder.close()


async def check(path: Path) -> Any:
    """As the library has it, for texts of several lengths in one batch."""
    texts = make_texts(12, 8)
    embedded = await embed_once(path, *texts)
    library = SentenceTransformer(str(path), device="cpu", local_files_only=True)
    if getattr(library.tokenizer, "pad_token", "") is None:
        library.tokenizer.pad_token = library.tokenizer.eos_token
    expected = library.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(embedded.vectors, expected, atol=1e-5)
    assert len({round(float(value), 4) for value in embedded.vectors[:, 0]}) > 6
    return library


async def test_a_model_that_writes_text_gives_its_last_token(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    library = await check(tmp_path)
    assert library[1].pooling_mode == "lasttoken"
    embedded = await embed_once(tmp_path, "x" * 128, "x" * 129)
    assert (embedded.num_tokens, embedded.num_truncated) == ((128, 128), 1)


async def test_an_encoder_gives_the_mean_of_its_tokens(tmp_path: Path, bundled: Path) -> None:
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((bundled / name).read_bytes())
    library = await check(tmp_path)
    assert library[1].pooling_mode == "mean"


async def test_a_prompt_that_comes_with_the_model_is_before_every_text(
    tmp_path: Path, reference: Any
) -> None:
    reference.save(str(tmp_path))
    path = tmp_path / "config_sentence_transformers.json"
    config = {**json.loads(path.read_text()), "prompts": {"q": "query: "}}
    path.write_text(json.dumps({**config, "default_prompt_name": "q"}))
    await check(tmp_path)
    embedded = await embed_once(tmp_path, "hello", "word " * 252)
    assert embedded.num_tokens == (5, 256)
    assert embedded.num_truncated == 0


async def test_a_model_without_layers(tmp_path: Path, reference: Any) -> None:
    """A table of vectors: its texts are not padded, and modules.json stands alone."""
    torch.manual_seed(0)
    module = StaticEmbedding(reference.tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path))
    assert not (tmp_path / "config.json").exists()
    await check(tmp_path)
    by_text = await embed_once(tmp_path, "hello world")
    assert by_text.num_tokens == (2,)
    by_ids = await embed_once(tmp_path, (7592, 2088))
    np.testing.assert_allclose(by_ids.vectors, by_text.vectors, atol=2e-6)


# What fails, fails at the request


async def test_a_model_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotConfiguredError, match="nobody/nothing.* not bundled") as caught:
        await embed_once(Path("nobody/nothing"), "a")
    assert NAME in str(caught.value)


async def test_a_folder_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=tmp_path.name):
        await embed_once(tmp_path, "a")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
async def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(NotConfiguredError, match=f"openai-embedding_device.*{device}"):
        await embed_once(Path(NAME), "a", embedding_device=device)


async def test_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingPackageError, match="pip install sentence-transformers"):
        await embed_once(Path(NAME), "a")
