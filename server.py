"""Entry: settings → Context → extensions → model → uvicorn. Builds everything, decides nothing."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import uvicorn
from fastapi import FastAPI

from modules.errors import ServerError, SettingsError, TunnelError
from modules.settings import VERSION, Settings, load_settings
from modules.tunnel import Tunnel

if TYPE_CHECKING:
    from modules.context import Context
    from modules.loaded_model import LoadedModel
    from modules.models import ModelManager

logger = logging.getLogger(__name__)

# For clients to read the end of their answers after a signal, in seconds.
SHUTDOWN_GRACE = 5


def main() -> int:
    try:
        settings = load_settings(sys.argv[1:], os.environ)
        run(settings)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:  # also what uvicorn raises once it has shut down after a Ctrl-C
        return 130
    return 0


def run(settings: Settings) -> None:
    """Serve until a signal ends it. Raises ServerError when it cannot start."""
    if not settings.extensions:
        raise SettingsError("There is nothing to serve: start with --api.")
    _set_up_logging(settings)
    _check_certificate(settings)
    listener = _bind(settings)
    # torch's threads wait for each other by spinning, on cores that something else may need just
    # then: this server's own event loop, for one. So they may for microseconds, not for ever. Read
    # when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

    # Here and not above: torch takes seconds to load, and a wrong flag is known without it.
    from modules.context import build_context
    from modules.extensions import load_extensions
    from modules.models import ModelManager

    app = FastAPI(title="Local OpenAI API", version=VERSION, docs_url=None, redoc_url=None)
    manager = ModelManager(settings)
    extensions = load_extensions(settings)
    context = build_context(settings, manager, app, extensions)
    extensions.set_up(context)
    _load_model(manager, settings)
    # From now on the log tells of each model that comes or goes.
    logging.getLogger(ModelManager.__module__).setLevel(logging.INFO)
    _Server(context, listener).run(sockets=[listener])


def _set_up_logging(settings: Settings) -> None:
    logging.basicConfig(
        level=logging.INFO if settings.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if settings.debug:
        print("OPENEDAI_DEBUG is on: prompts and replies are written to the console.")


def _check_certificate(settings: Settings) -> None:
    if settings.ssl_certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:  # ssl's own errors are such
        raise SettingsError(
            f"{settings.ssl_certfile} and {settings.ssl_keyfile} are no certificate with its key "
            f"in PEM format ({error})."
        ) from error


def _bind(settings: Settings) -> socket.socket:
    """Take the port before anything slow happens, so that a taken one is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere the option lets two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.api_port))
        listener.listen()  # two may bind the same port, but only one listens
    except OSError as error:
        listener.close()
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        advice = "Choose another with --api-port." if is_port else "See --listen-host."
        place = f"{settings.host}, port {settings.api_port}"
        raise SettingsError(f"Cannot listen on {place}: {error.strerror}. {advice}") from error
    return listener


def _load_model(manager: ModelManager, settings: Settings) -> None:
    from modules.model_files import DEFAULT_MODEL, how_to_get_bundled

    if not settings.model and DEFAULT_MODEL not in manager.list_names():
        print(f"No model: start with --model NAME. {how_to_get_bundled()}")
        return
    names = settings.model or (DEFAULT_MODEL,)
    print(f"Loading {', '.join(names)}", flush=True)
    asyncio.run(manager.load_all(names))
    for model in manager.loaded:
        _describe(model)


def _describe(model: LoadedModel) -> None:
    print(f"Model: {model.name}")
    print(f"Device: {model.device}, {model.dtype}")
    print(f"Context length: {model.max_model_len} tokens")
    print(f"Chat template: {model.chat_template.name} ({model.chat_template.reason})")


class _Server(uvicorn.Server):
    """uvicorn's, which says where it can be reached, and closes what was opened.

    It closes in `shutdown`, not after `run`: uvicorn ends by raising the signal that ended it.
    """

    def __init__(self, context: Context, listener: socket.socket) -> None:
        settings = context.settings
        super().__init__(
            uvicorn.Config(
                context.app,
                log_level="info" if settings.verbose else "warning",
                access_log=False,  # a URL may hold a key
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
                timeout_graceful_shutdown=SHUTDOWN_GRACE,
            )
        )
        # With the port that was taken, where any free one was asked for.
        self._url = replace(settings, api_port=listener.getsockname()[1]).base_url
        self._settings = settings
        self._context = context
        self._tunnel = Tunnel(self._url, settings.public_api_id) if settings.public_api else None
        self._services: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        _announce(self._url, self._settings)
        self._services = [asyncio.create_task(_serve(run)) for run in self._context.services]
        if self._tunnel is not None:  # Cloudflare is far away; until then the local address works
            threading.Thread(target=_open_tunnel, args=(self._tunnel,), daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tunnel is not None:
            self._tunnel.close()
        for service in self._services:
            service.cancel()
        await asyncio.gather(*self._services, return_exceptions=True)
        # Open generations end with a typed error, which their clients get to read.
        await asyncio.to_thread(self._context.close)
        await super().shutdown(sockets)


async def _serve(run: Callable[[], Awaitable[None]]) -> None:
    """One that fails ends alone; without its message, which may quote what it worked on."""
    try:
        await run()
    except Exception as error:
        logger.error("A service has ended: %s", type(error).__name__)


def _announce(url: str, settings: Settings) -> None:
    print(f"OpenAI compatible API: {url}/v1", flush=True)
    is_open = settings.host not in ("127.0.0.1", "::1", "localhost")
    if is_open:
        print(f"Listening on {settings.host}: other machines can reach it.", flush=True)
    if (is_open or settings.public_api) and settings.api_key is None:
        print("warning: whoever reaches it can use it; --api-key asks for a key.", file=sys.stderr)


def _open_tunnel(tunnel: Tunnel) -> None:
    try:
        print(f"Public URL: {tunnel.open()}", flush=True)
    except TunnelError as error:
        print(f"No public URL: {error} Only the local address works.", file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """At once if a model is still being loaded: nobody needs it any more, and neither its thread
    nor those of the libraries that it uses can be told.
    """
    if any(thread.name == "loading" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
