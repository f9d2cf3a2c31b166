"""Files of pictures: those of clients are checked before they are decoded; those for them encoded.

Everything here computes, and belongs into a worker's thread. Pillow is imported at the first use.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from modules.errors import BackendError, InvalidRequestError
from modules.image_backend import SIZE_STEP, ImageFormat, OutputFormat, Size
from modules.optional_packages import import_package

if TYPE_CHECKING:
    from PIL import Image

MIB = 2**20
MAX_UPLOAD_BYTES = 50 * MIB
# Decoded, 200 MB; as many as the largest cameras of phones have.
MAX_PIXELS = 50_000_000
MAX_ASPECT = 4
# Of what a model sees: its processor may scale the shorter side up to some 300 pixels or more.
MAX_SEEN_ASPECT = 20
MIN_SIDE = 64
# What Pillow tries to read a file as. Others, SVG among them, are none for it.
READ_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
# A JPEG with further pictures in it, as phones write them: depth, or brightness. The first counts.
JPEG_WITH_OTHERS = "MPO"
# Below this, of 0 to 255, a pixel of a mask counts as transparent.
ALPHA_LIMIT = 128
# What the decoders of broken files raise.
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)

ChooseSize = Callable[[Size], Size]


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """Both as PNG, cut and scaled to `size`; the mask is white where to edit."""

    size: Size
    image: bytes
    mask: bytes | None


class _UnreadableError(Exception):
    """Its text goes on after "The image "."""


def load_pillow() -> None:
    """Import it, and have it not write of faults in files. Raises MissingPackageError.

    For good, and for it alone: to ignore warnings for a while is not safe with several threads.
    """
    import_package("PIL.Image", "Images", "pillow")
    warnings.filterwarnings("ignore", module=r"PIL\.")


def read_edit(image: bytes, mask: bytes | None, choose_size: ChooseSize) -> PreparedImage:
    """An image, and where to edit it: where `mask` is transparent, or else where it is itself.

    `choose_size` is told the image's. Raises InvalidRequestError.
    """
    picture = _read_upload(image, "image")
    size = choose_size(Size(*picture.size))
    area = _find_area(picture) if mask is None else _read_mask(mask, picture)
    return PreparedImage(
        size,
        _to_png(_flatten(_fit(picture, size))),
        None if area is None else _to_png(_fit(area, size, smooth=False)),
    )


def read_variation(image: bytes, choose_size: ChooseSize) -> PreparedImage:
    """As `read_edit`, without a mask: what is transparent is white."""
    picture = _read_upload(image, "image")
    size = choose_size(Size(*picture.size))
    return PreparedImage(size, _to_png(_flatten(_fit(picture, size))), None)


def read_picture(data: bytes, param: str, max_pixels: int) -> Image.Image:
    """In RGB, scaled down to at most `max_pixels`; what is transparent is white.

    `max_pixels` is at least MAX_SEEN_ASPECT, so that each side keeps a pixel. Raises
    InvalidRequestError.
    """
    picture = _flatten(_read_upload(data, param, MAX_SEEN_ASPECT))
    scale = (max_pixels / Size(*picture.size).num_pixels) ** 0.5
    return picture if scale >= 1 else _fit(picture, Size(*(int(s * scale) for s in picture.size)))


def encode(picture: Image.Image, output: OutputFormat) -> bytes:
    target = io.BytesIO()
    if output.format is ImageFormat.PNG:
        picture.save(target, "PNG")
    else:
        picture.convert("RGB").save(target, output.format.upper(), quality=output.quality)
    return target.getvalue()


def convert(data: bytes, output: OutputFormat) -> tuple[bytes, Size]:
    """What another program has made, in the format that is asked for; a PNG stays as it is.

    Raises BackendError.
    """
    try:
        picture = _decode(data)
    except _UnreadableError as error:
        raise BackendError(f"An image of the web UI {error}.") from None
    is_right = picture.format == "PNG" and output.format is ImageFormat.PNG
    return data if is_right else encode(picture, output), Size(*picture.size)


def choose_auto_size(image: Size, most: Size) -> Size:
    """The image's own, in whole steps, with no more pixels than `most` and no side too short."""
    # At most this far from a square: a narrower strip is nothing that a model can fill.
    wide, high = (max(side, max(image) / MAX_ASPECT) for side in image)
    scale = min(1.0, (most.num_pixels / (wide * high)) ** 0.5)
    steps = (max(MIN_SIDE, side * scale) // SIZE_STEP for side in (wide, high))
    return Size(*(int(step) * SIZE_STEP for step in steps))


# Uploads


def _read_upload(data: bytes, param: str, max_aspect: float = inf) -> Image.Image:
    from PIL import ImageOps

    if len(data) > MAX_UPLOAD_BYTES:
        message = f"The image is larger than {MAX_UPLOAD_BYTES // MIB} MiB."
        raise InvalidRequestError(message, param)
    try:
        picture = _decode(data, max_aspect)
        ImageOps.exif_transpose(picture, in_place=True)
        return _to_8_bits(picture)
    except _UnreadableError as error:
        raise InvalidRequestError(f"The image {error}.", param) from None
    except _FAULTS:
        raise InvalidRequestError("The image is broken.", param) from None


def _read_mask(data: bytes, picture: Image.Image) -> Image.Image:
    mask = _read_upload(data, "mask")
    if mask.size != picture.size:
        message = f"The mask is {Size(*mask.size)} pixels, and the image {Size(*picture.size)}."
        raise InvalidRequestError(message, "mask")
    area = _find_area(mask)
    if area is None:
        message = "The mask is transparent nowhere; it has to be, where the image is to be edited."
        raise InvalidRequestError(message, "mask")
    return area


def _find_area(picture: Image.Image) -> Image.Image | None:
    """White where the picture is transparent; None: it is nowhere."""
    if picture.mode != "RGBA":
        return None
    area = picture.getchannel("A").point([255] * ALPHA_LIMIT + [0] * (256 - ALPHA_LIMIT))
    return area if area.getbbox() else None


def _decode(data: bytes, max_aspect: float = inf) -> Image.Image:
    """The whole picture, of which only the header is read until it is known how large it is."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(data), formats=READ_FORMATS)
        size = Size(*picture.size)
        if size.num_pixels > MAX_PIXELS:
            raise _UnreadableError(_TOO_MANY_PIXELS)
        if max(size) > max_aspect * min(size):
            raise _UnreadableError(f"has {size} pixels, one side over {max_aspect} times the other")
        if getattr(picture, "is_animated", False) and picture.format != JPEG_WITH_OTHERS:
            raise _UnreadableError("is animated; only a single picture can be read")
        picture.load()
    except UnidentifiedImageError:
        raise _UnreadableError("is no PNG, JPEG, GIF or WebP file") from None
    except Image.DecompressionBombError:
        raise _UnreadableError(_TOO_MANY_PIXELS) from None
    except _FAULTS:
        raise _UnreadableError("is broken, or not whole") from None
    return picture


_TOO_MANY_PIXELS = f"has more than {MAX_PIXELS // 10**6} million pixels"


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """RGB, or RGBA where something in it may be transparent."""
    if picture.mode.startswith("I"):  # grey in 16 bits, of which a conversion would only clip
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    is_opaque = picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info
    return picture.convert("RGB" if is_opaque else "RGBA")


def _fit(picture: Image.Image, size: Size, smooth: bool = True) -> Image.Image:
    """Scaled, and cut at two sides where it has another shape."""
    from PIL import Image, ImageOps

    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return picture if picture.size == size else ImageOps.fit(picture, size, method)


def _flatten(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode == "RGB":
        return picture
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def _to_png(picture: Image.Image) -> bytes:
    """For the backend only: fast rather than small."""
    target = io.BytesIO()
    picture.save(target, "PNG", compress_level=1)
    return target.getvalue()
