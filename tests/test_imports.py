"""The import direction: a file imports only from layers below its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from modules.settings import PROJECT_ROOT

# The first pattern that fits a module decides its layer.
LAYERS = (
    ("server", 5),
    ("download-model", 5),
    ("extensions.openai.typing", 0),
    ("extensions.", 4),
    ("modules.errors", 0),
    ("modules.settings", 1),
    ("modules.data_files", 1),
    ("modules.conversions", 1),
    ("modules.presets", 1),
    ("modules.instruction_templates", 1),
    ("modules.template_sandbox", 1),
    ("modules.characters", 1),
    ("modules.character_cards", 1),
    ("modules.engine.", 2),
    ("modules.detokenizer", 2),
    ("modules.gguf", 2),
    ("modules.", 3),
)
# Modules of one layer that work together.
SAME_LAYER_IS_FINE = {1, 2, 3, 4}
LIBRARIES = {
    "fastapi": {4, 5},
    "sse_starlette": {4, 5},
    "uvicorn": {5},
    "pydantic": {0, 4},
    "torch": {2, 3},
    "transformers": {2, 3},
}
TORCH_FREE = (
    "modules/engine/scheduler.py",
    "modules/engine/cache_manager.py",
    "modules/batch_queue.py",
)
ASYNCIO = (
    "modules/models.py",
    "modules/engine/async_engine.py",
    "modules/text_generation.py",
    "modules/extended_generation.py",
    "modules/written_replies.py",
    "modules/worker.py",
    "modules/storage.py",
    "modules/batch_worker.py",
    "modules/moderation.py",
    "modules/images.py",
    "modules/sd_webui.py",
    "modules/speech.py",
    "modules/transcription.py",
    "extensions/",
    "server.py",
)

FILES = sorted(
    path
    for pattern in ("*.py", "modules/**/*.py", "extensions/**/*.py")
    for path in PROJECT_ROOT.glob(pattern)
    if path.name not in ("__init__.py", "start.py")
)


def layer_of(module: str) -> int | None:
    return next((layer for prefix, layer in LAYERS if f"{module}.".startswith(prefix)), None)


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports when it runs; those for type checkers only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unchecked = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in unchecked:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PROJECT_ROOT).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    name = path.relative_to(PROJECT_ROOT).as_posix()
    own = layer_of(name.removesuffix(".py").replace("/", "."))
    assert own is not None
    for module in imports_of(path):
        layer = layer_of(module)
        if layer is not None:
            assert layer < own or (layer == own and own in SAME_LAYER_IS_FINE), module
            if own == 4:
                assert not module.startswith("extensions.") or module.split(".")[1] in name
        library = module.split(".")[0]
        assert own in LIBRARIES.get(library, {own}), f"{library} does not belong here"
        if library == "torch":
            assert name not in TORCH_FREE
        if library == "asyncio":
            assert name.startswith(ASYNCIO)
        assert library != "extensions" or own >= 4


def test_a_layer_is_known_for_every_file() -> None:
    assert layer_of("modules.engine.scheduler") == 2
    assert layer_of("extensions.openai.typing.Message") == 0
    assert layer_of("os.path") is None
