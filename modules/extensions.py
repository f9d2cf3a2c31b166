"""Finds `extensions/<name>/script.py`, imports it, applies the user's parameters, sets it up."""

from __future__ import annotations

import importlib
import inspect
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from modules.errors import ExtensionError
from modules.settings import PROJECT_ROOT

if TYPE_CHECKING:
    from modules.context import Context

logger = logging.getLogger(__name__)


def load_extensions(context: Context) -> tuple[ModuleType, ...]:
    """Load the extensions that the settings name, in that order.

    Raises ExtensionError, naming the extension: it is not there, cannot be imported, or its setup
    fails.
    """
    modules = []
    for name in context.settings.extensions:
        module = _import_script(name)
        _apply_params(module, name, context)
        _set_up(module, context)
        modules.append(module)
    return tuple(modules)


def _import_script(name: str) -> ModuleType:
    if not (PROJECT_ROOT / "extensions" / name / "script.py").is_file():
        raise ExtensionError(
            f"There is no extension {name}: extensions/{name}/script.py is missing."
        )
    try:
        return importlib.import_module(f"extensions.{name}.script")
    except ImportError as error:
        requirements = Path("extensions") / name / "requirements.txt"
        advice = (
            f" Install what it needs with: pip install -r {requirements.as_posix()}"
            if (PROJECT_ROOT / requirements).is_file()
            else ""
        )
        raise ExtensionError(
            f"The extension {name} cannot be imported: {error}.{advice}"
        ) from error


def _apply_params(module: ModuleType, name: str, context: Context) -> None:
    """Settings `<name>-<parameter>` override the entries of the script's `params`."""
    params = getattr(module, "params", {})
    for key, value in context.settings.extension_params.get(name, {}).items():
        if key not in params:
            logger.warning("settings: the extension %s has no parameter %s.", name, key)
        params[key] = value


def _set_up(module: ModuleType, context: Context) -> None:
    setup = getattr(module, "setup", None)
    if setup is None:
        return
    if inspect.signature(setup).parameters:
        setup(context)
    else:
        setup()
