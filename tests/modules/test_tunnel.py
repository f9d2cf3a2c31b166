"""The tunnel against stand-ins for Cloudflare's program: small scripts that behave like it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from modules.errors import TunnelError
from modules.tunnel import Tunnel

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a `cloudflared` on the PATH that runs this Python code."""

    def write(code: str) -> None:
        path = tmp_path / "cloudflared"
        path.write_text(f"#!{sys.executable}\nimport os, sys, time\n{code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return write


def test_the_url_is_read_and_the_program_ends_with_the_tunnel(program, tmp_path) -> None:
    program(
        f"seen = open({str(tmp_path / 'seen')!r}, 'w')\n"
        "seen.write(f'{os.getpid()} {sys.argv[1:]}')\nseen.close()\n"
        "print('INF Requesting new quick Tunnel', file=sys.stderr)\n"
        "print('| https://some-words-here.trycloudflare.com |', file=sys.stderr, flush=True)\n"
        "while True:\n    print('INF' * 1000, file=sys.stderr)"  # more than a pipe holds
    )
    tunnel = Tunnel("http://127.0.0.1:5000")
    assert tunnel.open() == "https://some-words-here.trycloudflare.com"
    pid, arguments = (tmp_path / "seen").read_text().split(" ", 1)
    assert arguments == "['tunnel', '--no-autoupdate', '--url', 'http://127.0.0.1:5000']"
    tunnel.close()
    tunnel.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_named_tunnel(program) -> None:
    program(
        "assert sys.argv[-2:] == ['run', 'mine'], sys.argv\n"
        "print('INF Registered tunnel connection connIndex=0', file=sys.stderr, flush=True)\n"
        "time.sleep(60)"
    )
    tunnel = Tunnel("http://127.0.0.1:5000", "mine")
    assert tunnel.open() == "mine"
    tunnel.close()


def test_a_program_that_gives_up(program) -> None:
    program("sys.exit('ERR dial tcp: lookup api.trycloudflare.com: no such host')")
    with pytest.raises(TunnelError, match="cannot reach Cloudflare"):
        Tunnel("http://127.0.0.1:5000").open()


def test_a_program_that_says_nothing(program) -> None:
    program("time.sleep(60)")
    with pytest.raises(TunnelError, match="did not answer"):
        Tunnel("http://127.0.0.1:5000").open(timeout=0.2)
