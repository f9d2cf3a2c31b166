"""Extensions: finds `extensions/<name>/script.py`, imports it, applies the user's parameters, sets
it up, and runs its hooks.

Hooks are foreign code that may keep state and may take its time, so they have a thread of their own
in which one runs after the other. What becomes of what they return is the caller's business.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from modules.errors import ExtensionError, SettingsError
from modules.hooks import HOOKS, Hook, bind_hook, blame
from modules.settings import PROJECT_ROOT, Settings

if TYPE_CHECKING:
    from modules.context import Context

logger = logging.getLogger(__name__)

FOLDER = PROJECT_ROOT / "extensions"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Check = Callable[..., str | None]
"""Given the values that a hook has returned, what is wrong with them."""


@dataclass(frozen=True, slots=True)
class _Script:
    name: str
    module: ModuleType
    hooks: tuple[Hook, ...]


def load_extensions(settings: Settings, folder: Path = FOLDER) -> Extensions:
    """Import the extensions that the settings name, in that order, and apply their parameters.

    Raises ExtensionError, naming the extension: it is not there, cannot be imported, or has a hook
    that cannot be called.
    """
    return Extensions([_load(name, settings, folder) for name in settings.extensions])


class Extensions:
    """Each verb hands its work to the hooks' thread, and returns a future: to be awaited through
    `asyncio.wrap_future`, or waited for in any other thread but that of the hooks.

    The futures raise HookError, and the errors of this project that a hook has raised on purpose.
    """

    def __init__(self, scripts: Sequence[_Script] = ()) -> None:
        self._scripts = tuple(scripts)
        self._hooks = {
            name: [hook for script in scripts for hook in script.hooks if hook.name == name]
            for name in HOOKS
        }
        self._executor = ThreadPoolExecutor(1, "hooks")
        self.needs_state = any(
            hooks and "state" in HOOKS[name].parameters for name, hooks in self._hooks.items()
        )

    def set_up(self, context: Context) -> None:
        """Call the scripts' `setup`. Raises ExtensionError."""
        for script in self._scripts:
            setup = getattr(script.module, "setup", None)
            if setup is None:
                continue
            with _name_step(script.name, "set up"):
                setup(*[context] if inspect.signature(setup).parameters else [])

    def has(self, *hooks: str) -> bool:
        """Whether a script has one of them."""
        return any(self._hooks[hook] for hook in hooks)

    def chain(self, hook: str, *args: Any, check: Check | None = None) -> Future[Any]:
        """Pass the values among `args` through the hooks. Gives what they have become: of several
        values, a tuple.
        """
        return self.submit(self._chain, hook, args, check)

    def first(self, hook: str, *args: Any, **extras: Any) -> Future[Any]:
        """What the first hook says that does not return None; None if there is no such hook.

        A generator is to be run by `submit`.
        """
        return self.submit(self._first, hook, args, extras)

    def collect(
        self, hook: str, *args: Any, make_list: Callable[[], list[Any]] = list
    ) -> Future[list[tuple[str, Any]]]:
        """What the hooks put into a list, or return in one, each with its extension's name."""
        return self.submit(self._collect, hook, args, make_list)

    def submit(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Future[Result]:
        """Call `function` in the hooks' thread, after what is waiting there."""
        return self._executor.submit(function, *args, **kwargs)

    def _chain(self, name: str, args: tuple[Any, ...], check: Check | None) -> Any:
        place = HOOKS[name].values
        for hook in self._hooks[name]:
            result = hook(*args)
            is_tuple = len(args[place]) > 1 and isinstance(result, tuple | list)
            values = tuple(result) if is_tuple else (result,)
            hook.check(values)
            if check is not None and (reason := check(*values)):
                raise hook.fault(reason)
            args = (*args[: place.start], *values, *args[place.stop :])
        values = args[place]
        return values if len(values) > 1 else values[0]

    def _first(self, name: str, args: tuple[Any, ...], extras: dict[str, Any]) -> Any:
        for hook in self._hooks[name]:
            result = hook(*args, **extras)
            if result is not None:
                hook.check((result,))
                return _guard(hook, result) if isinstance(result, Generator) else result
        return None

    def _collect(
        self, name: str, args: tuple[Any, ...], make_list: Callable[[], list[Any]]
    ) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for hook in self._hooks[name]:
            items = make_list()
            result = hook(items, *args)
            items = items if result is None else result
            hook.check((items,))
            found += [(hook.extension, item) for item in items]
        return found


def _guard(hook: Hook, texts: Generator[Any, None, None]) -> Generator[str, None, None]:
    """The texts that a hook yields. Raises HookError."""
    with closing(texts), blame(hook.extension, hook.name):
        for text in texts:
            if not isinstance(text, str):
                raise hook.fault(f"it yielded a {type(text).__name__} where a str is expected")
            yield text


# Loading one


def _load(name: str, settings: Settings, folder: Path) -> _Script:
    module = _import_script(name, folder)
    _apply_params(module, name, settings)
    present = [hook for hook in HOOKS if getattr(module, hook, None) is not None]
    hooks = tuple(bind_hook(name, hook, getattr(module, hook)) for hook in present)
    return _Script(name, module, hooks)


def _import_script(name: str, folder: Path) -> ModuleType:
    path = folder / name / "script.py"
    if not path.is_file():
        raise ExtensionError(
            f"There is no extension {name}: extensions/{name}/script.py is missing."
        )
    spec = importlib.util.spec_from_file_location(f"extensions.{name}.script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _name_step(name, "imported", _advise(name, folder)):
        spec.loader.exec_module(module)
    return module


def _advise(name: str, folder: Path) -> str:
    if not (folder / name / "requirements.txt").is_file():
        return ""
    return f" Install what it needs with: pip install -r extensions/{name}/requirements.txt"


def _apply_params(module: ModuleType, name: str, settings: Settings) -> None:
    """Settings `<name>-<parameter>` override the entries of the script's `params`."""
    params = getattr(module, "params", {})
    if not isinstance(params, dict):
        raise ExtensionError(f"The extension {name}: params is no dict.")
    for key, value in settings.extension_params.get(name, {}).items():
        if key not in params:
            logger.warning("settings: the extension %s has no parameter %s.", name, key)
        params[key] = value


@contextmanager
def _name_step(extension: str, step: str, advice: str = "") -> Generator[None, None, None]:
    try:
        yield
    except SettingsError:  # it says itself what is wrong
        raise
    except Exception as error:  # foreign code may raise anything
        reason = f"{type(error).__name__}: {error}"
        advice = advice if isinstance(error, ImportError) else ""
        raise ExtensionError(
            f"The extension {extension} cannot be {step}: {reason}.{advice}"
        ) from error
