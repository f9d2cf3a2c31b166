"""Messages with images: what becomes of their parts, and of the files."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from PIL import Image

from modules.errors import InvalidRequestError
from modules.image_places import find_places, split_at_places, to_parts
from modules.image_reader import ShownImage
from modules.message_images import fetch_images, has_images, place_images, read_images
from modules.messages import check_message
from tests.vision import draw, image_part, png_of, to_uri

PICTURE = draw(0)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def take_images(
    messages: list[Any], fetch: Any = None, max_pixels: int = 1_000_000
) -> tuple[list[Any], tuple[ShownImage, ...]]:
    placed, parts = place_images(messages, 3)
    return placed, read_images(fetch_images(parts, fetch), max_pixels)


def take(*parts: Any, **options: Any) -> list[Image.Image]:
    _, images = take_images([user(*parts)], **options)
    return [image.picture for image in images]


def test_parts_become_one_text_with_places_in_it() -> None:
    first, second = draw(0), draw(1)
    asked = user(text("a"), text("b"), image_part(first), text("c"), image_part(second))
    plain = {"role": "system", "content": "s"}
    messages, images = take_images([plain, asked])
    pictures = [image.picture.tobytes() for image in images]
    assert pictures == [first.tobytes(), second.tobytes()]
    assert [image.param for image in images] == [f"messages[1].content[{i}]" for i in (2, 4)]
    assert messages[0] is plain
    content = check_message(messages[1], 1)["content"]
    assert find_places(content) == [0, 1]
    assert split_at_places(content)[::2] == ["a\nb", "c", ""]
    image = {"type": "image"}
    assert to_parts(content) == [text("a\nb"), image, text("c"), image]
    assert asked["content"][2]["type"] == "image_url"  # the client's own stay as they were


def test_messages_without_images_are_left_to_others() -> None:
    odd = [{"role": "user"}, {"role": "user", "content": 3}, user(text("a"), "b", None)]
    assert not has_images(odd)
    assert take_images(odd) == (odd, ())


def test_files_are_fetched_where_that_is_allowed() -> None:
    asked = []

    def fetch(url: str, param: str) -> bytes:
        asked.append((url, param))
        return base64.b64decode(to_uri(PICTURE).partition(",")[2])

    part = {"type": "image_url", "image_url": {"url": "https://example.org/a"}}
    assert take(text("a"), part, fetch=fetch)[0].tobytes() == PICTURE.tobytes()
    assert asked == [("https://example.org/a", "messages[0].content[1]")]


@pytest.mark.parametrize(
    ("change", "is_fine"),
    [
        (
            lambda uri: uri.replace("+", "%2B").replace("/", "%2F").replace("image%2F", "image/"),
            True,
        ),
        (lambda uri: uri[:40] + "\n" + uri[40:], True),
        (lambda uri: uri.replace("data:", "DATA:").replace("base64", "BASE64"), True),
        (lambda uri: uri.replace("image/png", "image/png;charset=utf-8"), True),
        (lambda uri: uri.replace(";base64", ""), False),
        (lambda uri: uri[:-1], False),
        (lambda uri: uri.replace(",", ""), False),
        (lambda uri: "data:", False),
    ],
)
def test_data_uris(change: Any, is_fine: bool) -> None:
    part = {"type": "image_url", "image_url": change(to_uri(PICTURE))}
    if is_fine:
        assert take(part)[0].tobytes() == PICTURE.tobytes()
    else:
        with pytest.raises(InvalidRequestError) as caught:
            take(part)
        assert caught.value.param == "messages[0].content[0]"


def test_sizes() -> None:
    large = draw(0, (1200, 800))
    assert take(image_part(large))[0].size == (1200, 800)
    assert take(image_part(large), max_pixels=600 * 400)[0].size == (600, 400)
    assert take(image_part(large, detail="low"))[0].size == (627, 418)
    for size in ((4000, 200), (200, 4000)):
        (strip,) = take(image_part(draw(0, size)), max_pixels=1024)
        assert 512 < strip.width * strip.height <= 1024


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 40_000_000), (4001, 200), (1000, 2)])
def test_a_strip_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    """A model's processor would scale it up: its shorter side has to have some 300 pixels."""
    data = base64.b64encode(png_of(*size)).decode()
    part = {"type": "image_url", "image_url": f"data:image/png;base64,{data}"}
    with pytest.raises(InvalidRequestError, match=f"{size[0]}x{size[1]} pixels") as caught:
        take(part)
    assert caught.value.param == "messages[0].content[0]"


def test_what_is_transparent_is_white_and_pictures_stand_upright() -> None:
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    assert take(image_part(clear))[0].getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (8, 4))
    turned.getexif()[0x0112] = 6  # a phone that was held upright
    uri = to_uri_with_exif(turned)
    assert take({"type": "image_url", "image_url": uri})[0].size == (4, 8)


def to_uri_with_exif(picture: Image.Image) -> str:
    import io

    target = io.BytesIO()
    picture.save(target, "JPEG", exif=picture.getexif())
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode()
