"""Moderation: windows, the arithmetic of examples, its files, classifiers, and how well it does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from benchmarks.moderation import (
    add_up,
    build_table,
    count_by_category,
    count_flagged,
    judge,
    read_labelled,
    to_yaml,
)
from modules.embeddings import Embedded, Embedder
from modules.errors import CapabilityError, ModelLoadError, NotConfiguredError
from modules.model_files import find_bundled
from modules.model_kinds import ModelKind
from modules.moderation import Moderation, Moderator
from modules.moderation_classifier import LABELS, find_columns
from modules.moderation_examples import (
    CALIBRATION_FILE,
    CATEGORIES,
    EXAMPLES_FILE,
    FOLDER,
    calibrate,
    fit,
    load_calibration,
    load_examples,
)
from modules.moderation_windows import Window, split_text
from modules.settings import PROJECT_ROOT, Settings, load_settings
from tests.fakes import VOCAB_SIZE, build_tokenizer

pytestmark = pytest.mark.anyio

NARROW = Window(max_words=4, max_bytes=40)


# Windows


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("One two. Three four. Five six.", ["One two. Three four.", "Five six."]),
        ("One, two\nthree four\nfive", ["One, two three four", "five"]),
        ("  ", [""]),
        ("a b c d e f", ["a b c d", "c d e f"]),
        ("x" * 20, ["xxxxxxxxxxxxx xxxxxxx"]),
        ("Is it? No! Yes… Well", ["Is it? No! Yes…", "Well"]),
    ],
)
def test_windows(text: str, windows: list[str]) -> None:
    assert split_text(text, NARROW) == windows


@pytest.mark.parametrize(
    "text",
    [
        "word " * 500,
        "x" * 5000,
        "字" * 500,
        "一二三。" * 100,
        "🙂" * 200,
        "Привет, мир! " * 50,
        "a. " * 300,
        "ab " + "y" * 300 + " cd. Ef",
    ],
)
def test_no_window_is_too_long_and_nothing_is_left_out(text: str) -> None:
    windows = split_text(text, NARROW)
    assert all(len(each.encode()) <= NARROW.max_bytes for each in windows)
    assert all(len(each.split()) <= NARROW.max_words for each in windows)
    assert windows[0][:3] == text[:3]
    assert windows[-1][-1] == text.strip()[-1]
    for piece in ("word", "字字字", "二三", "🙂🙂", "мир", "a.", "ab y", "cd."):
        assert piece not in text or any(piece in each for each in windows)


def test_what_a_window_ends_in_the_next_one_begins_with() -> None:
    words = [f"w{i}" for i in range(50)]
    windows = split_text(" ".join(words), NARROW)
    pairs = {tuple(pair) for each in windows for pair in pairwise(each.split())}
    assert pairs >= set(pairwise(words))


# Arithmetic


def make_vectors(num: int, dimensions: int = 8) -> np.ndarray[Any, Any]:
    vectors = np.random.default_rng(0).normal(size=(num, dimensions))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_what_is_left_out_is_what_a_fit_without_it_says() -> None:
    vectors = make_vectors(12)
    labels = np.random.default_rng(1).choice([-1, 0, 1], (12, len(CATEGORIES))).astype(np.int8)
    _, left_out = fit(vectors, labels)
    for i in range(12):
        others = np.arange(12) != i
        regression, _ = fit(vectors[others], labels[others])
        expected = regression.compute(vectors[i : i + 1])[0]
        known = labels[i] != 0
        assert left_out[i, known] == pytest.approx(expected[known], abs=1e-8)
        assert not left_out[i, ~known].any()


def test_a_calibration_finds_the_curve_that_the_labels_were_drawn_from() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(20_000, len(CATEGORIES)))
    is_in = random.random(values.shape) < 1 / (1 + np.exp(-(3 * values - 1)))
    calibration = calibrate(values, np.where(is_in, 1, -1).astype(np.int8))
    assert calibration.slopes == pytest.approx(np.full(len(CATEGORIES), 3), rel=0.1)
    assert calibration.offsets == pytest.approx(np.full(len(CATEGORIES), -1), abs=0.15)


def test_a_category_without_examples_is_not_found_anywhere() -> None:
    labels = np.full((12, len(CATEGORIES)), -1, np.int8)
    labels[:4, 0] = 1
    regression, left_out = fit(make_vectors(12), labels)
    calibration = calibrate(left_out, labels)
    scores = calibration.to_probabilities(regression.compute(make_vectors(30)))
    assert np.isfinite(scores).all()
    assert scores[:, 1:].max() < 0.2


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project's root with the smallest examples."""
    write(tmp_path, EXAMPLES_FILE, {"examples": {"hate": ["I hate them."], "harmless": ["Hi."]}})
    write(tmp_path, CALIBRATION_FILE, {"model": "none"})
    return tmp_path


