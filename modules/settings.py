"""Every setting of the server in one table, and the only reader of argv, environ and settings.yaml.

Flags, file keys, environment variables and --help all derive from the fields of `Settings`. Later
sources win: defaults < settings.yaml < flags < environment. What a setting does is not known here.
"""

import argparse
import difflib
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin
from urllib.parse import urlsplit

import yaml

from modules.errors import SettingsError

VERSION = "0.1.0"
PROJECT_ROOT = Path(__file__).resolve().parents[1]


def setting(
    group: str,
    default: Any,
    help: str,
    *,
    key: str = "",
    env: str = "",
    flag: bool = True,
    in_file: bool = True,
    aliases: Mapping[str, str] = MappingProxyType({}),
    minimum: float | None = None,
    maximum: float | None = None,
    secret: bool = False,
    is_split: bool = True,
) -> Any:
    """A dataclass field that is also a row of SETTINGS.

    `aliases` are flags that mean one value; with `is_split`, commas and spaces part the names of a
    list.
    """
    metadata = {
        "group": group,
        "help": help,
        "key": key,
        "env": env,
        "flag": flag,
        "in_file": in_file,
        "aliases": aliases,
        "minimum": minimum,
        "maximum": maximum,
        "secret": secret,
        "is_split": is_split,
    }
    # A mapping would be refused as a default: it has no hash, though this kind cannot be changed.
    return field(default_factory=lambda: default, repr=not secret, metadata=metadata)


Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
StreamFormat = Literal["auto", "openai", "classic"]
Truncate = Literal["turns", "error"]

NETWORK = "Network"
MODEL = "Model"
ENGINE = "Engine"
EXTENSIONS = "Extensions"
API = "OpenAI API"
CHAT = "Chat"
OTHER = "Other"


