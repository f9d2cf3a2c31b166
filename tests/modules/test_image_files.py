"""Files of pictures: what is refused before it is decoded, and what becomes of the others."""

from __future__ import annotations

import io
import resource
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from modules import image_files
from modules.errors import BackendError, InvalidRequestError
from modules.image_backend import ImageFormat, OutputFormat, Size
from modules.image_files import (
    choose_auto_size,
    convert,
    load_pillow,
    read_edit,
    read_variation,
)
from tests.vision import png_of

SIZE = Size(64, 64)


@pytest.fixture(autouse=True)
def pillow() -> None:
    load_pillow()


def save(picture: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    picture.save(target, image_format, **options)
    return target.getvalue()


def read(data: bytes, size: Size | None = None) -> Image.Image:
    prepared = read_variation(data, lambda own: size or own)
    return Image.open(io.BytesIO(prepared.image))


def refuse(data: bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read(data)
    assert caught.value.param == "image"
    return str(caught.value)


# Bombs


def webp_of(width: int, height: int) -> bytes:
    """A film of one picture, which is small, on a canvas of that size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content

    def sides(width: int, height: int) -> bytes:
        return (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")

    picture = save(Image.new("RGB", (8, 8)), "WEBP")[12:]
    canvas = chunk(b"VP8X", b"\x02\0\0\0" + sides(width, height))
    frame = chunk(b"ANMF", bytes(6) + sides(8, 8) + bytes(4) + picture)
    return b"RIFF" + chunk(b"", b"WEBP" + canvas + chunk(b"ANIM", bytes(6)) + frame)


def jpeg_of(width: int, height: int) -> bytes:
    data = save(Image.new("RGB", (8, 8)), "JPEG")
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def gif_of(width: int, height: int) -> bytes:
    """A small screen, and a picture in it of that size."""
    data = save(Image.new("RGB", (8, 8)), "GIF")
    start = data.rindex(b",") + 5
    return data[:start] + struct.pack("<HH", width, height) + data[start + 4 :]


@pytest.mark.parametrize("make", [png_of, jpeg_of, webp_of, gif_of])
@pytest.mark.parametrize("side", [7_100, 9_600, 16_000])
def test_too_many_pixels(make: Callable[[int, int], bytes], side: int) -> None:
    """By the header alone: nothing is decoded."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "50 million pixels" in refuse(make(side, side))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000  # kilobytes; decoded, the smallest would have 150 MB


def test_a_text_that_unpacks_to_much() -> None:
    data = save(Image.new("RGB", (8, 8)))
    packed = b"Comment\0\0" + zlib.compress(bytes(10**8))
    checksum = struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + checksum
    assert "broken" in refuse(data[:33] + chunk + data[33:])


def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_UPLOAD_BYTES", 2**20)
    assert "larger than 1 MiB" in refuse(bytes(2**20 + 1))


# Films


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_only_the_films_that_are_one_picture_are_taken(image_format: str) -> None:
    red, blue = (Image.new("RGB", SIZE, colour) for colour in ("red", "blue"))
    alone = save(red, image_format, save_all=True, loop=0, duration=100)
    assert read(alone).convert("RGB").getpixel((9, 9))[0] > 250
    film = save(red, image_format, save_all=True, append_images=[blue], loop=0, duration=100)
    assert "is animated" in refuse(film)


# Broken files


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_files_cut_anywhere_and_changed_anywhere(image_format: str) -> None:
    """They are read or refused; nothing else happens."""
    data = save(Image.effect_noise((40, 40), 60).convert("RGB"), image_format)
    refused = 0
    for position in range(0, len(data), 23):
        for broken in (
            data[:position],
            data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :],
        ):
            try:
                read(broken)
            except InvalidRequestError as error:
                assert error.param == "image"
                refused += 1
    assert refused >= len(data) // 23


def test_nothing_is_written_of_faults() -> None:
    """The second file is one that Pillow would call a bomb."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff\0\0\xff\xff\0\0"
    with warnings.catch_warnings(record=True) as written:
        warnings.simplefilter("always")
        load_pillow()
        read(save(Image.new("RGB", SIZE), "JPEG", exif=exif))
        refuse(png_of(9_600, 9_600))
        assert written == []
        warnings.warn("Of others, all is written.", stacklevel=1)
        assert len(written) == 1


def test_warnings_of_pillow_are_no_errors() -> None:
    """Of other parts of the process: what they read is theirs to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_pillow()
        assert Image.open(io.BytesIO(png_of(9_600, 9_600))).size == (9_600, 9_600)


# Pictures of all kinds


def test_orientation() -> None:
    """Phones write pictures as the sensor lies, and which way is up beside it."""
    picture = Image.new("RGB", (80, 40), "blue")
    picture.paste("red", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = read(save(picture, "JPEG", exif=exif, quality=100))
    assert turned.size == (40, 80)
    assert turned.getpixel((20, 10))[0] > 200 and turned.getpixel((20, 70))[2] > 200


@pytest.mark.parametrize(
    ("mode", "colour", "image_format"),
    [
        ("1", 1, "PNG"),
        ("L", 255, "PNG"),
        ("P", 0, "PNG"),
        ("LA", (255, 255), "PNG"),
        ("RGBA", (255, 255, 255, 255), "WEBP"),
        ("I;16", 65535, "PNG"),
        ("CMYK", (0, 0, 0, 0), "JPEG"),
        ("RGBA", (0, 0, 0, 0), "PNG"),
    ],
)
def test_modes(mode: str, colour: Any, image_format: str) -> None:
    """White, in one way or another: transparent is white too."""
    picture = Image.new(mode, SIZE, colour)
    if mode == "P":
        picture.putpalette([255, 255, 255])
    result = read(save(picture, image_format))
    assert result.mode == "RGB"
    assert min(result.getpixel((30, 30))) > 250


def test_grey_of_16_bits_is_not_clipped() -> None:
    assert abs(read(save(Image.new("I;16", SIZE, 0x8000))).getpixel((3, 3))[0] - 128) <= 1


def test_a_jpeg_with_more_pictures_in_it() -> None:
    first, second = Image.new("RGB", SIZE, "red"), Image.new("RGB", SIZE, "blue")
    data = save(first, "MPO", save_all=True, append_images=[second])
    assert read(data).getpixel((5, 5))[0] > 200


def test_a_palette_with_a_transparent_colour_is_a_mask() -> None:
    picture = Image.new("P", SIZE, 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.paste(1, (0, 0, 32, 64))
    prepared = read_edit(save(picture, transparency=1), None, lambda own: own)
    assert prepared.mask is not None
    assert Image.open(io.BytesIO(prepared.mask)).getbbox() == (0, 0, 32, 64)


def test_a_mask_of_shades_becomes_black_and_white() -> None:
    mask = Image.new("RGBA", SIZE)
    mask.putalpha(Image.linear_gradient("L").resize(SIZE))
    prepared = read_edit(save(Image.new("RGB", SIZE)), save(mask), lambda own: Size(96, 96))
    assert prepared.mask is not None
    area = Image.open(io.BytesIO(prepared.mask))
    assert area.size == (96, 96)
    assert [colour for _, colour in area.getcolors()] == [0, 255]
    assert area.getpixel((5, 5)) == 255


def test_another_shape_is_cut_at_two_sides() -> None:
    picture = Image.new("RGB", (200, 100), "white")
    picture.paste("black", (0, 0, 40, 100))
    result = read(save(picture), SIZE)
    assert result.size == SIZE
    assert result.getpixel((0, 30)) == (255, 255, 255)


# Sizes


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((512, 512), (512, 512)),
        ((515, 519), (512, 512)),
        ((4000, 3000), (1176, 880)),
        ((1, 1), (64, 64)),
        ((1, 50_000_000), (512, 2048)),
        ((9, 100), (64, 96)),
    ],
)
def test_auto_sizes(own: tuple[int, int], expected: tuple[int, int]) -> None:
    most = Size(1024, 1024)
    assert choose_auto_size(Size(*own), most) == expected
    assert choose_auto_size(Size(*own[::-1]), most) == expected[::-1]


# What is sent


def test_a_png_stays_as_it_is() -> None:
    data = save(Image.new("RGB", SIZE))
    assert convert(data, OutputFormat()) == (data, SIZE)


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_formats(image_format: ImageFormat) -> None:
    data, size = convert(save(Image.new("RGBA", SIZE)), OutputFormat(image_format, 80))
    assert size == SIZE
    assert Image.open(io.BytesIO(data)).format == image_format.upper()


def test_what_is_none() -> None:
    with pytest.raises(BackendError, match="web UI is no PNG"):
        convert(b"<html>", OutputFormat())
