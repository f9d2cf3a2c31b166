"""Character cards: pictures and their chunks, the fields of each version, broken cards."""

import base64
import json
import random
import struct
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from modules.character_cards import MAX_TEXT_BYTES, SIGNATURE, read_card
from modules.characters import Character, load_character, to_character
from modules.data_files import MAX_FILE_BYTES, MAX_YAML_BYTES
from modules.errors import InvalidRequestError

# Seconds. What takes longer than some of them goes on for minutes, on any machine.
ENDLESS = 30

V1 = {
    "name": "Ada",
    "description": "{{char}} is a poet.",
    "personality": "Calm.",
    "scenario": "London.",
    "first_mes": "Good day, {{user}}.",
    "mes_example": "<START>\n{{user}}: Hi\n{{char}}: Ah.\n<START>\n{{user}}: Bye\n{{char}}: Oh.\n",
}
V2 = {
    "spec": "chara_card_v2",
    "spec_version": "2.0",
    "data": {
        **V1,
        "system_prompt": "{{original}} Write like {{char}}.",
        "post_history_instructions": "{{Original}}Be brief.",
        "alternate_greetings": ["Hello."],
        "character_book": {"entries": []},
        "tags": ["poet"],
        "extensions": {},
    },
}
DESCRIPTION = (
    "{{char}} is a poet.\n\nCalm.\n\nLondon.\n\n"
    "{{user}}: Hi\n{{char}}: Ah.\n\n***\n\n{{user}}: Bye\n{{char}}: Oh."
)
ADA = Character("Ada", DESCRIPTION, "Good day, {{user}}.")
INSTRUCTED_ADA = Character(
    "Ada", f"Write like {{{{char}}}}.\n\n{DESCRIPTION}\n\nBe brief.", "Good day, {{user}}."
)