@dataclass(frozen=True, slots=True)
class Settings:
    """The merged settings. Paths are absolute; a field that is None was left to the program."""

    listen: bool = setting(NETWORK, False, "Accept connections from the local network.")
    listen_host: str | None = setting(
        NETWORK, None, "Address to listen on, instead of the one that listen chooses."
    )
    api_port: int = setting(
        NETWORK,
        5000,
        "Port of the API; 0 takes any free one.",
        env="OPENEDAI_PORT",
        minimum=0,
        maximum=65535,
    )
    api_key: str | None = setting(NETWORK, None, "Key that clients must send.", secret=True)
    admin_key: str | None = setting(
        NETWORK,
        None,
        "Key for loading models and other administration; the API key if left out.",
        secret=True,
    )
    ssl_keyfile: Path | None = setting(
        NETWORK, None, "TLS key file (PEM); needs the certificate too.", env="OPENEDAI_KEY_PATH"
    )
    ssl_certfile: Path | None = setting(
        NETWORK, None, "TLS certificate file (PEM); needs the key too.", env="OPENEDAI_CERT_PATH"
    )
    public_api: bool = setting(NETWORK, False, "Create a public Cloudflare URL.")
    public_api_id: str | None = setting(
        NETWORK, None, "Id of a named Cloudflare tunnel for the public URL."
    )
    cors_origins: tuple[str, ...] = setting(
        NETWORK, ("*",), "Web origins that may call the API from a browser."
    )
    max_request_size: int = setting(NETWORK, 64, "Largest request body, in MiB.", minimum=1)

    model: tuple[str, ...] = setting(
        MODEL,
        (),
        "Models to load at start: folders in the model folder, paths or names; the first one is "
        "the default.",
        is_split=False,
    )
    model_dir: Path = setting(MODEL, PROJECT_ROOT / "models", "Folder that holds the models.")
    model_aliases: Mapping[str, str] = setting(
        MODEL,
        MappingProxyType({}),
        "Other names for models, such as gpt-4: NAME, as requests may use them.",
        flag=False,
    )
    model_autoload: bool = setting(
        MODEL, False, "Load a model of the model folder when a request names it."
    )
    max_loaded_models: int | None = setting(
        MODEL,
        None,
        "How many models may be loaded at a time; as many as at start if left out.",
        minimum=1,
    )
    idle_timeout: float = setting(
        MODEL,
        0.0,
        "Minutes without requests until a model is unloaded, to be loaded by the next; 0: never.",
        minimum=0,
    )
    lora: tuple[str, ...] = setting(
        MODEL,
        (),
        "Adapters (LoRA) to load with the first model: folders in the adapter folder.",
        is_split=False,
    )
    lora_dir: Path = setting(MODEL, PROJECT_ROOT / "loras", "Folder that holds the adapters.")
    cpu: bool = setting(MODEL, False, "Run the model on the CPU even if there is a GPU.")
    dtype: Dtype = setting(
        MODEL,
        "auto",
        "Number type of the weights.",
        aliases=MappingProxyType(
            {"--bf16": "bfloat16", "--load-in-8bit": "int8", "--load-in-4bit": "int4"}
        ),
    )
    device_map: str | None = setting(
        MODEL,
        None,
        "How to spread the model over several CUDA cards, such as auto; else it is on one.",
    )
    trust_remote_code: bool = setting(
        MODEL, False, "Run Python code that comes with a model. Only for models you trust."
    )
    allow_pickle: bool = setting(
        MODEL, False, "Load .bin weights too, which can hold programs. Only for models you trust."
    )

    max_num_seqs: int = setting(
        ENGINE, 32, "How many sequences are generated at the same time.", minimum=1
    )
    max_num_batched_tokens: int = setting(
        ENGINE,
        512,
        "How many tokens one step of the model reads at most; a prompt's chunk has half of them.",
        minimum=1,
    )
    max_model_len: int | None = setting(
        ENGINE,
        None,
        "Longest prompt plus reply, in tokens; the model's own limit if left out.",
        minimum=2,
    )
    kv_cache_memory: float | None = setting(
        ENGINE,
        None,
        "Memory for the key-value cache, in GiB; chosen from the free memory if left out.",
        minimum=0.001,
    )
    deterministic: bool = setting(
        ENGINE,
        False,
        "Generate one sequence at a time and use nothing again, so that a seed always gives the "
        "same text.",
    )

    api: bool = setting(
        EXTENSIONS, False, "Serve the OpenAI compatible API (the extension openai)."
    )
    extensions: tuple[str, ...] = setting(EXTENSIONS, (), "Extensions to load, in this order.")

    stream_format: StreamFormat = setting(
        API, "auto", "Dialect of streamed replies.", key="openai-stream_format", flag=False
    )
    embedding_model: str = setting(
        API,
        "sentence-transformers/all-mpnet-base-v2",
        "Model for embeddings.",
        key="openai-embedding_model",
        env="OPENEDAI_EMBEDDING_MODEL",
        flag=False,
    )
    embedding_device: str = setting(
        API,
        "auto",
        "Device of the embedding model, such as cpu or cuda.",
        key="openai-embedding_device",
        env="OPENEDAI_EMBEDDING_DEVICE",
        flag=False,
    )
    rerank_model: str | None = setting(
        API,
        None,
        "Cross-encoder for reranking and scores; without one, the embedding model does it.",
        key="openai-rerank_model",
        flag=False,
    )
    moderation_model: str | None = setting(
        API,
        None,
        "Classifier for moderations; without one, the embedding model compares with examples.",
        key="openai-moderation_model",
        flag=False,
    )
    sd_webui_url: str | None = setting(
        API,
        None,
        "Address of a Stable Diffusion web UI, for images.",
        key="openai-sd_webui_url",
        env="SD_WEBUI_URL",
        flag=False,
    )
    sd_base_model_size: int = setting(
        API,
        512,
        "Width of the pictures that the web UI's model has learnt from: 512, or 1024 for SDXL. "
        "Larger ones are made so large and scaled up.",
        key="openai-sd_base_model_size",
        env="SD_BASE_MODEL_SIZE",
        flag=False,
        minimum=64,
        maximum=4096,
    )
    image_model: Path | None = setting(
        API,
        None,
        "Folder of a diffusers pipeline, for images instead of a web UI.",
        key="openai-image_model",
        flag=False,
    )
    image_timeout: int = setting(
        API,
        600,
        "How long the images of one request may take, in seconds.",
        key="openai-image_timeout",
        flag=False,
        minimum=1,
    )
    max_images: int = setting(
        API,
        10,
        "How many images the messages of one chat may have.",
        key="openai-max_images",
        flag=False,
        minimum=0,
    )
    max_image_pixels: int = setting(
        API,
        2_000_000,
        "Most pixels of an image in a chat; larger ones are scaled down.",
        key="openai-max_image_pixels",
        flag=False,
        minimum=1024,
    )
    fetch_images: bool = setting(
        API,
        False,
        "Fetch images in chats from the web, where a message has the URL of one.",
        key="openai-fetch_images",
        flag=False,
    )
    transcription_model: str = setting(
        API,
        "whisper-tiny.en",
        "Whisper model for transcriptions: a name, or a folder of CTranslate2's or transformers' "
        "format.",
        key="openai-transcription_model",
        flag=False,
    )
    max_audio_minutes: int = setting(
        API,
        120,
        "Longest recording that is transcribed, in minutes.",
        key="openai-max_audio_minutes",
        flag=False,
        minimum=1,
    )
    voice: str = setting(
        API,
        "en_US-joe-medium",
        "Voice of speech where a request names one of OpenAI's, which are not to be had.",
        key="openai-voice",
        flag=False,
    )
    voice_dir: Path = setting(
        API,
        PROJECT_ROOT / "models" / "voices",
        "Folder of Piper voices: .onnx files, each with its .onnx.json.",
        key="openai-voice_dir",
        flag=False,
    )
    user_data_dir: Path = setting(
        API,
        PROJECT_ROOT / "user_data",
        "Folder for uploaded files and batches; there are none if it cannot be written.",
    )
    storage_quota: float = setting(
        API,
        5.0,
        "How much all uploaded files and results of batches may take, in GiB.",
        key="openai-storage_quota",
        flag=False,
        minimum=0.001,
    )
    debug: bool = setting(
        API,
        False,
        "Log requests and replies in full, prompts included.",
        key="openai-debug",
        env="OPENEDAI_DEBUG",
        flag=False,
    )

    character: str = setting(
        CHAT, "Assistant", "Character of the chat modes: the name of a file in characters."
    )
    name1: str = setting(CHAT, "You", "The user's name in the chat modes.", flag=False)
    user_bio: str = setting(CHAT, "", "What the character knows about the user.", flag=False)
    context: str = setting(CHAT, "", "Context for characters that bring none.", flag=False)
    greeting: str = setting(CHAT, "", "Greeting for characters that bring none.", flag=False)
    instruction_template: str | None = setting(
        CHAT,
        None,
        "Template instead of the model's own: the name of a file in instruction-templates.",
        flag=False,
    )
    instruction_template_str: str | None = setting(
        CHAT, None, "The same, as a Jinja2 template written out.", flag=False
    )
    chat_template_str: str | None = setting(
        CHAT, None, "Jinja2 template of the chat modes, instead of the built-in one.", flag=False
    )
    chat_instruct_command: str = setting(
        CHAT,
        "You take part in the conversation below as <|character|>. "
        "Write the one reply that <|character|> gives next.\n\n<|prompt|>",
        "Instruction of the chat-instruct mode; <|character|> and <|prompt|> are filled in.",
        key="chat-instruct_command",
        flag=False,
    )

    truncate: Truncate = setting(
        CHAT,
        "turns",
        "What becomes of conversations that are too long: their oldest turns are left out, or they "
        "are an error.",
        flag=False,
    )
    special_tokens_in_messages: bool = setting(
        CHAT,
        False,
        "Read what messages spell as special tokens, such as <|im_end|>, as these tokens, not as "
        "text.",
        flag=False,
    )

    settings: Path | None = setting(
        OTHER, None, "Settings file to read instead of settings.yaml.", in_file=False
    )
    verbose: bool = setting(
        OTHER, False, "Log more of what happens, but never prompts, replies or keys."
    )
    nowebui: bool = setting(
        OTHER, False, "Accepted for old command lines; there is no web page.", in_file=False
    )

    extension_params: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: MappingProxyType({}), repr=False
    )
    """Extension name → {parameter: value}, from the keys `<extension>-<parameter>` of the file."""
    warnings: tuple[str, ...] = ()
    """What was passed over while reading; to be shown at start."""

    @property
    def host(self) -> str:
        return self.listen_host or ("0.0.0.0" if self.listen else "127.0.0.1")

    @property
    def scheme(self) -> str:
        return "https" if self.ssl_certfile else "http"

    @property
    def base_url(self) -> str:
        """The address for clients on this machine, without a path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.api_port}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: a field of Settings and the names it has elsewhere."""

    name: str
    type: type
    """bool, int, float, str, Path, tuple (of str) or Mapping (of str to str)."""
    optional: bool
    default: Any
    group: str
    help: str
    flag: str | None
    key: str | None
    env: str | None
    aliases: Mapping[str, str]
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    secret: bool
    is_split: bool

    @property
    def description(self) -> str:
        return f"{self.help} One of: {', '.join(self.choices)}." if self.choices else self.help

    @property
    def default_text(self) -> str:
        """The default as a person writes it; empty where there is none worth showing."""
        match self.default:
            case None | False:
                return ""
            case Path():
                return self.default.relative_to(PROJECT_ROOT).as_posix()
            case tuple():
                return " ".join(self.default)
            case Mapping():
                return ""
        return str(self.default)