def write(root: Path, name: str, document: Any) -> None:
    (root / FOLDER).mkdir(exist_ok=True)
    (root / FOLDER / f"{name}.yaml").write_text(
        yaml.safe_dump(document, sort_keys=False), encoding="utf-8"
    )


def test_labels_say_what_is_implied_and_what_is_unsure(folder: Path) -> None:
    document = {
        "implies": {"hate/threatening": ["hate"]},
        "unsure": {"hate/threatening": ["violence"]},
        "examples": {"hate/threatening": ["a"], "harmless": ["b"]},
    }
    write(folder, EXAMPLES_FILE, document)
    first, second = load_examples(folder).labels
    named = dict(zip(CATEGORIES, first.tolist(), strict=True))
    assert [name for name in CATEGORIES if named[name] == 1] == ["hate", "hate/threatening"]
    assert [name for name in CATEGORIES if named[name] == 0] == ["violence"]
    assert set(second.tolist()) == {-1}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "key: value"),
        ({"examples": []}, "a list for each category"),
        ({"examples": {"hate": ["a"]}}, "harmless"),
        ({"examples": {"harmless": ["a"]}}, "of a category"),
        ({"examples": {"hats": ["a"], "harmless": ["b"]}}, "'hats' in `examples`"),
        ({"examples": {"hate": [{"a": "b"}], "harmless": ["b"]}}, "in quotes"),
        ({"examples": {"hate": None, "harmless": ["b"]}}, "list of texts"),
        ({"examples": {"hate": ["a"], "harmless": ["b"]}, "implies": {"hate": ["x"]}}, "names"),
    ],
)
def test_examples_that_cannot_be_used(folder: Path, document: Any, message: str) -> None:
    write(folder, EXAMPLES_FILE, document)
    with pytest.raises(NotConfiguredError, match="moderation/examples.yaml") as caught:
        load_examples(folder)
    assert message in str(caught.value)


def test_a_calibration_is_for_one_model_and_its_examples(folder: Path) -> None:
    examples = load_examples(folder)
    _, left_out = fit(make_vectors(2), examples.labels)
    written = calibrate(left_out, examples.labels)
    text = to_yaml("mini", examples.fingerprint, written)
    (folder / FOLDER / "calibration.yaml").write_text(text)
    read = load_calibration(folder, "mini", examples)
    assert read is not None
    assert read.slopes == pytest.approx(written.slopes, abs=1e-3)
    assert read.offsets == pytest.approx(written.offsets, abs=1e-3)
    assert load_calibration(folder, "other", examples) is None
    changed = replace(examples, texts=("I hate you.", "Hi."))
    assert load_calibration(folder, "mini", changed) is None


def test_a_calibration_that_cannot_be_used(folder: Path) -> None:
    examples = load_examples(folder)
    document = {"model": "mini", "examples": examples.fingerprint, "categories": {"hate": [1, 2]}}
    write(folder, CALIBRATION_FILE, document)
    with pytest.raises(NotConfiguredError, match="moderation/calibration.yaml"):
        load_calibration(folder, "mini", examples)


def test_the_shipped_calibration_is_that_of_the_shipped_examples() -> None:
    examples = load_examples(PROJECT_ROOT)
    assert load_calibration(PROJECT_ROOT, "all-MiniLM-L6-v2", examples) is not None
    assert examples.labels.any(axis=0).all()


def test_no_text_is_in_two_places() -> None:
    texts = [
        *load_examples(PROJECT_ROOT).texts,
        *read_labelled("tune").texts,
        *read_labelled("held_out").texts,
    ]
    assert len({text.lower() for text in texts}) == len(texts)


# The Moderator


