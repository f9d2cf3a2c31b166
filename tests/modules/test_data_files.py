"""Reading characters, templates and presets by name, and names that try to leave the folder."""

from pathlib import Path

import pytest

from modules.data_files import find_data_file, list_data_files, load_data_file
from modules.errors import DataFileNotFoundError, InvalidRequestError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "characters"
    folder.mkdir()
    (folder / "Example.yaml").write_text("name: Chip\n", encoding="utf-8")
    (folder / "assistant.yml").write_text("name: Helper\n", encoding="utf-8")
    (folder / "Card.json").write_text('{"name":\t"Card"}', encoding="utf-8")
    (folder / "Vicuna-v1.1.yaml").write_text("a: 1\n", encoding="utf-8")
    (folder / "picture.png").touch()
    (folder / ".hidden.yaml").write_text("a: 1\n", encoding="utf-8")
    (folder / "folder.yaml").mkdir()
    (tmp_path / "secret.yaml").write_text("key: sesame\n", encoding="utf-8")
    return folder


def test_list_is_sorted_and_without_suffixes(folder: Path) -> None:
    assert list_data_files(folder) == ["assistant", "Card", "Example", "Vicuna-v1.1"]


def test_list_with_other_suffixes(folder: Path) -> None:
    (folder / "json.gbnf").touch()
    assert list_data_files(folder, (".gbnf",)) == ["json"]


def test_list_of_a_missing_folder_is_empty(tmp_path: Path) -> None:
    assert list_data_files(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Example", {"name": "Chip"}),
        ("Example.yaml", {"name": "Chip"}),
        ("assistant", {"name": "Helper"}),
        ("Card", {"name": "Card"}),
        ("Vicuna-v1.1", {"a": 1}),
    ],
)
def test_load(folder: Path, name: str, content: object) -> None:
    assert load_data_file(folder, name) == content


def test_earlier_suffix_wins(folder: Path) -> None:
    (folder / "Example.json").write_text("{}", encoding="utf-8")
    assert find_data_file(folder, "Example").suffix == ".yaml"
    assert find_data_file(folder, "Example", (".json", ".yaml")).suffix == ".json"
    assert find_data_file(folder, "Example.json").suffix == ".json"


def test_file_made_after_the_first_look_is_found(folder: Path) -> None:
    with pytest.raises(DataFileNotFoundError):
        find_data_file(folder, "New")
    (folder / "New.yaml").touch()
    assert load_data_file(folder, "New") is None


def test_byte_order_mark_and_unicode(folder: Path) -> None:
    (folder / "アダ.yaml").write_text("\ufeffname: Ада\n", encoding="utf-8")
    assert load_data_file(folder, "アダ") == {"name": "Ада"}
    (folder / "bom.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert load_data_file(folder, "bom") == {"a": 1}


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "..\\secret",
        "../secret.yaml",
        "x/../../secret",
        "/etc/passwd",
        "C:\\secret",
        "C:secret",
        "Example/",
        "./Example",
        "characters/Example",
        "Example\0",
        "Example.yaml\0.png",
        "Example\n",
        "",
        ".",
        "..",
        ".hidden",
        ".hidden.yaml",
        "folder",
        "picture",
        "picture.png",
        "x" * 5000,
        "~",
        "*",
        "\ud800",
    ],
)
def test_names_that_are_no_file_of_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(DataFileNotFoundError) as raised:
        load_data_file(folder, name)
    message = str(raised.value)
    assert "sesame" not in message
    assert len(message) < 400
    message.encode("utf-8")


def test_absolute_path_of_a_real_file(folder: Path) -> None:
    with pytest.raises(DataFileNotFoundError):
        load_data_file(folder, str(folder / "Example"))


def test_links_that_leave_the_folder_are_not_there(folder: Path) -> None:
    (folder / "outside.yaml").symlink_to(folder.parent / "secret.yaml")
    (folder / "inside.yaml").symlink_to(folder / "Example.yaml")
    (folder / "dangling.yaml").symlink_to(folder / "nothing.yaml")
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    assert {"outside", "dangling", "loop"}.isdisjoint(list_data_files(folder))
    assert load_data_file(folder, "inside") == {"name": "Chip"}
    with pytest.raises(DataFileNotFoundError):
        load_data_file(folder, "outside")


def test_a_folder_that_is_itself_a_link(folder: Path) -> None:
    link = folder.parent / "linked"
    link.symlink_to(folder, target_is_directory=True)
    assert load_data_file(link, "Example") == {"name": "Chip"}


def test_message_names_kind_nearest_and_known(folder: Path) -> None:
    with pytest.raises(DataFileNotFoundError) as raised:
        load_data_file(folder, "exmple")
    assert str(raised.value) == (
        "There is no character named 'exmple'; did you mean 'Example'? "
        "Known: assistant, Card, Example, Vicuna-v1.1"
    )
    assert raised.value.param == "character"


def test_kind_of_a_folder_with_a_dash_and_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataFileNotFoundError) as raised:
        load_data_file(tmp_path / "instruction-templates", "Alpaca")
    assert str(raised.value) == "There is no instruction template named 'Alpaca'."
    assert raised.value.param == "instruction_template"


def test_long_lists_are_cut(tmp_path: Path) -> None:
    folder = tmp_path / "presets"
    folder.mkdir()
    for number in range(30):
        (folder / f"p{number:02}.yaml").touch()
    with pytest.raises(DataFileNotFoundError, match=r"Known: p00, .*, p19, \.\.\.$"):
        load_data_file(folder, "x")


@pytest.mark.parametrize(
    ("file_name", "content", "reason"),
    [
        ("bad.yaml", b"a: 1\nb: 'open\n", "line 3: "),
        ("bad.yaml", b"a: !!python/object/apply:os.getcwd []", "line 1: "),
        ("bad.yaml", b"a: 2024-13-45", "month must be in"),
        ("bad.yaml", b"a: \xff", "not UTF-8"),
        ("bad.yaml", b"[" * 5000, "recursion"),
        ("bad.json", b'{"a": 1,\n}', "line 2: "),
        ("bad.json", b"", "line 1: "),
    ],
)
def test_broken_files(folder: Path, file_name: str, content: bytes, reason: str) -> None:
    (folder / file_name).write_bytes(content)
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        load_data_file(folder, "bad")
    assert not isinstance(raised.value, DataFileNotFoundError)
    assert str(raised.value).startswith(f"The character file {file_name} cannot be used: ")
    assert str(folder) not in str(raised.value)
