"""Speech: which voice it is, sentences as they are spoken, and what ends them."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import numpy as np
import pytest

from modules.errors import (
    CapabilityError,
    InvalidRequestError,
    MissingPackageError,
    ModelLoadError,
    NotConfiguredError,
)
from modules.model_files import find_bundled
from modules.model_kinds import ModelKind
from modules.settings import Settings
from modules.speech import (
    MAX_PHONEMES,
    OPENAI_VOICES,
    SpeechPiece,
    SpeechRequest,
    SpeechSynthesizer,
    _load,
    _Voice,
    find_voice,
    list_voices,
    split_phonemes,
)
from tests.recordings import speak

pytestmark = pytest.mark.anyio

JOE = "en_US-joe-medium"
TEXT = "One. Two. Three."
WAIT_SECONDS = 20


@pytest.fixture
def synthesizer() -> SpeechSynthesizer:
    return SpeechSynthesizer(Settings())


def say(text: str, voice: str = "alloy", speed: float = 1) -> SpeechRequest:
    return SpeechRequest(text, voice, speed, "pcm")


async def collect(pieces: AsyncGenerator[SpeechPiece, None]) -> list[SpeechPiece]:
    return [piece async for piece in pieces]


def write_voice(folder: Path, name: str, **changes: object) -> Path:
    """The bundled voice under another name."""
    folder.mkdir(exist_ok=True)
    bundled = find_bundled(JOE, ModelKind.VOICE)
    assert bundled is not None
    path = folder / f"{name}.onnx"
    path.symlink_to(bundled)
    config = json.loads(Path(f"{bundled}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps({**config, **changes}))
    return path


# Which voice


def test_voices_are_the_bundled_one_and_those_of_the_folder(tmp_path: Path) -> None:
    path = write_voice(tmp_path, "anna")
    (tmp_path / "without-config.onnx").touch()
    assert set(list_voices(tmp_path)) == {JOE, "anna"}
    assert list_voices(tmp_path)["anna"] == path
    assert set(list_voices(tmp_path / "none")) == {JOE}


def test_openais_names_mean_the_setting(tmp_path: Path) -> None:
    write_voice(tmp_path, "anna")
    settings = Settings(voice="anna:2", voice_dir=tmp_path)
    for name in (*OPENAI_VOICES, "Alloy"):
        found = find_voice(name, settings)
        assert (found.name, found.speaker) == ("anna", "2")
    assert find_voice(JOE, settings).name == JOE
    with pytest.raises(NotConfiguredError, match="openai-voice is nobody"):
        find_voice("nova", Settings(voice="nobody", voice_dir=tmp_path))


def test_a_folders_own_voice_may_have_openais_name(tmp_path: Path) -> None:
    write_voice(tmp_path, "nova")
    assert find_voice("nova", Settings(voice_dir=tmp_path)).name == "nova"


@pytest.mark.parametrize("name", ["nobody", "", ":1", "../anna", "anna/../anna", "/etc/passwd"])
def test_other_names_are_refused_with_those_there_are(name: str, tmp_path: Path) -> None:
    write_voice(tmp_path, "anna")
    (tmp_path / "inner").mkdir()
    with pytest.raises(InvalidRequestError, match=f"{JOE}, anna") as caught:
        find_voice(name, Settings(voice_dir=tmp_path / "inner" / ".."))
    assert caught.value.param == "voice"


def test_speakers_have_names_and_numbers(tmp_path: Path) -> None:
    import piper

    write_voice(tmp_path, "both", num_speakers=2, speaker_id_map={"Ann": 0, "Ben": 1})
    voice = _load(piper, tmp_path / "both.onnx")
    settings = Settings(voice_dir=tmp_path)
    names = ["both", "both:Ann", "both:Ben", "both:1"]
    assert [voice.find_speaker(find_voice(name, settings)) for name in names] == [None, 0, 1, 1]
    for name in ("both:2", "both:-1", "both:ben"):
        with pytest.raises(InvalidRequestError, match="Its speakers: Ann, Ben") as caught:
            voice.find_speaker(find_voice(name, settings))
        assert caught.value.param == "voice"


async def test_a_voice_that_would_download_something_is_not_loaded(tmp_path: Path) -> None:
    write_voice(tmp_path, "hua", phoneme_type="pinyin")
    synthesizer = SpeechSynthesizer(Settings(voice_dir=tmp_path))
    with pytest.raises(ModelLoadError, match="hua needs sounds of the kind pinyin"):
        await synthesizer.speak(say("Hello", "hua"))


@pytest.mark.parametrize("damaged", ["model", "config"])
async def test_a_damaged_voice(damaged: str, tmp_path: Path) -> None:
    path = write_voice(tmp_path, "anna")
    if damaged == "model":
        path.unlink()
        path.write_bytes(b"no model")
    else:
        Path(f"{path}.json").write_text("{}")
    synthesizer = SpeechSynthesizer(Settings(voice_dir=tmp_path))
    with pytest.raises(ModelLoadError, match="The voice anna cannot be loaded"):
        await synthesizer.speak(say("Hello", "anna"))
    # and whoever asks for another one gets it
    assert await collect(await synthesizer.speak(say("Hello", JOE)))


async def test_one_voice_is_kept(tmp_path: Path, synthesizer: SpeechSynthesizer) -> None:
    write_voice(tmp_path, "anna")
    synthesizer = SpeechSynthesizer(Settings(voice_dir=tmp_path))
    seen = []
    for name in ("anna", "anna", JOE):
        await collect(await synthesizer.speak(say("Yes", name)))
        seen.append(await synthesizer._worker.run(lambda shelf: shelf._voice))
    assert seen[0] is seen[1]
    assert seen[1] is not seen[2]


@pytest.mark.parametrize(("module", "package"), [("piper", "piper-tts"), ("av", "av")])
async def test_a_missing_package_is_named(
    module: str, package: str, synthesizer: SpeechSynthesizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=f"pip install {package}"):
        await synthesizer.speak(say("Hello"))


# What is spoken


def test_speed() -> None:
    lengths = {speed: len(speak(format="pcm", speed=speed)) for speed in (0.5, 1, 2)}
    assert lengths[0.5] > 1.6 * lengths[1]
    assert lengths[2] < 0.65 * lengths[1]


@pytest.mark.parametrize("text", ["...", " \n ", "?!", "\x00"])
async def test_what_nobody_can_speak(text: str, synthesizer: SpeechSynthesizer) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await synthesizer.speak(say(text))
    assert caught.value.param == "input"


async def test_everything_is_text(synthesizer: SpeechSynthesizer) -> None:
    """piper would read phonemes in double brackets, and refuse a zero."""
    spelled = await synthesizer._worker.run(
        lambda shelf: shelf.take(list_voices(Path())[JOE]).spell("see\x00 [[kitchen]] now", 1)
    )
    assert "ɪtʃ" in "".join(spelled[0])


async def test_nothing_of_a_text_is_logged(
    synthesizer: SpeechSynthesizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await collect(await synthesizer.speak(say("Xylophones ʘ 日本")))
    assert not [record for record in caplog.records if "piper" in record.name]
    assert "ylophone" not in caplog.text


async def test_a_long_sentence_comes_in_pieces(
    synthesizer: SpeechSynthesizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def note(self: _Voice, phonemes: Sequence[str], *args: object) -> np.ndarray:
        lengths.append(len(phonemes))
        return np.zeros(2205, np.float32)

    monkeypatch.setattr(_Voice, "say", note)
    text = "the quick brown fox jumps over the lazy dog " * 90
    for speed in (1, 0.25):
        lengths.clear()
        await collect(await synthesizer.speak(say(text, speed=speed)))
        limit = MAX_PHONEMES * speed
        assert limit / 2 < max(lengths) <= limit
        assert sum(lengths) > 4000


def test_phonemes_are_split_between_words() -> None:
    phonemes = list("one two three four")
    assert ["".join(piece) for piece in split_phonemes(phonemes, 8)] == [
        "one two",
        " three",
        " four",
    ]
    assert list(split_phonemes(list("abcdefgh"), 3)) == [list("abc"), list("def"), list("gh")]
    assert list(split_phonemes(list("abc"), 3)) == [list("abc")]
    assert list(split_phonemes([], 3)) == []


# In which order


class Gate:
    """Lets so many sentences through, and holds up the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_free: int) -> None:
        self.num_spoken = 0
        self.opened = threading.Event()
        say = _Voice.say

        def wait_and_say(voice: _Voice, *args: object) -> object:
            if self.num_spoken == num_free:
                assert self.opened.wait(WAIT_SECONDS)
            self.num_spoken += 1
            return say(voice, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(_Voice, "say", wait_and_say)


@pytest.mark.parametrize("name", ["mp3", "pcm"])
async def test_the_first_sentence_is_there_before_the_last_is_spoken(
    name: str, synthesizer: SpeechSynthesizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, num_free=2)
    pieces = await synthesizer.speak(SpeechRequest(TEXT, "alloy", 1, name))
    first, second = await anext(pieces), await anext(pieces)
    assert first.audio and second.audio
    assert gate.num_spoken == 2
    gate.opened.set()
    assert len(await collect(pieces)) == 2


async def test_whoever_leaves_ends_it_at_the_next_sentence(
    synthesizer: SpeechSynthesizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, num_free=1)
    pieces = await synthesizer.speak(say(TEXT))
    await anext(pieces)
    await pieces.aclose()
    gate.opened.set()
    await synthesizer._worker.run(lambda shelf: None)  # its turn comes when the other is over
    assert gate.num_spoken <= 2


async def test_a_shutdown_ends_it_with_an_error(
    synthesizer: SpeechSynthesizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.worker.CLOSE_SECONDS", 0)  # the gate is still closed
    gate = Gate(monkeypatch, num_free=1)
    pieces = await synthesizer.speak(say(TEXT))
    synthesizer.close()
    gate.opened.set()
    with pytest.raises(CapabilityError, match="shutting down"):
        await collect(pieces)
    with pytest.raises(CapabilityError, match="shutting down"):
        await synthesizer.speak(say(TEXT))