class LetterEmbedder:
    """Counts letters: texts of the same letters are alike."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def embed(self, texts: Sequence[str], *, is_background: bool = False) -> Embedded:
        self.texts += texts
        counts = [[each.lower().count(chr(97 + i)) for i in range(26)] for each in texts]
        vectors = np.array(counts, np.float32) + 1e-3
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Embedded(vectors, (1,) * len(texts), 0, "letters")


@pytest.fixture
def letters(folder: Path) -> Iterator[tuple[LetterEmbedder, Moderator]]:
    document = {
        "implies": {"hate/threatening": ["hate"]},
        "examples": {
            "hate": ["xxx", "xxxy", "xx"],
            "hate/threatening": ["zzz", "zzzy", "zz"],
            "harmless": ["aaa", "bbb", "ccc", "abc", "aab", "bcc", "ddd", "dda"],
        },
    }
    write(folder, EXAMPLES_FILE, document)
    embedder = LetterEmbedder()
    moderator = Moderator(Settings(), embedder, folder)  # type: ignore[arg-type]
    yield embedder, moderator
    moderator.close()


def find_flagged(moderation: Moderation) -> list[set[str]]:
    return [{name for name, score in each.items() if score >= 0.5} for each in moderation.scores]


async def test_each_text_is_judged_by_its_worst_window(
    letters: tuple[LetterEmbedder, Moderator],
) -> None:
    _, moderator = letters
    harmless, hateful = "abca bcab " * 10 + ". ", "xxx xxxx " * 10 + ". "
    texts = ["abca", "xxxx", harmless * 9, harmless * 9 + hateful + harmless * 9, "zzzz", "cba"]
    moderation = await moderator.moderate(texts)
    assert moderation.model == "letters"
    hate, threat = {"hate"}, {"hate", "hate/threatening"}
    assert find_flagged(moderation) == [set(), hate, set(), hate, threat, set()]
    assert all(list(scores) == list(CATEGORIES) for scores in moderation.scores)


async def test_a_parent_is_as_likely_as_its_children(
    letters: tuple[LetterEmbedder, Moderator],
) -> None:
    _, moderator = letters
    for scores in (await moderator.moderate(["zzzz", "zzab", "zxzx", "q"])).scores:
        assert scores["hate"] >= scores["hate/threatening"]


async def test_examples_are_embedded_once(letters: tuple[LetterEmbedder, Moderator]) -> None:
    embedder, moderator = letters
    await asyncio.gather(*[moderator.moderate(["abc"]) for _ in range(5)])
    assert embedder.texts.count("xxxy") == 1


async def test_a_broken_file_is_read_again_once_it_is_mended(folder: Path) -> None:
    (folder / FOLDER / "examples.yaml").write_text("examples: [")
    moderator = Moderator(Settings(), LetterEmbedder(), folder)  # type: ignore[arg-type]
    with pytest.raises(NotConfiguredError, match="examples.yaml"):
        await moderator.moderate(["abc"])
    write(folder, EXAMPLES_FILE, {"examples": {"hate": ["x", "y"], "harmless": ["a", "b"]}})
    assert len((await moderator.moderate(["abc"])).scores) == 1
    moderator.close()
    with pytest.raises(CapabilityError):
        await moderator.moderate(["abc"])


# Classifiers


def save_classifier(path: Path, labels: Sequence[str], problem_type: str | None = None) -> Path:
    """Of random weights: a letter's byte is its token."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        pad_token_id=0,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem_type,
        initializer_range=0.5,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = build_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(path)