def _to_setting(row: Field[Any]) -> Setting:
    kind, optional, choices = _read_annotation(row.type)
    meta = dict(row.metadata)
    flag, in_file, key, env = (meta.pop(name) for name in ("flag", "in_file", "key", "env"))
    return Setting(
        name=row.name,
        type=kind,
        optional=optional,
        choices=choices,
        default=row.default_factory(),  # type: ignore[operator]
        flag=f"--{row.name.replace('_', '-')}" if flag else None,
        key=(key or row.name) if in_file else None,
        env=env or None,
        **meta,
    )


def _read_annotation(annotation: Any) -> tuple[type, bool, tuple[str, ...]]:
    """Plain type, whether None is allowed, and the choices of a Literal."""
    if get_origin(annotation) is UnionType:
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
        return annotation, True, ()
    if get_origin(annotation) is Literal:
        return str, False, get_args(annotation)
    return get_origin(annotation) or annotation, False, ()


SETTINGS: tuple[Setting, ...] = tuple(_to_setting(row) for row in fields(Settings) if row.metadata)


class Given(NamedTuple):
    """A value that somebody set, and where: a flag, `settings.yaml: <key>` or a variable."""

    value: Any
    source: str


def load_settings(
    argv: Sequence[str], environ: Mapping[str, str], root: Path = PROJECT_ROOT
) -> Settings:
    """Merge all sources; `root` is where settings.yaml and extensions/ are looked for.

    `--help` and `--version` print and raise SystemExit(0). Raises SettingsError, which names the
    source and the field, and never repeats the value of a secret.
    """
    flags = read_flags(argv)
    chosen = flags["settings"].value if "settings" in flags else None
    path = chosen or root / "settings.yaml"
    document = read_document(path, required=bool(chosen))
    given = {**read_file(document, path), **flags, **read_environment(environ)}
    _check_tls(given)
    _check_url(given)
    _check_aliases(given)

    values = {name: entry.value for name, entry in given.items()}
    values["admin_key"] = values.get("admin_key") or values.get("api_key")
    values["extensions"] = _extensions(values)
    values["api"] = "openai" in values["extensions"]
    others = {key: value for key, value in document.items() if key not in _KEYS}
    params, unknown = _split_extension_keys(others, values["extensions"], root / "extensions")
    warnings = (
        *(f"{path.name}: {key} is not a known setting{_suggest(key, _KEYS)}" for key in unknown),
        *_unknown_variables(environ),
    )
    return Settings(**values, extension_params=params, warnings=warnings)


