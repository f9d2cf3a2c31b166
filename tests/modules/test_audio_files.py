"""Sound in files: every container, what is refused, and files that are written in pieces."""

from __future__ import annotations

import io
import random
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from modules.audio_files import AUDIO_FORMATS, HEARING_RATE, SPEAKING_RATE, AudioEncoder, decode
from modules.errors import InvalidRequestError
from tests.recordings import encode, make_tone

FILE_FORMATS = sorted(AUDIO_FORMATS.keys() - {"pcm"})


def listen(data: bytes, max_minutes: float = 1) -> NDArray[np.float32]:
    return decode(data, max_minutes, lambda: None)


def find_pitch(sound: NDArray[np.float32]) -> float:
    strengths = np.abs(np.fft.rfft(sound))
    return float(np.fft.rfftfreq(len(sound), 1 / HEARING_RATE)[strengths.argmax()])


def refusal(data: bytes, max_minutes: float = 1) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        listen(data, max_minutes)
    assert caught.value.param == "file"
    return caught.value


def write(container: str, codec: str, rate: int, layout: str, video: bool = False) -> bytes:
    """Two seconds, by FFmpeg itself; with `video`, beside a black picture."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        picture = out.add_stream("mpeg4", rate=10) if video else None
        sound = out.add_stream(codec, rate=rate) if codec else None
        if sound:
            sound.layout = layout
        if picture:
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
            for _ in range(20):
                out.mux(picture.encode(av.VideoFrame(64, 64, "yuv420p")))
            out.mux(picture.encode(None))
        if sound:
            num_channels = 2 if layout == "stereo" else 1
            times = np.arange(2 * rate) / rate
            tone = (16000 * np.sin(2 * np.pi * 440 * times)).astype(np.int16)
            interleaved = np.repeat(tone, num_channels)[np.newaxis]
            frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
            frame.sample_rate = rate
            out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return file.getvalue()


def build_wav(sample_rate: int, samples: bytes, claimed: int | None = None) -> bytes:
    size = len(samples) if claimed is None else claimed
    form = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    head = b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + b"WAVEfmt "
    return head + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size) + samples


# Reading


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_what_is_written_can_be_read(name: str) -> None:
    sound = listen(encode(make_tone(2), name))
    assert len(sound) / HEARING_RATE == pytest.approx(2, abs=0.1)
    assert find_pitch(sound) == pytest.approx(440, abs=2)
    assert 0.4 < np.abs(sound).max() < 0.6


@pytest.mark.parametrize(
    ("container", "codec", "rate", "layout", "video"),
    [
        ("mp4", "aac", 44100, "stereo", False),
        ("mp4", "aac", 48000, "mono", True),
        ("webm", "libopus", 48000, "stereo", False),
        ("aiff", "pcm_s16be", 22050, "mono", False),
        ("wav", "pcm_s16le", 8000, "stereo", False),
        ("wav", "pcm_f32le", 96000, "mono", False),
        ("avi", "libmp3lame", 44100, "mono", True),
        ("mpegts", "aac", 32000, "stereo", False),
    ],
)
def test_containers_rates_and_channels(
    container: str, codec: str, rate: int, layout: str, video: bool
) -> None:
    sound = listen(write(container, codec, rate, layout, video))
    assert len(sound) / HEARING_RATE == pytest.approx(2, abs=0.1)
    assert find_pitch(sound) == pytest.approx(440, abs=2)


def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes() -> None:
    whole = encode(make_tone(4), "mp3")
    sound = listen(whole[: len(whole) // 2])
    assert len(sound) / HEARING_RATE == pytest.approx(2, abs=0.2)


def test_damage_in_the_middle_is_passed_over() -> None:
    whole = bytearray(encode(make_tone(4), "mp3"))
    whole[8000:8400] = b"\xff" * 400
    assert len(listen(bytes(whole))) / HEARING_RATE == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no recording " * 1000,
        build_wav(16000, b""),
        build_wav(16000, b"\0\0")[:20],
        write("mp4", "", 0, "", video=True),
        (Path(__file__).parents[2] / "LICENSE").read_bytes(),
    ],
    ids=["empty", "garbage", "no samples", "half a header", "no sound", "text"],
)
def test_what_cannot_be_heard_is_refused(data: bytes) -> None:
    refusal(data)


def test_a_recording_may_be_as_long_as_the_limit_and_no_longer() -> None:
    data = encode(make_tone(6))
    assert len(listen(data, max_minutes=0.11)) == pytest.approx(6 * HEARING_RATE, abs=200)
    assert "longer than 0.09 minutes" in str(refusal(data, max_minutes=0.09))


def test_the_length_that_a_header_claims_costs_nothing() -> None:
    second = b"\1\0" * HEARING_RATE
    assert len(listen(build_wav(HEARING_RATE, second, claimed=2**32 - 100))) == HEARING_RATE


@pytest.mark.parametrize("rate", [1000, 768000])
def test_the_lowest_and_the_highest_sample_rate(rate: int) -> None:
    sound = listen(build_wav(rate, b"\1\0" * rate))
    assert len(sound) == pytest.approx(HEARING_RATE, abs=20)


@pytest.mark.parametrize("rate", [1, 999, 768001, 99999989])
def test_sample_rates_beyond_these_are_refused(rate: int) -> None:
    assert f"sample rate of the file, {rate} Hz" in str(refusal(build_wav(rate, b"\1\0" * 20000)))


def test_a_sample_rate_that_changes_to_one_beyond_these() -> None:
    begin, rest = (write("flac", "flac", rate, "mono") for rate in (HEARING_RATE, 999))
    first_frame = rest.index(b"\xff\xf8")
    assert "999 Hz" in str(refusal(begin + rest[first_frame:]))


def build_atom(name: bytes, content: bytes, size_bytes: int = 4) -> bytes:
    """With a size of 8 bytes instead of 4, or of none: then it reaches to the end of the file."""
    if size_bytes == 8:
        return struct.pack(">I4sQ", 1, name, len(content) + 16) + content
    return struct.pack(">I4s", len(content) + 8 if size_bytes else 0, name) + content


@pytest.mark.parametrize("size_bytes", [0, 4, 8])
@pytest.mark.parametrize("place", [b"moov", b"udta", b""])
def test_compressed_headers_are_refused(place: bytes, size_bytes: int) -> None:
    whole = write("mov", "pcm_s16le", 16000, "mono")
    start = whole.index(b"moov") - 4  # the last of it
    header = whole[start:]
    packed = build_atom(b"dcom", b"zlib") + build_atom(
        b"cmvd", struct.pack(">I", len(header)) + zlib.compress(header)
    )
    atom = build_atom(b"cmov", packed, size_bytes=4 if place else size_bytes)
    data = whole[:start] + (build_atom(place, atom, size_bytes) if place else atom)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.audio  # FFmpeg does read it
    assert "compressed header" in str(refusal(data))


def test_damage_anywhere_is_the_files_fault() -> None:
    """Thousands of such files were tried; these few are the same each time."""
    chance = random.Random(0)
    files = [encode(make_tone(1), name) for name in FILE_FORMATS]
    files += [write("mp4", "aac", 44100, "mono"), write("mpegts", "aac", 32000, "mono", True)]
    for _ in range(150):
        data = bytearray(chance.choice(files))
        for _ in range(chance.choice((1, 5, 20))):
            data[chance.randrange(chance.choice((64, 512, len(data))))] = chance.randrange(256)
        with suppress(InvalidRequestError):
            listen(bytes(data))


def test_a_stream_that_begins_in_the_middle() -> None:
    """Of packets of 188 bytes, one in which sound begins says that it belongs to another."""
    data = bytearray(write("mpegts", "aac", 32000, "stereo"))
    packets = range(0, len(data), 188)
    starts = [i for i in packets if data[i + 1 : i + 3] == b"\x41\x00"]
    data[starts[len(starts) // 2] + 2] = 0x7F
    refusal(bytes(data))


class StoppedError(Exception):
    pass


def test_whoever_waits_can_end_it() -> None:
    calls = iter(range(100))

    def check() -> None:
        if next(calls) == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        decode(encode(make_tone(10), "mp3"), 1, check)


# What refers to other files


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/sound.wav", paths
    server.shutdown()
    thread.join()
    server.server_close()


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{}'\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 0 RTP/AVP 0\n"
DASH = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="audio/mp4">
<Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL></Representation>
</AdaptationSet></Period></MPD>"""


