"""Entry: settings → Context → extensions → model → uvicorn. Builds everything, decides nothing."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from modules.errors import ServerError, SettingsError, TunnelError
from modules.settings import VERSION, Settings, load_settings
from modules.tunnel import Tunnel

if TYPE_CHECKING:
    from modules.models import LoadedModel, ModelManager

# Open streams may go on for this long after SIGTERM, in seconds.
SHUTDOWN_GRACE = 5


def main() -> int:
    try:
        settings = load_settings(sys.argv[1:], os.environ)
        run(settings)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    return 0


def run(settings: Settings) -> None:
    """Serve until a signal ends it. Raises ServerError when it cannot start."""
    if not settings.extensions:
        raise SettingsError("There is nothing to serve: start with --api.")
    _set_up_logging(settings)
    listener = _bind(settings)

    # Here and not above: torch takes seconds to load, and a wrong flag is known without it.
    from modules.context import Context
    from modules.extensions import load_extensions
    from modules.models import ModelManager

    app = FastAPI(title="Local OpenAI API", version=VERSION)
    manager = ModelManager(settings)
    load_extensions(Context(settings, manager, app))
    _load_model(manager, settings)
    tunnel = _build_tunnel(settings, listener) if settings.public_api else None
    try:
        _Server(app, settings, listener, tunnel).run(sockets=[listener])
    finally:
        if tunnel is not None:
            tunnel.close()
        manager.unload()


def _set_up_logging(settings: Settings) -> None:
    logging.basicConfig(
        level=logging.INFO if settings.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if settings.debug:
        print("OPENEDAI_DEBUG is on: prompts and replies are written to the console.")


def _bind(settings: Settings) -> socket.socket:
    """Take the port before anything slow happens, so that a taken one is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere the option lets two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.api_port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"Port {settings.api_port} on {settings.host} cannot be used ({error.strerror}). "
            "Choose another with --api-port."
        ) from error
    return listener


def _load_model(manager: ModelManager, settings: Settings) -> None:
    from modules.models import DEFAULT_MODEL, how_to_get_bundled

    if settings.model is None and DEFAULT_MODEL not in manager.list_names():
        print(f"No model: start with --model NAME. {how_to_get_bundled()}")
        return
    name = settings.model or DEFAULT_MODEL
    print(f"Loading {name}", flush=True)
    _describe(manager.load(name))


def _describe(model: LoadedModel) -> None:
    print(f"Model: {model.name}")
    print(f"Device: {model.device}, {model.dtype}")
    print(f"Context length: {model.max_model_len} tokens")
    print(f"Chat template: {model.chat_template.name} ({model.chat_template.reason})")


class _Server(uvicorn.Server):
    """uvicorn's, which says where it can be reached, once it can."""

    def __init__(
        self, app: FastAPI, settings: Settings, listener: socket.socket, tunnel: Tunnel | None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="info" if settings.verbose else "warning",
                access_log=settings.verbose,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
                timeout_graceful_shutdown=SHUTDOWN_GRACE,
            )
        )
        self._url = _read_url(settings, listener)
        self._tunnel = tunnel

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        print(f"OpenAI compatible API: {self._url}/v1", flush=True)
        if self._tunnel is not None:  # Cloudflare is far away; until then the local address works
            threading.Thread(target=_open_tunnel, args=(self._tunnel,), daemon=True).start()


def _read_url(settings: Settings, listener: socket.socket) -> str:
    """With the port that was taken, where any free one was asked for."""
    return replace(settings, api_port=listener.getsockname()[1]).base_url


def _build_tunnel(settings: Settings, listener: socket.socket) -> Tunnel:
    return Tunnel(_read_url(settings, listener), settings.public_api_id)


def _open_tunnel(tunnel: Tunnel) -> None:
    try:
        print(f"Public URL: {tunnel.open()}", flush=True)
    except TunnelError as error:
        print(f"No public URL: {error} Only the local address works.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