def read_flags(argv: Sequence[str]) -> dict[str, Given]:
    parsed, rest = build_parser().parse_known_args(argv)
    if rest:
        _refuse_argument(next((item for item in rest if item.startswith("-")), rest[0]))
    given = {}
    for row in SETTINGS:
        if row.flag and hasattr(parsed, row.name):
            value = getattr(parsed, row.name)
            if row.secret and not value.strip():  # an unset shell variable must not open the server
                raise SettingsError(f"{row.flag}: the key is empty")
            given[row.name] = Given(convert(row, value, row.flag, Path.cwd()), row.flag)
    return given


def read_document(path: Path, required: bool) -> dict[str, Any]:
    """The mapping in a YAML file; empty if there is no file and there need not be one."""
    if not required and not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path.name}: is not UTF-8 text") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{path.name}{_yaml_fault(error)}") from error
    if document is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1 if node else 1
        raise SettingsError(f"{path.name}, line {line}: expected lines of the form `key: value`")
    _check_repeats(node, path)
    return {str(key): value for key, value in document.items()}


def read_file(document: Mapping[str, Any], path: Path) -> dict[str, Given]:
    """A null counts as not set."""
    given = {}
    for row in SETTINGS:
        if row.key and document.get(row.key) is not None:
            source = f"{path.name}: {row.key}"
            given[row.name] = Given(convert(row, document[row.key], source, path.parent), source)
    return given