def encode(data: Any) -> bytes:
    return base64.b64encode(json.dumps(data).encode())


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def picture(*chunks: bytes) -> bytes:
    """A PNG file of one grey pixel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return SIGNATURE + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def plain(keyword: bytes, text: bytes) -> bytes:
    return chunk(b"tEXt", keyword + b"\0" + text)


def compressed(keyword: bytes, text: bytes) -> bytes:
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text))


def international(keyword: bytes, text: bytes) -> bytes:
    return chunk(b"iTXt", keyword + b"\0\0\0en\0Figur\0" + text)


def compressed_international(keyword: bytes, text: bytes) -> bytes:
    return chunk(b"iTXt", keyword + b"\0\1\0\0\0" + zlib.compress(text))


CHUNKS = (plain, compressed, international, compressed_international)


class TestFields:
    def test_version_1(self) -> None:
        assert to_character(V1) == ADA

    def test_version_2_and_3(self) -> None:
        assert to_character(V2) == INSTRUCTED_ADA
        assert to_character({**V2, "spec": "chara_card_v3"}) == INSTRUCTED_ADA

    def test_what_a_version_2_card_repeats_for_older_programs_is_not_read(self) -> None:
        assert to_character({**V2, "name": "Old", "description": "Old"}) == INSTRUCTED_ADA

    def test_empty_fields(self) -> None:
        card = {"spec": "chara_card_v2", "data": dict.fromkeys(V2["data"], "")}
        assert to_character(card) == Character()


class TestPictures:
    @pytest.mark.parametrize("make", CHUNKS)
    def test_every_kind_of_text_chunk(self, make: Any) -> None:
        assert read_card(picture(make(b"chara", encode(V1)))) == V1

    def test_the_newer_version_counts(self) -> None:
        older, newer = plain(b"chara", encode(V1)), plain(b"ccv3", encode(V2))
        assert read_card(picture(older, newer)) == read_card(picture(newer, older)) == V2

    def test_other_texts_do_not_matter(self) -> None:
        others = (
            plain(b"Comment", b"chara"),
            chunk(b"zTXt", b"Title\0\0broken"),
            chunk(b"tEXt", b""),
        )
        assert read_card(picture(*others, plain(b"Chara", encode(V1)))) == V1

    def test_base64_in_lines_and_text_beyond_ascii(self) -> None:
        card = {"name": "Ада", "first_mes": "🙂"}
        text = base64.encodebytes(json.dumps(card, ensure_ascii=False).encode())
        assert read_card(picture(plain(b"chara", text))) == card

    def test_what_follows_the_end_does_not_matter(self) -> None:
        assert read_card(picture(plain(b"chara", encode(V1))) + b"more") == V1


WHOLE = picture(plain(b"chara", encode(V1)))
BOMB = zlib.compress(b"A" * (MAX_TEXT_BYTES + 1))
BROKEN = {
    "no PNG": (b"GIF89a" + WHOLE, "no PNG"),
    "empty": (b"", "no PNG"),
    "no chunks": (SIGNATURE, "cut off"),
    "no end": (WHOLE[:-12], "cut off"),
    "a length beyond the end": (SIGNATURE + b"\xff\xff\xff\xfftEXt", "cut off"),
    "wrong checksum": (WHOLE.replace(b"chara", b"chars"), "checksum"),
    "no character": (picture(plain(b"Comment", b"hi")), "no character"),
    "broken base64": (picture(plain(b"chara", b"{not base64}")), "base64"),
    "base64 cut off": (picture(plain(b"chara", encode(V1)[:-3])), "base64"),
    "no JSON": (picture(plain(b"chara", base64.b64encode(b"{"))), "JSON"),
    "no UTF-8": (picture(plain(b"chara", base64.b64encode(b'"\xff"'))), "JSON"),
    "deep JSON": (picture(plain(b"chara", base64.b64encode(b"[" * 10**6))), "recursion"),
    "a list": (picture(plain(b"chara", encode([V1]))), "no fields"),
    "a field of lists": (picture(plain(b"chara", encode({"name": [["Ada"]]}))), "not a text"),
    "no data": (picture(plain(b"chara", encode({"spec": "chara_card_v2"}))), "without data"),
    "no zlib": (picture(chunk(b"zTXt", b"chara\0\0Ada")), "damaged"),
    "zlib cut off": (picture(chunk(b"zTXt", b"chara\0\0" + zlib.compress(encode(V1))[:-9])), "cut"),
    "a bomb": (picture(chunk(b"zTXt", b"chara\0\0" + BOMB)), "4 MB"),
    "an international bomb": (picture(chunk(b"iTXt", b"chara\0\1\0\0\0" + BOMB)), "4 MB"),
    "too long a text": (picture(plain(b"chara", b"A" * (MAX_TEXT_BYTES + 4))), "4 MB"),
    "too large a file": (WHOLE + b"\0" * MAX_FILE_BYTES, "10 MB"),
    "many chunks": (SIGNATURE + chunk(b"tEXt", b"") * (MAX_FILE_BYTES // 13), "cut off"),
}


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "characters"
        folder.mkdir()
        return folder

    @pytest.mark.parametrize("card", [V1, V2])
    def test_a_card_as_picture_and_as_text(self, folder: Path, card: dict[str, Any]) -> None:
        (folder / "A.png").write_bytes(picture(plain(b"chara", encode(card))))
        (folder / "B.json").write_text(json.dumps(card), encoding="utf-8")
        (folder / "C.yaml").write_text(json.dumps(card), encoding="utf-8")
        loaded = {load_character(folder.parent, name) for name in ("A", "A.png", "B", "C")}
        assert loaded == {to_character(card)}

    def test_a_picture_beside_a_file_of_text_is_only_a_picture(self, folder: Path) -> None:
        (folder / "Ada.png").write_bytes(picture())
        (folder / "Ada.json").write_text('{"name": "from JSON"}', encoding="utf-8")
        assert load_character(folder.parent, "Ada").name == "from JSON"
        (folder / "Ada.yaml").write_text("name: from yaml", encoding="utf-8")
        assert load_character(folder.parent, "Ada").name == "from yaml"
        (folder / "Ada.yml").write_text("name: from yml", encoding="utf-8")
        assert load_character(folder.parent, "Ada").name == "from yml"

    @pytest.mark.parametrize("content", BROKEN)
    def test_broken_cards_are_refused_quickly(self, folder: Path, content: str) -> None:
        data, reason = BROKEN[content]
        (folder / "Ada.png").write_bytes(data)
        refuse(folder, reason)

    @pytest.mark.parametrize(
        ("suffix", "content", "reason"),
        [
            ("yaml", "name: " + "x" * MAX_YAML_BYTES, "96 KB"),
            ("yaml", "name: [" + "[]," * (MAX_YAML_BYTES // 3 - 10) + "]", "not a text"),
            ("yaml", "name: 1" + ":1" * (MAX_YAML_BYTES // 2 - 10), "digits"),
            ("yaml", "a: &a {b: 1}\nc: {<<: *a}", "merge"),
            ("yaml", "[" * 5000, "recursion"),
            ("json", '{"name": "' + "x" * MAX_FILE_BYTES + '"}', "10 MB"),
            ("json", '{"name": "' + "x" * (MAX_FILE_BYTES - 99) + '"}', "characters"),
            ("json", '{"name": ' + "9" * (MAX_FILE_BYTES - 99) + "}", "digits"),
            ("json", '{"context": "<START>x' + " " * 3_000_000 + 'x"}', "characters"),
        ],
    )
    def test_broken_texts_too(self, folder: Path, suffix: str, content: str, reason: str) -> None:
        (folder / f"Ada.{suffix}").write_text(content, encoding="utf-8")
        refuse(folder, reason)

    def test_a_text_that_grows_by_its_own_quotations(self, folder: Path) -> None:
        rows = ["a0: &a0 [x, x]"] + [
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)
        ]
        (folder / "Ada.yaml").write_text("\n".join([*rows, "name: *a29"]), encoding="utf-8")
        refuse(folder, "not a text")


def refuse(folder: Path, reason: str) -> None:
    start = time.process_time()
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        load_character(folder.parent, "Ada")
    assert time.process_time() - start < ENDLESS
    assert caught.value.param == "character"
    assert len(str(caught.value)) < 300


class TestFuzz:
    """Whatever is wrong with a picture is a ValueError, and never another one."""

    SEEDS = tuple(picture(make(b"chara", encode(V2)), plain(b"x", b"y")) for make in CHUNKS)

    @pytest.mark.parametrize("seed", range(4))
    def test_changed_bytes(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            content = bytearray(rng.choice(self.SEEDS))
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            self.check(bytes(content))

    def test_every_place_to_cut(self) -> None:
        for whole in self.SEEDS:
            for length in range(len(whole)):
                with pytest.raises(ValueError, match="cut off|no PNG"):
                    read_card(whole[:length])

    @pytest.mark.parametrize("seed", range(4))
    def test_changed_texts_under_right_checksums(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            self.check(picture(chunk(rng.choice((b"tEXt", b"zTXt", b"iTXt")), self.make(rng))))

    def make(self, rng: random.Random) -> bytes:
        """A chunk's content: what may stand in one, in any order."""
        texts = (encode(V1), zlib.compress(encode(V1)), encode([]), b"AAAA", rng.randbytes(20))
        pieces: Iterable[bytes] = (b"\0", b"\1", b"en", b"", rng.choice(texts))
        return b"chara\0" + b"".join(rng.choices(list(pieces), k=rng.randint(0, 5)))

    def check(self, content: bytes) -> None:
        try:
            to_character(read_card(content))
        except ValueError as error:
            assert str(error)
