"""The settings table, its four sources and their order, and what is refused and how it is said."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from modules.errors import SettingsError
from modules.settings import (
    PROJECT_ROOT,
    SETTINGS,
    VERSION,
    Setting,
    Settings,
    build_parser,
    load_settings,
)

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load_settings in an empty project whose settings.yaml has the given text."""

    def load(*argv: str, text: str | None = None, **environ: str) -> Settings:
        if text is not None:
            (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
        return load_settings(argv, environ, root=tmp_path)

    return load


@pytest.fixture
def pem(tmp_path: Path) -> tuple[str, str]:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    key.touch()
    certificate.touch()
    return str(key), str(certificate)


# The table


def test_every_field_is_a_row_but_the_two_reports() -> None:
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names - {row.name for row in SETTINGS} == {"extension_params", "warnings"}


@pytest.mark.parametrize("attribute", ["name", "flag", "key", "env"])
def test_names_are_unique(attribute: str) -> None:
    names = [getattr(row, attribute) for row in SETTINGS if getattr(row, attribute)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_every_row_can_be_set_somewhere_and_says_what_it_is(row: Setting) -> None:
    assert row.flag or row.key
    assert re.fullmatch(r"[A-Z].*\.", row.help)
    assert (row.default is None) == row.optional
    assert row.optional or isinstance(row.default, row.type)
    assert not row.choices or row.default in row.choices


def test_names_of_the_users_document_exist() -> None:
    flags = {row.flag for row in SETTINGS}
    keys = {row.key for row in SETTINGS}
    assert flags >= {
        *("--api", "--public-api", "--listen", "--api-port", "--ssl-keyfile", "--ssl-certfile"),
        *("--api-key", "--extensions", "--settings", "--model"),
    }
    assert {row.env for row in SETTINGS if row.env} == {
        *("OPENEDAI_PORT", "OPENEDAI_CERT_PATH", "OPENEDAI_KEY_PATH", "OPENEDAI_DEBUG"),
        *("SD_WEBUI_URL", "OPENEDAI_EMBEDDING_MODEL", "OPENEDAI_EMBEDDING_DEVICE"),
        "SD_BASE_MODEL_SIZE",  # of the same API, though the document does not have it
    }
    assert keys >= {
        *("openai-embedding_device", "openai-embedding_model", "openai-sd_webui_url"),
        *("openai-debug", "openai-stream_format", "chat-instruct_command"),
    }


# The shipped settings.yaml


def test_shipped_file_lists_every_key_with_its_description() -> None:
    lines = (PROJECT_ROOT / "settings.yaml").read_text(encoding="utf-8").splitlines()
    listed = {}
    for comment, line in zip(lines, lines[1:], strict=False):
        if match := re.match(r"([\w-]+):", line):
            listed[match[1]] = comment
    expected = {row.key: f"# {row.description}" for row in SETTINGS if row.key and not row.secret}
    assert listed == expected
    assert list(listed) == list(expected)


def test_shipped_file_holds_the_defaults_and_a_model_that_comes_along() -> None:
    bundled = Settings(embedding_model="all-MiniLM-L6-v2")
    assert load_settings([], {}) == bundled


def test_missing_file_means_the_defaults(load: Load) -> None:
    assert load() == Settings()


def test_defaults() -> None:
    settings = Settings()
    assert settings.api_port == 5000
    assert settings.model_dir == PROJECT_ROOT / "models"
    assert settings.embedding_model == "sentence-transformers/all-mpnet-base-v2"
    assert (settings.character, settings.name1) == ("Assistant", "You")
    assert "\n\n<|prompt|>" in settings.chat_instruct_command
    assert "<|character|>" in settings.chat_instruct_command


# Precedence


def test_file_wins_over_default_flag_over_file_environment_over_flag(load: Load) -> None:
    assert load(text="api_port: 1").api_port == 1
    assert load("--api-port", "2", text="api_port: 1").api_port == 2
    assert load("--api-port", "2", text="api_port: 1", OPENEDAI_PORT="3").api_port == 3


def test_empty_variable_is_not_set(load: Load) -> None:
    assert load("--api-port", "2", OPENEDAI_PORT="").api_port == 2


def test_null_in_the_file_is_the_default(load: Load) -> None:
    assert load(text="api_port: null\nmodel:\n") == Settings()


def test_an_alias_means_a_model(load: Load) -> None:
    assert load(text="model_aliases: {gpt-4: tiny}").model_aliases == {"gpt-4": "tiny"}
    with pytest.raises(SettingsError, match="model_aliases: b is an alias itself"):
        load(text="model_aliases: {a: b, b: tiny}")


def test_empty_flag_takes_back_what_the_file_says(load: Load) -> None:
    assert load("--model", "", text="model: a").model == ()


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        ({"OPENEDAI_PORT": "1234"}, "api_port", 1234),
        ({"OPENEDAI_DEBUG": "1"}, "debug", True),
        ({"OPENEDAI_DEBUG": "0"}, "debug", False),
        ({"SD_WEBUI_URL": "http://127.0.0.1:7861"}, "sd_webui_url", "http://127.0.0.1:7861"),
        ({"OPENEDAI_EMBEDDING_MODEL": "all-MiniLM-L6-v2"}, "embedding_model", "all-MiniLM-L6-v2"),
        ({"OPENEDAI_EMBEDDING_DEVICE": "cuda"}, "embedding_device", "cuda"),
    ],
)
def test_environment(load: Load, environ: dict[str, str], name: str, value: object) -> None:
    assert getattr(load(**environ), name) == value