@pytest.mark.parametrize("playlist", [HLS, CONCAT, SDP, DASH], ids=["hls", "concat", "sdp", "dash"])
@pytest.mark.parametrize("place", ["file", "file URL", "http"])
def test_playlists_are_refused(
    playlist: str, place: str, asked: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, paths = asked
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode(make_tone(1)))
    address = {"file": str(secret), "file URL": secret.as_uri(), "http": url}[place]
    error = refusal(playlist.format(address).encode())
    assert paths == []
    if playlist in (CONCAT, SDP):  # these FFmpeg recognizes without a name: it was told not to
        assert isinstance(error.__cause__, av.ArgumentError)


# Writing


@pytest.mark.parametrize("name", sorted(AUDIO_FORMATS))
def test_files_are_written_in_pieces(name: str) -> None:
    tone = make_tone(6)
    encoder = AudioEncoder(name, SPEAKING_RATE)
    pieces = [encoder.encode(part) for part in np.split(tone, 3)]
    assert all(pieces)
    data = b"".join([*pieces, encoder.finish()])
    if name == "pcm":
        assert len(data) == pytest.approx(2 * len(tone), abs=200)
    else:
        assert len(listen(data)) / HEARING_RATE == pytest.approx(6, abs=0.1)


def test_other_rates_become_that_of_speech() -> None:
    encoder = AudioEncoder("pcm", SPEAKING_RATE // 2)
    data = encoder.encode(make_tone(1)) + encoder.finish()
    assert len(data) == pytest.approx(2 * 2 * SPEAKING_RATE, abs=200)


def test_nothing_is_written_beyond_the_loudest() -> None:
    encoder = AudioEncoder("pcm", SPEAKING_RATE)
    data = encoder.encode(np.full(SPEAKING_RATE, 1.5, np.float32)) + encoder.finish()
    assert set(np.frombuffer(data, "<i2")) == {32767}
