"""Sound in files: any container → samples, and samples → the formats that speech is sent in.

By PyAV, which brings FFmpeg's libraries, and in memory only. What is said in it is not known here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from modules.errors import InvalidRequestError
from modules.optional_packages import import_package

# What Whisper hears with, and what speech is sent with, in samples per second.
HEARING_RATE = 16000
SPEAKING_RATE = 24000

# FFmpeg's names of the containers that are read. It knows many more, and some of them, such as
# playlists and session descriptions, are addresses of other files or open a port.
_CONTAINERS = (
    "3gp,aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,m4a,matroska,mov,mp3,mp4,mpeg,mpegts,"
    "ogg,tta,w64,wav,webm,wv"
)

# In samples per second, what recordings have. The filter from a higher rate takes memory and time
# that grow with it, in one call that nothing can end; a lower one makes much sound of few bytes.
_MIN_RATE = 1000
_MAX_RATE = 768000

# QuickTime's compressed header. FFmpeg inflates it at once, however large it becomes. It finds it
# in many places, within atoms as well as between them, but only in exactly this form.
_COMPRESSED_HEADER = re.compile(rb"dcomzlib.{4}cmvd", re.DOTALL)


def decode(data: bytes, max_minutes: float, check: Callable[[], None]) -> NDArray[np.float32]:
    """The sound of a file, as one channel of `HEARING_RATE` between -1 and 1.

    It is read piece by piece, so the length that its header claims costs nothing; the sample rate
    that it claims does, and has bounds. `check` is called before each piece, and may raise to end
    this. Raises InvalidRequestError, which names `file`.
    """
    av = _import_av("Recordings")
    if not data:
        raise InvalidRequestError("The file is empty.", "file")
    if _COMPRESSED_HEADER.search(data):
        raise InvalidRequestError("The file has a compressed header, which is not read.", "file")
    pieces: list[NDArray[np.int16]] = []
    try:
        with _open(av, data) as container:
            stream = _find_sound(container)
            pieces += _resample(av, _read_frames(av, container, stream, check), max_minutes)
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:  # PyAV's own too
        raise InvalidRequestError(_UNREADABLE, "file") from error
    return _join(pieces)


_UNREADABLE = "The file cannot be read: it is damaged, or no recording in a format that is known."


def _import_av(capability: str) -> ModuleType:
    return import_package("av", capability, "av")


def _open(av: ModuleType, data: bytes) -> Any:
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": ""}
    return av.open(
        io.BytesIO(data), container_options=options, metadata_errors="ignore", io_open=_refuse_file
    )


def _refuse_file(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """Whatever a file says of other files, here or elsewhere."""
    raise PermissionError


def _find_sound(container: Any) -> Any:
    stream = next(iter(container.streams.audio), None)
    if stream is None:
        raise InvalidRequestError("The file has no sound.", "file")
    if stream.codec_context is None:
        raise InvalidRequestError("The sound of the file is in a format that is not known.", "file")
    return stream


def _read_frames(
    av: ModuleType, container: Any, stream: Any, check: Callable[[], None]
) -> Iterator[Any]:
    """Without the packets that are damaged."""
    for packet in container.demux(stream):
        check()
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def _resample(
    av: ModuleType, frames: Iterator[Any], max_minutes: float
) -> Iterator[NDArray[np.int16]]:
    seconds = 0.0
    resampler: Any = None
    shape = None
    for frame in frames:
        _check_rate(frame.sample_rate)
        seconds += frame.samples / frame.sample_rate
        if seconds > max_minutes * 60:
            raise InvalidRequestError(
                f"The recording is longer than {max_minutes:g} minutes.", "file"
            )
        if shape != (frame.format.name, frame.layout.name, frame.sample_rate):
            yield from _flush(resampler)
            shape = (frame.format.name, frame.layout.name, frame.sample_rate)
            resampler = av.AudioResampler(format="s16", layout="mono", rate=HEARING_RATE)
        frame.pts = None  # they need not be in order
        for resampled in resampler.resample(frame):
            yield resampled.to_ndarray()[0]
    yield from _flush(resampler)


def _check_rate(rate: int) -> None:
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise InvalidRequestError(
            f"The sample rate of the file, {rate} Hz, is not between {_MIN_RATE} and {_MAX_RATE}.",
            "file",
        )


def _flush(resampler: Any) -> Iterator[NDArray[np.int16]]:
    if resampler is not None:
        for frame in resampler.resample(None):
            yield frame.to_ndarray()[0]


def _join(pieces: list[NDArray[np.int16]]) -> NDArray[np.float32]:
    """Piece by piece: with hours of sound, one more copy of all counts."""
    joined = np.empty(sum(map(len, pieces)), np.float32)
    if not len(joined):
        raise InvalidRequestError("There is no sound in the file.", "file")
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        np.divide(piece, 32768, out=joined[start:end], dtype=np.float32)
    return joined


# Speech


@dataclass(frozen=True, slots=True)
class AudioFormat:
    container: str
    codec: str
    media_type: str
    bit_rate: int | None = None
    options: dict[str, str] = field(default_factory=dict)


AUDIO_FORMATS = MappingProxyType(
    {
        # Nobody can go back to the beginning of a stream to write there how long it became.
        "mp3": AudioFormat("mp3", "libmp3lame", "audio/mpeg", 64000, {"write_xing": "0"}),
        "opus": AudioFormat("ogg", "libopus", "audio/ogg", 32000),
        "aac": AudioFormat("adts", "aac", "audio/aac", 64000),
        "flac": AudioFormat("flac", "flac", "audio/flac"),
        "wav": AudioFormat("wav", "pcm_s16le", "audio/wav"),
        "pcm": AudioFormat("s16le", "pcm_s16le", "audio/pcm"),
    }
)


class AudioEncoder:
    """Samples of one channel → a file, in pieces that can be sent on as they come."""

    def __init__(self, name: str, sample_rate: int) -> None:
        """`name` is a key of AUDIO_FORMATS; `sample_rate` that of the samples, not of the file."""
        self._av = _import_av("Spoken texts")
        self._sample_rate = sample_rate
        self._outlet = _Outlet()
        kind = AUDIO_FORMATS[name]
        options = {**kind.options, "fflags": "+bitexact", "flush_packets": "1"}
        self._container = self._av.open(self._outlet, "w", format=kind.container, options=options)
        self._stream = self._container.add_stream(kind.codec, rate=SPEAKING_RATE)
        self._stream.layout = "mono"
        if kind.bit_rate is not None:
            self._stream.bit_rate = kind.bit_rate

    def encode(self, samples: NDArray[np.float32]) -> bytes:
        """What of the file is ready once these samples, between -1 and 1, are in it."""
        whole = np.clip(samples * 32767, -32768, 32767).astype(np.int16)
        frame = self._av.AudioFrame.from_ndarray(whole[np.newaxis], format="s16", layout="mono")
        frame.sample_rate = self._sample_rate
        self._container.mux(self._stream.encode(frame))
        return self._outlet.take()

    def finish(self) -> bytes:
        """The rest of the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._outlet.take()


class _Outlet:
    """A file that can only be written to: without `seek`, FFmpeg does not try to go back."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)