def test_settings_of_the_users_document(load: Load) -> None:
    settings = load(
        text="""
openai-embedding_device: cuda
openai-embedding_model: "sentence-transformers/all-mpnet-base-v2"
openai-sd_webui_url: http://127.0.0.1:7861
openai-debug: 1
"""
    )
    assert settings.embedding_device == "cuda"
    assert settings.sd_webui_url == "http://127.0.0.1:7861"
    assert settings.debug is True
    assert settings.warnings == ()


# Flags


NEED_FILES = ("ssl_keyfile", "ssl_certfile", "settings")
FLAGS = [row for row in SETTINGS if row.flag and row.name not in NEED_FILES]


@pytest.mark.parametrize("row", FLAGS, ids=lambda row: row.name)
def test_every_flag_reaches_its_field(load: Load, row: Setting) -> None:
    samples: dict[type, str] = {int: "7", float: "1.5", str: "text", Path: "folder", tuple: "one"}
    value = row.choices[-1] if row.choices else samples.get(row.type)
    settings = load(row.flag, *([value] if value else []))
    expected: dict[type, object] = {
        bool: True,
        int: 7,
        float: 1.5,
        str: value,
        Path: Path.cwd() / "folder",
        tuple: ("one",),
    }
    assert getattr(settings, row.name) == expected[row.type]


def test_bf16_is_a_dtype(load: Load) -> None:
    assert load("--bf16").dtype == "bfloat16"


def test_api_loads_the_openai_extension_last_and_the_extension_is_the_api(load: Load) -> None:
    assert load("--api").extensions == ("openai",)
    assert load("--api", "--extensions", "a", "b").extensions == ("a", "b", "openai")
    assert load("--extensions", "openai", "b", "--api").extensions == ("openai", "b")
    assert load("--extensions", "openai").api
    assert not load("--extensions", "example").api


def test_extensions_may_be_repeated_and_come_from_the_file(load: Load) -> None:
    assert load("--extensions", "a", "--extensions", "b", "a").extensions == ("a", "b")
    assert load(text="extensions: [a, b]").extensions == ("a", "b")
    assert load(text="extensions: a, b").extensions == ("a", "b")


def test_admin_key_is_the_api_key_unless_given(load: Load) -> None:
    assert load("--api-key", "k").admin_key == "k"
    assert load("--api-key", "k", "--admin-key", "a").admin_key == "a"
    only_admin = load("--admin-key", "a")
    assert (only_admin.api_key, only_admin.admin_key) == (None, "a")


def test_help_names_every_flag_key_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_settings(["--help"], {})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for row in SETTINGS:
        assert (row.flag or row.key or "") in text
        assert (row.env or "") in text
    assert str(PROJECT_ROOT) not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_settings(["--version"], {})
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == VERSION


def test_percent_signs_cannot_break_the_help() -> None:
    assert "%" not in "".join(row.description + row.default_text for row in SETTINGS)
    build_parser().format_help()


