"""The bytes of tokens, with every way of spelling them that the models of today use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modules import gguf
from modules.model_files import DEFAULT_MODEL, find_model
from modules.settings import Settings
from modules.vocabulary import Vocabulary
from tests.fakes import IM_END, VOCAB_SIZE, build_tokenizer

TEXTS = (
    "Hello there,  two spaces\nand\ttabs",
    "naïve — 日本語 Ω ﷽",
    "🙂 👩‍👩‍👧 🇺🇳 \U0010ffff\u0000\u007f\u00ad",
    "",
)
SPELLED = {
    "byte characters": (build_tokenizer, ("a", "Ġ", "Ċ", "Ã"), (b"a", b" ", b"\n", b"\xc3")),
    "sentencepiece": (
        lambda: _build_sentencepiece(["▁a", "b", "日", "<0xE2>", "<0x0A>", "<0xE2>x"]),
        ("▁a", "b", "日", "<0xE2>", "<0x0A>", "<0xE2>x"),
        (b" a", b"b", "日".encode(), b"\xe2", b"\n", b"<0xE2>x"),
    ),
    "metaspace": (
        lambda: _build_fast(["▁a", "b"], decoders.Metaspace()),
        ("▁a", "b"),
        (b" a", b"b"),
    ),
    "word pieces": (
        lambda: _build_fast(["a", "word", "##ly"], decoders.WordPiece()),
        ("word", "##ly"),
        (b" word", b"ly"),
    ),
    "words": (lambda: _build_fast(["a", "word"], None), ("word",), (b" word",)),
    "bytes by number": (ByT5Tokenizer, ("a", "\xe2", " "), (b"a", b"\xe2", b" ")),
}


def _build_fast(pieces: list[str], decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    vocab = {piece: i for i, piece in enumerate(["<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _build_sentencepiece(pieces: list[str]) -> PreTrainedTokenizerFast:
    """As of Llama 2: what is no piece is spelled in bytes."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", *spelled, "▁", *pieces]))}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(("build", "pieces", "expected"), SPELLED.values(), ids=SPELLED)
def test_bytes_of_a_piece(
    build: Callable[[], PreTrainedTokenizerBase],
    pieces: tuple[str, ...],
    expected: tuple[bytes, ...],
) -> None:
    tokenizer = build()
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    assert tuple(map(vocabulary.bytes_of, ids)) == expected
    assert tuple(map(vocabulary.piece, ids)) == pieces


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    path: Path = find_model(DEFAULT_MODEL, Settings()).path
    folder = gguf.convert(path, tmp_path_factory.mktemp("converted"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["byte characters", "sentencepiece", "bytes by number", "bundled"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(
    kind: str, text: str, bundled: PreTrainedTokenizerFast
) -> None:
    tokenizer = bundled if kind == "bundled" else SPELLED[kind][0]()
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(vocabulary.bytes_of, ids)) == text.encode()


def test_an_emoji_is_split_by_the_bundled_tokenizer(bundled: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary(bundled, len(bundled))
    parts = [vocabulary.bytes_of(i) for i in bundled.encode("🧿", add_special_tokens=False)]
    assert len(parts) > 1
    with pytest.raises(UnicodeDecodeError):
        parts[0].decode()


def test_every_token_of_the_bundled_model_is_spelled(bundled: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary(bundled, len(bundled))
    for token_id in range(len(bundled)):
        text = bundled.decode([token_id], clean_up_tokenization_spaces=False)
        assert vocabulary.bytes_of(token_id).decode(errors="replace") == text
        assert vocabulary.piece(token_id) == bundled.convert_ids_to_tokens(token_id)


def test_added_tokens_are_their_own_text() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("Ġé", special=False)])  # not to be read as byte characters
    vocabulary = Vocabulary(tokenizer, VOCAB_SIZE + 1)
    assert vocabulary.bytes_of(IM_END) == b"<|im_end|>"
    assert vocabulary.bytes_of(VOCAB_SIZE) == "Ġé".encode()
    assert vocabulary.find_with_prefix(b"<|im") == ()
    assert vocabulary.find_with_prefix("Ġ".encode()) == (VOCAB_SIZE,)
    assert vocabulary.find_containing("im_end") == {IM_END}


@pytest.mark.parametrize("build", [build_tokenizer, ByT5Tokenizer, SPELLED["word pieces"][0]])
def test_rows_beyond_the_tokenizer(build: Callable[[], PreTrainedTokenizerBase]) -> None:
    tokenizer = build()
    vocabulary = Vocabulary(tokenizer, len(tokenizer) + 100)
    beyond = range(len(tokenizer), len(tokenizer) + 100)
    assert {vocabulary.bytes_of(i) for i in beyond} == {b""}
    assert {vocabulary.piece(i) for i in beyond} == {""}
    assert not set(beyond) & set(vocabulary.find_with_prefix(b""))


def test_searches(bundled: PreTrainedTokenizerFast) -> None:
    vocabulary = Vocabulary(bundled, len(bundled))
    texts = {i: vocabulary.bytes_of(i) for i in range(len(bundled))}
    special = {i for i, token in bundled.added_tokens_decoder.items() if token.special}
    for text in ("\n", " the", '"', "nowhere to be found"):
        expected = {i for i, token in texts.items() if text.encode() in token}
        assert vocabulary.find_containing(text) == expected
    for prefix in (b"", b" hel", "é".encode()[:1], b"\xff\xff"):
        found = vocabulary.find_with_prefix(prefix)
        assert list(found) == sorted(
            i for i, token in texts.items() if token.startswith(prefix) and i not in special
        )


def test_the_byte_level_pre_tokenizer_agrees() -> None:
    """Every byte, as the library spells it."""
    vocabulary = Vocabulary(build_tokenizer(), VOCAB_SIZE)
    spelled = pre_tokenizers.ByteLevel.alphabet()
    assert {vocabulary.piece(i) for i in range(256)} == set(spelled)
    assert {vocabulary.bytes_of(i)[0] for i in range(256)} == set(range(256))
