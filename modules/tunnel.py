"""Tunnel: a public URL for a port of this machine, through Cloudflare's own program, cloudflared.

Owns that process. The program is the one on the PATH, or the one that pycloudflared downloads.
"""

from __future__ import annotations

import contextlib
import platform
import queue
import re
import shutil
import subprocess
import threading
from pathlib import Path

from modules.errors import TunnelError

OPEN_TIMEOUT = 30.0
"""Seconds until Cloudflare must have answered."""
QUICK_URL = re.compile(r"https://[-\w.]+\.trycloudflare\.com")
NAMED_TUNNEL_IS_UP = re.compile(r"Registered tunnel connection")


class Tunnel:
    def __init__(self, local_url: str, tunnel_id: str | None = None) -> None:
        """`tunnel_id`: a named tunnel of the user's account; None: a new one with a random URL."""
        self._command = ["tunnel", "--no-autoupdate", "--url", local_url]
        if tunnel_id is not None:
            self._command += ["run", tunnel_id]
        self._tunnel_id = tunnel_id
        self._process: subprocess.Popen[str] | None = None

    def open(self, timeout: float = OPEN_TIMEOUT) -> str:
        """The public URL, or the id of a named tunnel, once it is up.

        Raises TunnelError: there is no program for this machine, or Cloudflare cannot be reached.
        """
        self._process = subprocess.Popen(
            [_find_program(), *self._command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # The program writes on for as long as it runs, and stops when nobody reads.
        threading.Thread(target=_read_lines, args=(self._process, lines), daemon=True).start()
        sign = QUICK_URL if self._tunnel_id is None else NAMED_TUNNEL_IS_UP
        try:
            while (line := lines.get(timeout=timeout)) is not None:
                if found := sign.search(line):
                    return self._tunnel_id or found[0]
        except queue.Empty:
            self.close()
            raise TunnelError(f"Cloudflare did not answer within {timeout:.0f} s.") from None
        raise TunnelError("cloudflared ended without opening a tunnel: it cannot reach Cloudflare.")

    def close(self) -> None:
        """End the process; idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _find_program() -> str:
    return shutil.which("cloudflared") or _download_program()


def _download_program() -> str:
    try:
        from pycloudflared.util import Info, download, remove_executable
    except ImportError as error:
        raise TunnelError("The public URL needs: pip install pycloudflared") from error
    machine = platform.machine()
    try:
        # The package's table has ARM Linux under the other of its two names.
        info = Info(platform.system(), "arm64" if machine == "aarch64" else machine)
    except RuntimeError as error:
        raise TunnelError(f"There is no cloudflared for this machine: {error}") from error
    if Path(info.executable).exists():
        return str(info.executable)
    try:
        return str(download(info))
    except OSError as error:
        with contextlib.suppress(OSError):
            remove_executable(info)  # half of a program counts as one to the package
        raise TunnelError(f"cloudflared cannot be downloaded: {error}") from error


def _read_lines(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        lines.put(line)
    lines.put(None)