def classify(path: Path, text: str) -> torch.Tensor:
    """transformers' own logits."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(text.encode())])).logits[0]
    return logits


async def moderate_with(path: Path, texts: Sequence[str]) -> Moderation:
    settings = Settings(moderation_model=str(path), cpu=True)
    moderator = Moderator(settings, Embedder(settings))
    try:
        return await moderator.moderate(texts)
    finally:
        moderator.close()


async def test_a_classifier_with_one_right_label(tmp_path: Path) -> None:
    labels = ["S", "H", "V", "HR", "SH", "S3", "H2", "V2", "OK"]
    path = save_classifier(tmp_path / "koala", labels)
    texts = ["one", "another text", "x"]
    moderation = await moderate_with(path, texts)
    assert moderation.model == "koala"
    for text, scores in zip(texts, moderation.scores, strict=True):
        expected = dict(zip(labels, classify(path, text).softmax(0).tolist(), strict=True))
        assert scores["harassment"] == pytest.approx(expected["HR"], abs=1e-5)
        assert scores["sexual/minors"] == pytest.approx(expected["S3"], abs=1e-5)
        assert scores["violence/graphic"] == pytest.approx(expected["V2"], abs=1e-5)
        assert scores["hate"] == pytest.approx(max(expected["H"], expected["H2"]), abs=1e-5)
        assert scores["illicit"] == scores["self-harm/intent"] == 0


async def test_a_classifier_with_any_number_of_right_labels(tmp_path: Path) -> None:
    labels = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
    path = save_classifier(tmp_path / "jigsaw", labels, "multi_label_classification")
    (scores,) = (await moderate_with(path, ["some text"])).scores
    expected = dict(zip(labels, classify(path, "some text").sigmoid().tolist(), strict=True))
    assert scores["harassment"] == pytest.approx(max(expected[n] for n in labels[:5]), abs=1e-5)
    assert scores["harassment/threatening"] == pytest.approx(expected["threat"], abs=1e-5)
    assert scores["hate"] == pytest.approx(expected["identity_hate"], abs=1e-5)


async def test_labels_of_one_category_add_up_where_one_is_right(tmp_path: Path) -> None:
    labels = ["neutral", "insult", "offensive"]
    path = save_classifier(tmp_path / "model", labels)
    (scores,) = (await moderate_with(path, ["some text"])).scores
    expected = classify(path, "some text").softmax(0)
    assert scores["harassment"] == pytest.approx(float(expected[1] + expected[2]), abs=1e-5)


async def test_a_classifier_sees_the_whole_of_a_long_text(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "model", ["OK", "HR", "toxicity"], None)
    sentences = [f"Sentence number {i} is about the number {i * i}. " for i in range(100)]
    whole = (await moderate_with(path, ["".join(sentences)])).scores[0]
    windows = split_text("".join(sentences), Window(max_words=80, max_bytes=480))
    parts = (await moderate_with(path, windows)).scores
    assert len(windows) > 5
    assert whole["harassment"] == max(each["harassment"] for each in parts)


async def test_a_classifier_of_something_else(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "mood", ["POSITIVE", "NEGATIVE"])
    with pytest.raises(ModelLoadError, match=r"mood cannot moderate.*POSITIVE, NEGATIVE"):
        await moderate_with(path, ["a"])


async def test_a_model_that_is_no_classifier(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        id2label={0: "hate", 1: "harmless"},
        label2id={"hate": 0, "harmless": 1},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "writer")
    save_tokenizer(tmp_path / "writer")
    with pytest.raises(ModelLoadError, match="writer is no text classifier"):
        await moderate_with(tmp_path / "writer", ["a"])


async def test_a_classifier_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotConfiguredError, match="Moderations cannot be had"):
        await moderate_with(tmp_path / "nothing", ["a"])


@pytest.mark.parametrize("name", CATEGORIES)
def test_openais_own_names_are_known_as_labels(name: str) -> None:
    spellings = (name, name.upper(), name.replace("/", "_").replace("-", "_"))
    for spelling in spellings:
        assert find_columns("m", {3: spelling, 4: "OK"}) == {3: CATEGORIES.index(name)}


def test_labels_mean_categories() -> None:
    assert set(LABELS.values()) <= set(CATEGORIES)


# How well it does

# What the bundled embedding model reaches on the texts that nothing was chosen on, less a margin
# for other versions of its libraries. Precision and recall.
FLOORS: Mapping[str, tuple[float, float]] = {
    "harassment": (0.7, 0.6),
    "harassment/threatening": (0.75, 0.6),
    "hate": (0.85, 0.85),
    "hate/threatening": (0.6, 0.6),
    "illicit": (0.8, 0.8),
    "illicit/violent": (0.5, 0.5),
    "self-harm": (0.8, 0.7),
    "self-harm/intent": (0.7, 0.75),
    "self-harm/instructions": (0.8, 0.35),
    "sexual": (0.9, 0.9),
    "sexual/minors": (0.85, 0.75),
    "violence": (0.85, 0.75),
    "violence/graphic": (0.85, 0.75),
}


@pytest.fixture(scope="module")
def bundled() -> Iterator[Moderator]:
    if find_bundled("all-MiniLM-L6-v2", ModelKind.EMBEDDING) is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed")
    settings = load_settings([], {})
    embedder = Embedder(settings)
    moderator = Moderator(settings, embedder)
    yield moderator
    moderator.close()
    embedder.close()


async def test_precision_and_recall_on_texts_that_nothing_was_chosen_on(bundled: Moderator) -> None:
    labelled = read_labelled("held_out")
    scores = await judge(bundled, labelled.texts)
    print(f"\n{build_table(labelled, scores)}")
    by_category = count_by_category(labelled, scores)
    for name, (precision, recall) in FLOORS.items():
        counts = by_category[name]
        assert counts.precision >= precision, name
        assert counts.recall >= recall, name
    every, flagged = add_up(by_category.values()), count_flagged(labelled, scores)
    assert (every.precision, every.recall) >= (0.85, 0) and every.recall >= 0.77
    assert flagged.precision >= 0.88
    assert flagged.recall >= 0.84


async def test_a_threat_does_not_hide_in_a_long_text(bundled: Moderator) -> None:
    licence = (PROJECT_ROOT / "LICENSE").read_text(encoding="utf-8")
    middle = licence.index("Redistribution")
    hidden = f"{licence[:middle]}I will kill you when I see you. {licence[middle:]}"
    plain, with_threat = find_flagged(await bundled.moderate([licence, hidden]))
    assert plain == set()
    assert with_threat >= {"harassment", "harassment/threatening"}