# What is refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--api-prot", "1"], "--api-prot is not a known flag; did you mean --api-port?"),
        (["--api_port", "1"], "--api_port is not a known flag; did you mean --api-port?"),
        (["--api-por", "1"], "--api-por is not a known flag"),
        (["--zzzzzzzz"], "--zzzzzzzz is not a known flag"),
        (["--n-gpu-layers", "35"], "--n-gpu-layers belongs to the llama.cpp loader"),
        (["--n_gpu_layers=35"], "--n_gpu_layers belongs to the llama.cpp loader"),
        (["--loader", "llama.cpp"], "--loader chooses between loaders"),
        (["--use-double-quant"], "--use-double-quant is not offered"),
        (["--share"], "--share belongs to the web page"),
        (["stray"], "unexpected argument 'stray'"),
        (["--api-port"], "--api-port: expected one argument"),
        (["--api-port", "abc"], "--api-port: expected a whole number, not 'abc'"),
        (["--api-port", "-1"], "--api-port: must be at least 0"),
        (["--api-port", "65536"], "--api-port: must be at most 65535"),
        (["--max-num-seqs", "0"], "--max-num-seqs: must be at least 1"),
        (["--kv-cache-memory", "nan"], "--kv-cache-memory: expected a number, not 'nan'"),
        (["--dtype", "int3"], "--dtype: expected one of auto, float32, bfloat16, float16"),
        (["--model-dir", ""], "--model-dir: expected a path"),
        (["--api-key", ""], "--api-key: the key is empty"),
        (["--admin-key", " "], "--admin-key: the key is empty"),
        (["--settings", "no-such-file.yaml"], "no-such-file.yaml: cannot be read"),
    ],
)
def test_bad_flags(load: Load, argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load(*argv)


def test_flags_of_other_loaders_are_not_ours() -> None:
    from modules.settings import _FLAGS_OF_OTHERS

    assert not _FLAGS_OF_OTHERS.keys() & {row.flag for row in SETTINGS}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OPENEDAI_PORT": "http"}, "OPENEDAI_PORT: expected a whole number, not 'http'"),
        ({"OPENEDAI_DEBUG": "perhaps"}, "OPENEDAI_DEBUG: expected true or false"),
        ({"SD_WEBUI_URL": "127.0.0.1:7861"}, "SD_WEBUI_URL: expected an address"),
        ({"SD_WEBUI_URL": "http://"}, "SD_WEBUI_URL: expected an address"),
        ({"SD_WEBUI_URL": "http://[::1"}, "SD_WEBUI_URL: expected an address"),
        ({"SD_WEBUI_URL": "http://127.0.0.1:web"}, "SD_WEBUI_URL: expected an address"),
        ({"OPENEDAI_CERT_PATH": "no.pem"}, "OPENEDAI_CERT_PATH: there is no file"),
    ],
)
def test_bad_environment(load: Load, environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load(**environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("api_port: abc", "settings.yaml: api_port: expected a whole number, not 'abc'"),
        ("api_port: 5000.5", "settings.yaml: api_port: expected a whole number"),
        ("api_port: true", "settings.yaml: api_port: expected a whole number"),
        ("cpu: maybe", "settings.yaml: cpu: expected true or false, not 'maybe'"),
        ("cpu: [true]", "settings.yaml: cpu: expected true or false"),
        ("name1: yes", "settings.yaml: name1: expected text (put it in quotes), not True"),
        ("openai-stream_format: sse", "expected one of auto, openai, classic, not 'sse'"),
        ("name1: [chat]", "settings.yaml: name1: expected text"),
        ("extensions: [1]", "settings.yaml: extensions: expected a list of names"),
        ("model_dir: 5", "settings.yaml: model_dir: expected a path"),
        ("kv_cache_memory: .inf", "settings.yaml: kv_cache_memory: expected a number"),
        ("- a\n- b\n", "settings.yaml, line 1: expected lines of the form"),
        ("# only\n\njust words", "settings.yaml, line 3: expected lines of the form"),
        ("cpu: true\nname1: 'chat\n", "settings.yaml, line 3: not valid YAML"),
        ("cpu: true\n  mode: chat\n", "settings.yaml, line 2: not valid YAML"),
        ("a: !!python/object:os.system x", "settings.yaml, line 1: not valid YAML"),
        ("a: 2024-13-45", "settings.yaml: not valid YAML"),
        ("? [a]\n: b", "settings.yaml, line 1: not valid YAML"),
        ("cpu: true\ndtype: auto\ncpu: false", "settings.yaml, line 3: cpu is set a second time"),
        ("a: \x00", "settings.yaml: not valid YAML"),
    ],
)
def test_bad_files(load: Load, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load(text=text)


def test_file_that_is_not_utf8(load: Load, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_bytes(b"name1: \xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load()


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeffcpu: false\n"])
def test_files_that_say_nothing(load: Load, text: str) -> None:
    assert load(text=text) == Settings()


# Values


@pytest.mark.parametrize("text", ["true", "yes", "on", "1", "'1'", "'True'", "'YES'"])
def test_spellings_of_true(load: Load, text: str) -> None:
    assert load(text=f"openai-debug: {text}").debug is True


@pytest.mark.parametrize("text", ["false", "no", "off", "0", "'0'", "'False'", "'No'"])
def test_spellings_of_false(load: Load, text: str) -> None:
    assert load(text=f"openai-debug: {text}", OPENEDAI_DEBUG="").debug is False


def test_numbers(load: Load) -> None:
    settings = load("--api-port", "0", text="kv_cache_memory: 2\nmax_model_len: '4096'")
    assert settings.api_port == 0
    assert settings.kv_cache_memory == 2.0
    assert settings.max_model_len == 4096


def test_relative_paths_start_where_they_are_written(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "mine.yaml").write_text("model_dir: here", encoding="utf-8")
    assert load(text="model_dir: m/").model_dir == tmp_path / "m"
    assert load("--model-dir", "m").model_dir == elsewhere / "m"
    settings = load("--settings", "mine.yaml")
    assert settings.model_dir == elsewhere / "here"
    assert settings.settings == elsewhere / "mine.yaml"
    assert load("--model-dir", "~/m").model_dir == Path.home() / "m"


def test_settings_flag_replaces_the_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name1: Ada", encoding="utf-8")
    settings = load("--settings", str(tmp_path / "mine.yaml"), text="cpu: true")
    assert (settings.name1, settings.cpu) == ("Ada", False)


def test_errors_name_the_file_that_was_read(load: Load, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("cpu: 5", encoding="utf-8")
    with pytest.raises(SettingsError, match="^mine.yaml: cpu: "):
        load("--settings", str(tmp_path / "mine.yaml"))


# TLS


def test_tls(load: Load, pem: tuple[str, str]) -> None:
    key, certificate = pem
    settings = load("--ssl-keyfile", key, OPENEDAI_CERT_PATH=certificate)
    assert (settings.ssl_keyfile, settings.ssl_certfile) == (Path(key), Path(certificate))
    assert settings.scheme == "https"
    relative = load(text="ssl_keyfile: key.pem\nssl_certfile: cert.pem")
    assert relative.ssl_keyfile == Path(key)


def test_tls_needs_both_files(load: Load, pem: tuple[str, str]) -> None:
    key, certificate = pem
    with pytest.raises(SettingsError, match="^--ssl-keyfile: the certificate is missing"):
        load("--ssl-keyfile", key)
    with pytest.raises(SettingsError, match="^OPENEDAI_CERT_PATH: the key is missing"):
        load(OPENEDAI_CERT_PATH=certificate)


def test_tls_files_must_exist(load: Load, pem: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="^--ssl-keyfile: there is no file"):
        load("--ssl-keyfile", str(tmp_path / "no.pem"), "--ssl-certfile", pem[1])
    with pytest.raises(SettingsError, match="^--ssl-certfile: there is no file"):
        load("--ssl-keyfile", pem[0], "--ssl-certfile", str(tmp_path))


def test_public_url_cannot_have_own_tls(load: Load, pem: tuple[str, str]) -> None:
    key, certificate = pem
    with pytest.raises(SettingsError, match="--public-api: cannot be combined with --ssl-keyfile"):
        load("--public-api", "--ssl-keyfile", key, "--ssl-certfile", certificate)
    assert load("--public-api").public_api


# Secrets


def test_secrets_are_not_shown(load: Load) -> None:
    settings = load("--api-key", "sesame", "--admin-key", "mellon", text="tts-key: swordfish")
    shown = repr(settings)
    assert not any(word in shown for word in ("sesame", "mellon", "swordfish"))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "api_key: [sesame]"),
        ([], "api_key: sesame\napi_key: sesame"),
        ([], "api_key: 'sesame\n"),
        (["--api-kye", "sesame"], ""),
        (["--api-kye=sesame"], ""),
    ],
)
def test_errors_do_not_repeat_secrets(load: Load, argv: list[str], text: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(*argv, text=text)
    assert "sesame" not in str(raised.value)


def test_keys_may_be_in_the_file(load: Load) -> None:
    assert load(text="api_key: sesame").api_key == "sesame"
    assert load(text="api_key: ''").api_key is None
    with pytest.raises(SettingsError, match="quotes"):
        load(text="api_key: 0123")


# Unknown keys, other programs' keys, extensions' keys


def test_unknown_key_is_a_warning_with_the_nearest_one(load: Load) -> None:
    settings = load(text="api-port: 1\nopenai-debgu: 1\nzzzzzz: 1\n5: x\n")
    assert settings.warnings == (
        "settings.yaml: api-port is not a known setting; did you mean api_port?",
        "settings.yaml: openai-debgu is not a known setting; did you mean openai-debug?",
        "settings.yaml: zzzzzz is not a known setting",
        "settings.yaml: 5 is not a known setting",
    )


def test_unknown_variable_is_a_warning(load: Load) -> None:
    assert load(OPENEDAI_PROT="1", HOME="/").warnings == (
        "environment: OPENEDAI_PROT is not a known variable; did you mean OPENEDAI_PORT?",
    )


def test_an_old_file_is_read_without_a_word(load: Load) -> None:
    old = {
        "dark_theme": True,
        "show_controls": True,
        "start_with": "",
        "mode": "chat",
        "chat_style": "cai-chat",
        "prompt-default": "QA",
        "prompt-notebook": "QA",
        "preset": "simple-1",
        "max_new_tokens": 512,
        "seed": -1,
        "truncation_length": 2048,
        "custom_stopping_strings": "",
        "stream": True,
        "character": "Assistant",
        "name1": "You",
        "custom_system_message": "",
        "instruction_template_str": "{{ messages }}",
        "chat_template_str": "{{ messages }}",
        "chat-instruct_command": "<|prompt|>",
        "gallery-items_per_page": 50,
        "gallery-open": False,
        "default_extensions": ["gallery"],
    }
    settings = load(text=yaml.safe_dump(old))
    assert settings.warnings == ()
    assert settings.chat_instruct_command == "<|prompt|>"


def test_keys_of_extensions_go_to_them(load: Load, tmp_path: Path) -> None:
    for name in ("tts", "tts-plus"):
        (tmp_path / "extensions" / name).mkdir(parents=True)
    text = (
        "tts-voice: low\ntts-speed: null\ntts-plus-voice: high\nloaded-a-b: [1]\nabsent-sound: x\n"
    )
    settings = load("--extensions", "loaded", text=text)
    assert settings.extension_params == {
        "tts": {"voice": "low", "speed": None},
        "tts-plus": {"voice": "high"},
        "loaded": {"a-b": [1]},
    }
    assert settings.warnings == ("settings.yaml: absent-sound is not a known setting",)


def test_openai_keys_are_settings_never_extension_parameters(load: Load, tmp_path: Path) -> None:
    (tmp_path / "extensions" / "openai").mkdir(parents=True)
    settings = load("--api", text="openai-debug: 1\nopenai-nonsense: 1\n")
    assert settings.extension_params == {}
    assert len(settings.warnings) == 1


# Derived values


@pytest.mark.parametrize(
    ("argv", "host", "base_url"),
    [
        ([], "127.0.0.1", "http://127.0.0.1:5000"),
        (["--listen"], "0.0.0.0", "http://127.0.0.1:5000"),
        (["--listen-host", "10.0.0.7"], "10.0.0.7", "http://10.0.0.7:5000"),
        (["--listen", "--listen-host", "10.0.0.7"], "10.0.0.7", "http://10.0.0.7:5000"),
        (["--listen-host", "::"], "::", "http://[::1]:5000"),
        (["--api-port", "81"], "127.0.0.1", "http://127.0.0.1:81"),
    ],
)
def test_host_and_base_url(load: Load, argv: list[str], host: str, base_url: str) -> None:
    settings = load(*argv)
    assert (settings.host, settings.base_url) == (host, base_url)


def test_settings_are_frozen(load: Load) -> None:
    settings = load("--extensions", "a", text="a-b: 1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.api_port = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.extension_params["a"]["b"] = 2  # type: ignore[index]
