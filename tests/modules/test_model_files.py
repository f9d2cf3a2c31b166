"""Finding a model, and what is said when there is none. No network."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from modules import model_files
from modules.errors import ModelLoadError, ModelNotFoundError
from modules.model_files import (
    BUNDLED_MODELS,
    find_bundled,
    find_entry,
    find_model,
    how_to_get_bundled,
    list_entries,
    list_models,
)
from modules.model_kinds import ModelKind
from modules.settings import Settings
from tests.modules.conftest import BUNDLED, Hub, cache_as, make_settings, one_line, write_gguf

# Which models there are


def test_lists_what_can_be_loaded(model_dir: Path, tiny: Path) -> None:
    write_gguf(model_dir / "loose.gguf")
    write_gguf(model_dir / "one" / "any-name.gguf")
    write_gguf(model_dir / "two" / "b.gguf")
    write_gguf(model_dir / "two" / "a.gguf")
    (model_dir / "empty").mkdir()
    (model_dir / ".converted" / "x").mkdir(parents=True)
    write_gguf(model_dir / ".converted" / "x.gguf")
    names = list_models(model_dir)
    assert names == ["loose", "one", "tiny", "two/a", "two/b"]
    for name in names:
        assert find_model(name, make_settings(model_dir)).name == name


def list_details(settings: Settings) -> dict[str, tuple[ModelKind, str, int | None]]:
    entries = list_entries(settings)
    assert [entry.name for entry in entries] == sorted((e.name for e in entries), key=str.lower)
    return {entry.name: (entry.kind, entry.format, entry.context_length) for entry in entries}


def test_lists_models_of_all_kinds(model_dir: Path, tiny: Path, tmp_path: Path) -> None:
    encoder = shutil.copytree(tiny, model_dir / "encoder")
    (encoder / "config.json").write_text('{"architectures": ["BertModel"], "n_positions": 99}')
    (encoder / "modules.json").write_text("[]")
    adapter = model_dir / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    broken = model_dir / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    pipeline = tmp_path / "pictures"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    voices = model_dir / "voices"
    voices.mkdir()
    for name in ("anna.onnx", "anna.onnx.json", "no-configuration.onnx"):
        (voices / name).touch()
    settings = make_settings(model_dir, voice_dir=voices, image_model=pipeline)
    bundled = {name for name, model in BUNDLED_MODELS.items() if find_bundled(name, model.kind)}
    found = list_details(settings)
    assert {name: found[name] for name in found.keys() - bundled} == {
        "anna": (ModelKind.VOICE, "piper", None),
        "broken": (ModelKind.TEXT, "transformers", None),
        "encoder": (ModelKind.EMBEDDING, "sentence-transformers", 99),
        "pictures": (ModelKind.IMAGE, "diffusers", None),
        "tiny": (ModelKind.TEXT, "transformers", 512),
    }
    assert list_models(model_dir) == ["broken", "tiny"]
    assert set(list_models(model_dir, ModelKind.EMBEDDING)) - bundled == {"encoder"}
    entry = next(entry for entry in list_entries(settings) if entry.name == "tiny")
    assert entry.path == tiny and not entry.accepts_images
    assert entry.size == sum(file.stat().st_size for file in tiny.iterdir())
    assert entry.modified == max(int(file.stat().st_mtime) for file in tiny.iterdir())


def test_lists_what_is_bundled_as_what_it_is() -> None:
    installed = {
        name: model.kind for name, model in BUNDLED_MODELS.items() if find_bundled(name, model.kind)
    }
    if not installed:
        pytest.skip("no bundled model is installed")
    found = {entry.name: entry.kind for entry in list_entries(Settings())}
    assert found.items() >= installed.items()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_is_closed_is_no_model(model_dir: Path, tiny: Path) -> None:
    (model_dir / "lost+found").mkdir(mode=0)
    assert list_models(model_dir) == ["tiny"]


def test_many_models_are_listed_at_once(model_dir: Path, saved: Path) -> None:
    """No weights are read, and no header twice."""
    for number in range(50):
        shutil.copytree(saved, model_dir / f"folder-{number}")
        write_gguf(model_dir / f"file-{number}.gguf")
    settings = make_settings(model_dir)
    start = time.perf_counter()
    assert len(list_entries(settings)) >= 100
    assert time.perf_counter() - start < 2  # 0.05 where nothing else runs


def test_an_entry_of_any_place(model_dir: Path, tiny: Path, saved: Path) -> None:
    settings = make_settings(model_dir)
    entry = find_entry("TINY", settings, ModelKind.EMBEDDING)
    assert entry and (entry.name, entry.kind) == ("tiny", ModelKind.EMBEDDING)
    entry = find_entry(str(saved), settings, ModelKind.TEXT)
    assert entry and (entry.name, entry.path) == ("tiny", saved.resolve())
    assert find_entry("org/name", settings, ModelKind.TEXT) is None
    cache_as("org/name", saved)
    entry = find_entry("org/name", settings, ModelKind.TEXT)
    assert entry and (entry.name, entry.context_length) == ("org/name", 512)


def test_a_missing_model_folder_has_no_models(tmp_path: Path, model_dir: Path) -> None:
    assert list_models(tmp_path / "none") == []


def test_a_folder_of_several_files_says_which(model_dir: Path) -> None:
    a = write_gguf(model_dir / "two" / "a.gguf")
    write_gguf(model_dir / "two" / "b.gguf")
    assert find_model("two/a", make_settings(model_dir)).path == a
    with pytest.raises(ModelLoadError, match=r"several models.*two/a, two/b"):
        find_model("two", make_settings(model_dir))


def test_the_nearest_place_comes_first(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hub, the hub's cache, a bundled file, a .gguf file, a folder: each hides the former."""
    settings = make_settings(model_dir)
    hub = Hub(saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    on_hub = find_model("org/name", settings)
    assert (on_hub.name, hub.names) == ("org/name", ["org/name"])

    hub.answer = AssertionError("not asked again")  # type: ignore[assignment]
    assert find_model("org/name", settings) == on_hub

    package = tmp_path / "packages" / "carrier"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not for import')")
    write_gguf(package / "file.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(
        model_files.BUNDLED_MODELS, "org/name", model_files.BundledModel("carrier", "file.gguf")
    )
    assert find_model("org/name", settings).path == package / "file.gguf"
    assert "org/name" in list_models(model_dir)

    file = write_gguf(model_dir / "org" / "name.gguf")
    assert find_model("org/name", settings).path == file
    folder = shutil.copytree(saved, model_dir / "org" / "name")
    assert find_model("org/name", settings).path == folder.resolve()


@pytest.mark.parametrize("name", ["x" * 5000, "org/" + "x" * 300, "ü" * 200, "/a" * 600])
def test_no_file_system_is_asked_for_what_is_too_long_for_one(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(model_files, "_find_here", pytest.fail)
    with pytest.raises(ModelNotFoundError, match="no name is that long") as told:
        find_model(name, make_settings(model_dir))
    assert len(str(told.value)) < 200


def test_a_path_is_a_name(model_dir: Path, saved: Path, tmp_path: Path) -> None:
    settings = make_settings(model_dir)
    found = find_model(str(saved), settings)
    assert (found.name, found.path) == ("tiny", saved.resolve())
    file = write_gguf(tmp_path / "elsewhere" / "some.Q8_0.gguf")
    assert find_model(str(file), settings).name == "some.Q8_0"
    assert find_model(str(file.parent), settings).name == "elsewhere"


def test_the_case_of_letters_does_not_matter(model_dir: Path, tiny: Path) -> None:
    assert find_model("Tiny", make_settings(model_dir)).path == tiny.resolve()
    with pytest.raises(ModelNotFoundError) as error:
        find_model(BUNDLED.lower(), make_settings(model_dir))
    assert one_line(error) == f"{BUNDLED} is not installed. {how_to_get_bundled()}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "There is no file or folder ./nope."),
        ("/no/such/path", "There is no file or folder /no/such/path."),
        ("./nope.gguf", "There is no file or folder ./nope.gguf."),
        ("tinny", "Did you mean tiny?"),
        ("smollm2-135m-instuct", f"Did you mean {BUNDLED}?"),
        ("smollm2", f"Did you mean {BUNDLED}?"),
        ("tinny", "Models on this machine: tiny."),
        ("org/name", "the hub cannot be reached"),
        ("", "There is no model"),
    ],
)
def test_says_what_it_did_not_find(model_dir: Path, tiny: Path, name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        find_model(name, make_settings(model_dir))
    assert message in one_line(error)


def test_a_folder_that_is_no_model_says_so(model_dir: Path) -> None:
    (model_dir / "notes").mkdir()
    with pytest.raises(ModelLoadError, match=r"notes is no model: it has no config.json"):
        find_model("notes", make_settings(model_dir))


# The hub


class FakeResponse:
    headers: dict[str, str] = {}
    request = None
    status_code = 500


def hub_error(kind: type[HfHubHTTPError], text: str) -> HfHubHTTPError:
    return kind(text, response=FakeResponse())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("outgoing traffic\nhas been disabled"), "cannot be reached"),
        (OfflineModeIsEnabled("offline"), "cannot be reached"),
        (HfHubHTTPError.__bases__[0]("no route"), "cannot be reached"),
        (hub_error(RepositoryNotFoundError, "404"), "not on the hub, or private there"),
        (hub_error(HfHubHTTPError, "500\nmore"), "the hub did not give it (500)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_says_why_the_hub_did_not_help(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(error))
    with pytest.raises(ModelNotFoundError) as caught:
        find_model("org/name", make_settings(model_dir))
    assert message in one_line(caught)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_interrupted_download_is_taken_up_again(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    part = cache_as("org/name", saved)
    (part / missing).unlink()
    hub = Hub(saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    found = find_model("org/name", make_settings(model_dir))
    assert hub.names == ["org/name"]
    assert (found.path / missing).is_file()


def test_a_download_that_cannot_go_on_is_no_model(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = shutil.copytree(saved, tmp_path / "part")
    (part / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(part))
    with pytest.raises(ModelLoadError, match=r"org/name is incomplete"):
        find_model("org/name", make_settings(model_dir))


def test_every_shard_must_be_there(model_dir: Path, saved: Path) -> None:
    folder = cache_as("org/name", saved)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(ModelNotFoundError):
        find_model("org/name", make_settings(model_dir))
    (folder / "model-2.safetensors").touch()
    assert find_model("org/name", make_settings(model_dir)).path == folder


def test_pickles_are_fetched_only_to_be_loaded(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub = Hub(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(ModelLoadError, match="is incomplete"):
        find_model("org/name", make_settings(model_dir))
    assert "pytorch_model*.bin" not in hub.patterns
    settings = make_settings(model_dir, allow_pickle=True)
    assert find_model("org/name", settings).path.is_dir()  # it is in the cache by now
    find_model("org/other", settings)
    assert "pytorch_model*.bin" in hub.patterns


def test_code_is_fetched_only_to_be_run(
    model_dir: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    find_model("org/name", make_settings(model_dir))
    assert "*.py" not in hub.patterns

    folder = cache_as("org/name", saved)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    find_model("org/name", make_settings(model_dir))
    assert len(hub.names) == 1
    find_model("org/name", make_settings(model_dir, trust_remote_code=True))
    assert len(hub.names) == 2
    assert "*.py" in hub.patterns