def read_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    """An empty variable counts as not set."""
    return {
        row.name: Given(convert(row, environ[row.env], row.env, Path.cwd()), row.env)
        for row in SETTINGS
        if row.env and environ.get(row.env)
    }


def convert(row: Setting, value: object, source: str, folder: Path) -> Any:
    """`value` as the row's type: a relative path is taken from `folder`, empty text can be None."""
    if row.optional and value == "":
        return None
    expected, to_type = _CONVERTERS[row.type]
    if row.type is tuple and not row.is_split:
        to_type = _to_items
    try:
        result = to_type(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        shown = "" if row.secret else f", not {value!r}"
        raise SettingsError(f"{source}: expected {expected}{shown}") from None
    if row.choices and result not in row.choices:
        raise SettingsError(f"{source}: expected one of {', '.join(row.choices)}, not {value!r}")
    if row.minimum is not None and result < row.minimum:
        raise SettingsError(f"{source}: must be at least {row.minimum}, not {value!r}")
    if row.maximum is not None and result > row.maximum:
        raise SettingsError(f"{source}: must be at most {row.maximum}, not {value!r}")
    return folder / result if row.type is Path else result


_SPELLINGS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def _to_bool(value: object) -> bool:
    try:
        return _SPELLINGS[str(value).strip().lower()]
    except KeyError:
        raise ValueError from None


def _to_int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _to_path(value: object) -> Path:
    text = _to_text(value)
    if not text or "\0" in text:
        raise ValueError
    return Path(text).expanduser()


def _to_names(value: object) -> tuple[str, ...]:
    names = (name for item in _to_items(value) for name in re.split(r"[,\s]+", item) if name)
    return tuple(dict.fromkeys(names))


def _to_items(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(item for item in map(_to_text, items) if item))


def _to_mapping(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise TypeError
    return MappingProxyType({_to_text(key): _to_text(entry) for key, entry in value.items()})


_CONVERTERS: dict[type, tuple[str, Callable[[object], Any]]] = {
    bool: ("true or false", _to_bool),
    int: ("a whole number", _to_int),
    float: ("a number", _to_float),
    str: ("text (put it in quotes)", _to_text),
    Path: ("a path", _to_path),
    tuple: ("a list of names", _to_names),
    Mapping: ("names and what they mean, as `name: meaning`", _to_mapping),
}


def _check_tls(given: Mapping[str, Given]) -> None:
    parts = [given.get(name, Given(None, "")) for name in ("ssl_keyfile", "ssl_certfile")]
    key, certificate = parts
    for part in parts:
        if part.value and not part.value.is_file():
            raise SettingsError(f"{part.source}: there is no file {part.value}")
    if key.value and not certificate.value:
        raise SettingsError(f"{key.source}: the certificate is missing, give --ssl-certfile too")
    if certificate.value and not key.value:
        raise SettingsError(f"{certificate.source}: the key is missing, give --ssl-keyfile too")
    public = given.get("public_api", Given(False, ""))
    if public.value and key.value:
        raise SettingsError(
            f"{public.source}: cannot be combined with {key.source}; the public URL has its own TLS"
        )


def _check_url(given: Mapping[str, Given]) -> None:
    url = given.get("sd_webui_url", Given(None, ""))
    if url.value and not _is_address(url.value):
        raise SettingsError(
            f"{url.source}: expected an address that begins with http:// or https://"
        )


def _check_aliases(given: Mapping[str, Given]) -> None:
    aliases = given.get("model_aliases", Given({}, ""))
    if chained := next((name for name in aliases.value.values() if name in aliases.value), None):
        raise SettingsError(f"{aliases.source}: {chained} is an alias itself, not a model")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address
        return False


def _extensions(values: Mapping[str, Any]) -> tuple[str, ...]:
    names: tuple[str, ...] = values.get("extensions", ())
    return (*names, "openai") if values.get("api") and "openai" not in names else names


def _split_extension_keys(
    others: Mapping[str, Any], loaded: Sequence[str], folder: Path
) -> tuple[Mapping[str, Mapping[str, Any]], list[str]]:
    """Extension parameters, and the keys that nothing claims."""
    folders = {entry.name for entry in folder.glob("*") if entry.is_dir()}
    names = sorted(folders.union(loaded) - {"openai"}, key=len, reverse=True)
    params: dict[str, dict[str, Any]] = {}
    unknown = []
    for key, value in others.items():
        owner = next((name for name in names if key.startswith(f"{name}-")), None)
        if owner:
            params.setdefault(owner, {})[key.removeprefix(f"{owner}-")] = value
        elif key not in _WEB_PAGE_KEYS:
            unknown.append(key)
    frozen = {name: MappingProxyType(entries) for name, entries in params.items()}
    return MappingProxyType(frozen), unknown


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = [row.env for row in SETTINGS if row.env]
    names = (name for name in environ if name.startswith("OPENEDAI_") and name not in known)
    return [f"environment: {name} is not a known variable{_suggest(name, known)}" for name in names]


def _check_repeats(node: yaml.MappingNode, path: Path) -> None:
    """YAML would let the last one win, far from where the user looks."""
    seen: set[str] = set()
    for key, _ in node.value:
        if str(key.value) in seen:
            line = key.start_mark.line + 1
            raise SettingsError(f"{path.name}, line {line}: {key.value} is set a second time")
        seen.add(str(key.value))


def _yaml_fault(error: Exception) -> str:
    """Where and what, without the line itself: it may hold a key."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return f"{where}: not valid YAML: {what}"


def _suggest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))


def build_parser() -> argparse.ArgumentParser:
    """The command line. It only splits: values are checked by `convert`, like those of the file."""
    parser = _Parser(
        prog="server.py",
        description="Serves a language model through an OpenAI compatible API.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=VERSION, help="Print the version.")
    for title in dict.fromkeys(row.group for row in SETTINGS if row.flag):
        group = parser.add_argument_group(title)
        for row in SETTINGS:
            if row.flag and row.group == title:
                _add_flag(group, row)
    return parser


def _add_flag(group: Any, row: Setting) -> None:
    group.add_argument(row.flag, dest=row.name, help=_flag_help(row), **_flag_shape(row))
    for alias, value in row.aliases.items():
        text = f"The same as {row.flag} {value}."
        group.add_argument(alias, dest=row.name, action="store_const", const=value, help=text)


def _flag_shape(row: Setting) -> dict[str, Any]:
    if row.type is bool:
        return {"action": "store_true"}
    if row.type is tuple:
        return {"action": "extend", "nargs": "+", "metavar": "NAME"}
    kinds = {int: "NUMBER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    return {"metavar": f"{{{','.join(row.choices)}}}" if row.choices else kinds[row.type]}


def _flag_help(row: Setting) -> str:
    notes = {
        "default": row.default_text,
        "settings.yaml": row.key if row.key != row.name else "",
        "environment": row.env,
    }
    shown = "; ".join(f"{name}: {value}" for name, value in notes.items() if value)
    return f"{row.help} ({shown})" if shown else row.help


def _epilog() -> str:
    lines = ["Settings without a flag, for settings.yaml:"]
    for row in SETTINGS:
        if not row.flag:
            text = f"{row.description} (environment: {row.env})" if row.env else row.description
            wrapped = textwrap.wrap(text, 74, break_on_hyphens=False)
            lines += [f"  {row.key}", *(f"      {line}" for line in wrapped)]
    return "\n".join(lines)


def _refuse_argument(argument: str) -> NoReturn:
    if not argument.startswith("-"):
        raise SettingsError(f"unexpected argument {argument!r}")
    flag = argument.partition("=")[0]
    reason = _FLAGS_OF_OTHERS.get(flag.replace("_", "-"))
    if reason:
        raise SettingsError(f"{flag} {reason}")
    known = [name for row in SETTINGS if row.flag for name in (row.flag, *row.aliases)]
    raise SettingsError(f"{flag} is not a known flag{_suggest(flag, known)}")


def explain_unknown(name: str, known: Iterable[str]) -> str:
    """What is wrong with a name that is none of `known`, as a sentence without its full stop."""
    reason = _FLAGS_OF_OTHERS.get(f"--{name.replace('_', '-')}")
    return f"{name} {reason}" if reason else f"{name} is not known{_suggest(name, known)}"


_KEYS: dict[str, Setting] = {row.key: row for row in SETTINGS if row.key}

# Keys of text-generation-webui's own settings.yaml that steer its web page.
_WEB_PAGE_KEYS = frozenset(
    """
    dark_theme show_controls start_with chat_style prompt-default prompt-notebook preset
    max_new_tokens max_new_tokens_min max_new_tokens_max negative_prompt seed
    mode truncation_length truncation_length_min truncation_length_max
    max_tokens_second max_updates_second
    custom_stopping_strings custom_token_bans auto_max_new_tokens ban_eos_token add_bos_token
    skip_special_tokens stream name2 custom_system_message autoload_model
    gallery-items_per_page gallery-open default_extensions
    """.split()  # noqa: SIM905
)

# Flags of text-generation-webui that have no meaning here, by the sentence that says so.
_FLAGS_OF_OTHERS: dict[str, str] = {
    f"--{flag}": reason
    for reason, flags in {
        "belongs to the llama.cpp loader; this server uses transformers": """
            n-gpu-layers n-ctx ctx-size threads threads-batch n-batch batch-size no-mul-mat-q
            no-mmap mlock tensor-split llama-cpp-seed numa no-offload-kqv row-split cache-capacity
            """,
        "belongs to the ExLlama loaders; this server uses transformers": """
            gpu-split max-seq-len cfg-cache no-flash-attn cache-8bit cache-4bit
            num-experts-per-token
            """,
        "belongs to the GPTQ and AWQ loaders; this server uses transformers": """
            wbits groupsize model-type pre-layer checkpoint monkey-patch triton desc-act
            no-inject-fused-mlp no-inject-fused-attention no-use-cuda-fp16 disable-exllama
            disable-exllamav2
            """,
        "belongs to DeepSpeed, which this server does not use": """
            deepspeed nvme-offload-dir local-rank
            """,
        "belongs to the web page; this server has none": """
            share auto-launch gradio-auth gradio-auth-path listen-port multi-user chat-buttons
            chat notebook model-menu
            """,
        "chooses between loaders; this server has one, transformers": "loader",
        "is not offered; the number type of the weights is chosen with --dtype": """
            use-double-quant compute-dtype quant-type
            """,
        "is not offered; a model runs on a card if there is one, see --cpu and --device-map": """
            auto-devices gpu-memory cpu-memory disk disk-cache-dir
            """,
        "is not offered yet": "multimodal-pipeline",
        "is not needed; it is decided when the model is loaded": """
            no-cache force-safetensors no-use-fast use-flash-attention-2 attn-implementation
            alpha-value rope-freq-base compress-pos-emb
            """,
    }.items()
    for flag in flags.split()
}
