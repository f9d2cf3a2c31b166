"""The README against the code: settings, routes and files, in both directions."""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import pytest
from fastapi import FastAPI

from extensions.openai.typing import (
    MAX_INT,
    MAX_MAGNITUDE,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationOptions,
    ImageEditRequest,
    ImageVariationRequest,
)
from modules.context import build_context
from modules.extensions import FOLDER, load_extensions
from modules.hooks import HOOKS
from modules.models import ModelManager
from modules.settings import PROJECT_ROOT, SETTINGS, Setting, Settings
from tests.conftest import LoadScripts, connect
from tests.fakes import FakeEngine

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")


def settings_row(setting: Setting) -> str:
    """How the README's table shows a setting."""

    def code(text: str | None) -> str:
        return f"`{text}`" if text else ""

    default = "see there" if "\n" in setting.default_text else code(setting.default_text)
    names = " | ".join((code(setting.flag), code(setting.key), code(setting.env)))
    return f"| {names} | {default} | {setting.description.replace('|', chr(92) + '|')} |"


def test_the_table_of_settings_is_that_of_the_code() -> None:
    _, _, table = README.partition("| Flag | Key")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    assert rows == [settings_row(setting) for setting in SETTINGS]


def parameter_rows() -> dict[str, str]:
    """How the README's tables show the fields of a completion, beside its prompt."""
    properties = (
        CompletionRequest.model_json_schema()["properties"]
        | GenerationOptions.model_json_schema()["properties"]
    )
    del properties["prompt"]
    return {name: parameter_row(name, schema) for name, schema in properties.items()}


def parameter_row(name: str, schema: dict[str, Any]) -> str:
    default = schema.get("default")
    shown = f"`{json.dumps(default)}`" if default or isinstance(default, int | float) else ""
    description = schema["description"].replace("|", chr(92) + "|")
    return f"| `{name}` | {shown} | {describe_values(schema)} | {description} |"


def describe_values(schema: dict[str, Any]) -> str:
    """In words: a type, and a range where it is narrower than what arithmetic can bear."""
    match schema:
        case {"anyOf": options}:
            described = [describe_values(option) for option in options]
            return " or ".join(text for text in described if text)
        case {"type": "null"}:
            return ""
        case {"format": "binary"} | {"items": {"format": "binary"}}:
            return "file"
        case {"type": "array"}:
            return "list"
        case {"enum": values}:
            return ", ".join(values)
        case {"type": "string"}:
            return "text"
        case {"type": "boolean"}:
            return "true, false"
        case {"type": "integer" | "number" as kind}:
            return describe_range(schema, "number" if kind == "number" else "integer")
    return "object"


def describe_range(schema: dict[str, Any], kind: str) -> str:
    low = schema.get("minimum", 0)
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low <= -MAX_MAGNITUDE:
        return kind
    start = "above 0" if low == 1 / MAX_MAGNITUDE else f"from {low}"
    if high in (MAX_INT, MAX_MAGNITUDE):
        return f"{kind} {start}"
    return f"{kind} {start} {'to' if 'maximum' in schema else 'to below'} {high}"


def read_rows(title: str) -> list[str]:
    """Of the tables in a section."""
    section = README.partition(f"### {title}\n")[2]
    section = re.split(r"\n##", section)[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


def test_the_tables_of_parameters_are_those_of_the_code() -> None:
    assert sorted(read_rows("Parameters")) == sorted(parameter_rows().values())


def chat_rows() -> list[str]:
    """The fields that only chats have, in the order of the code."""
    properties = ChatCompletionRequest.model_json_schema()["properties"]
    own = properties.keys() - GenerationOptions.model_fields.keys()
    return [parameter_row(name, properties[name]) for name in properties if name in own]


def test_the_table_of_a_chats_fields_is_that_of_the_code() -> None:
    assert read_rows("Fields of a chat") == chat_rows()


def image_rows() -> list[str]:
    """Those of an edit, in the order of the code; a generation has some of them."""
    properties = ImageEditRequest.model_json_schema()["properties"]
    assert properties.keys() >= ImageVariationRequest.model_json_schema()["properties"].keys()
    return [parameter_row(name, schema) for name, schema in properties.items()]


def test_the_table_of_an_images_fields_is_that_of_the_code() -> None:
    assert read_rows("Fields of an image") == image_rows()


@pytest.fixture(scope="module")
def routes() -> set[str]:
    settings = Settings(api=True, extensions=("openai",))
    app = FastAPI()
    extensions = load_extensions(settings)
    extensions.set_up(build_context(settings, ModelManager(settings), app, extensions))
    return {
        f"{method.upper()} {re.sub(r'{[a-z_]+}', '{id}', path)}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }


def test_every_route_is_in_the_readme_and_the_reverse(routes: set[str]) -> None:
    documented = set(re.findall(r"`((?:GET|POST|PUT|DELETE) /\S+)`", README))
    assert documented - {"GET /docs"} == routes


def test_the_table_of_hooks_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)\((.*)\)` \| (\w+) \|", README, re.MULTILINE)
    assert rows == [(name, hook.signature, hook.verb) for name, hook in HOOKS.items()]


def test_the_table_of_extensions_is_that_of_the_code() -> None:
    _, _, table = README.partition("| Extension |")
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", table.partition("\n\n")[0], re.MULTILINE)
    names = {path.parent.name for path in FOLDER.glob("*/script.py")} - {"openai"}
    assert {name for name, _ in rows} == names
    for name, params in rows:
        script = importlib.import_module(f"extensions.{name}.script")
        assert params == ", ".join(f"`{param}`" for param in script.params)


@pytest.mark.anyio
async def test_the_extension_of_the_readme(load: LoadScripts, engine: FakeEngine) -> None:
    (text,) = re.findall(
        r"^```python\n# extensions/shout/script.py\n(.*?)^```$", README, re.M | re.S
    )
    engine.enqueue("yes")
    async with connect(load({"shout": {"mark": "?!"}}, shout=text)) as client:
        answer = await client.post("/v1/completions", json={"prompt": "Really"})
    assert answer.json()["choices"][0]["text"] == "YES"
    assert bytes(engine.requests[0].prompt_token_ids) == b"Really?!"


def test_every_module_is_on_the_map() -> None:
    folders = ("modules", "modules/engine", "extensions/openai")
    files = [path for folder in folders for path in (PROJECT_ROOT / folder).glob("*.py")]
    missing = [
        path.name
        for path in files
        if path.name not in ("__init__.py", "outputs.py") and f"{path.name}`" not in README
    ]
    assert missing == []


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"`((?:modules|extensions|models|tests)/[\w/.-]+)`", README))
    expected_later = {"models/.converted", "models/config-user.yaml", "models/voices"}
    gone = [name for name in named - expected_later if not (PROJECT_ROOT / name).exists()]
    assert gone == []
