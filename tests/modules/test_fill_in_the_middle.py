from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modules.errors import InvalidRequestError
from modules.fill_in_the_middle import SPELLINGS, Spelling, enclose, find_fim_tokens
from modules.loaded_model import LoadedModel
from modules.prompt_tokens import EncodedPrompt
from tests.fakes import END_OF_TEXT, FakeEngine, build_model, build_tokenizer

BOS = END_OF_TEXT
PROMPT = EncodedPrompt(tuple(b"ab"), start=(BOS,))


def build(engine: FakeEngine, *special_tokens: str) -> LoadedModel:
    return build_model(engine, build_tokenizer(*special_tokens))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.prefix)
def test_how_each_family_spells_it(engine: FakeEngine, spelling: Spelling) -> None:
    names = [name for name in (spelling.prefix, spelling.suffix, spelling.middle) if name]
    model = build(engine, *names)
    text = model.decode(enclose(model, find_fim_tokens(model), PROMPT, "yz").token_ids, False)
    if spelling.middle:
        expected = f"{spelling.prefix}ab{spelling.suffix}yz{spelling.middle}"
    else:
        expected = f"{spelling.suffix}yz{spelling.prefix}ab"
    assert text == f"<|endoftext|>{expected}"


def test_only_what_comes_before_is_cut(engine: FakeEngine) -> None:
    model = build(engine, "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    prompt = enclose(model, find_fim_tokens(model), PROMPT, "yz").cut(7)
    expected = "<|endoftext|><fim_prefix>b<fim_suffix>yz<fim_middle>"
    assert model.decode(prompt.token_ids, False) == expected


def test_nothing_before_or_after(engine: FakeEngine) -> None:
    model = build(engine, "[PREFIX]", "[SUFFIX]")
    tokens = find_fim_tokens(model)
    assert enclose(model, tokens, EncodedPrompt(()), "").token_ids == (tokens.suffix, tokens.prefix)


def test_what_ends_the_middle(engine: FakeEngine) -> None:
    names = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>")
    model = build(engine, *names)
    ends = find_fim_tokens(model).ends
    assert {model.decode([token_id], False) for token_id in ends} == {*names, "<|endoftext|>"}


@pytest.mark.parametrize("special_tokens", [(), ("<fim_prefix>", "<fim_suffix>"), ("[SUFFIX]",)])
def test_models_that_have_not_learnt_it(
    engine: FakeEngine, special_tokens: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequestError, match="tiny cannot fill in the middle") as error:
        find_fim_tokens(build(engine, *special_tokens))
    assert error.value.param == "suffix"


def test_no_space_is_added_between_the_middle_and_the_suffix(engine: FakeEngine) -> None:
    """SentencePiece's tokenizers begin every text with one."""
    vocab = {"<unk>": 0, "▁": 1, "y": 2, "▁y": 3, "\u263a": 4, "a": 5, "▁a": 6}
    merges = [("▁", "y"), ("▁", "a")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens([AddedToken(text) for text in ("▁<PRE>", "▁<SUF>", "▁<MID>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    model = build_model(engine, tokenizer)
    assert model.encode("y", add_special_tokens=False) == (3,)
    prompt = EncodedPrompt(model.encode("a", add_special_tokens=False))
    filled = enclose(model, find_fim_tokens(model), prompt, "y")
    pieces = [model.vocabulary.piece(token_id) for token_id in filled.token_ids]
    assert pieces == ["▁<PRE>", "▁a", "▁<SUF>", "y", "▁<MID>"]
