"""start.py itself, run in a miniature copy of the project with packages that need no network."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SERVER = """
import importlib.metadata, json, os, sys
print(json.dumps({
    "argv": sys.argv[1:],
    "cwd": os.getcwd(),
    "pid": os.getpid(),
    "prefix": sys.prefix,
    "python_path": os.environ.get("PYTHONPATH"),
    "packages": sorted(d.name for d in importlib.metadata.distributions() if "tiny" in d.name),
}))
sys.exit(3 if "--fail" in sys.argv else 0)
"""
PYTEST = """
import os, sys
print("pytest got", sys.argv[1:], "in", os.getcwd())
sys.exit(5)
"""


@pytest.fixture(scope="module")
def first_start(tmp_path_factory):
    """A project, and what its first start put out. Creating .venv is slow: tests work on copies."""
    root = tmp_path_factory.mktemp("start") / "project"
    root.mkdir()
    shutil.copy(ROOT / "start.py", root)
    (root / "server.py").write_text(SERVER)
    add_package(root, "tiny-core", "requirements.txt")
    add_package(root, "tiny-openai", "extensions/openai/requirements.txt")
    add_package(root, "tiny-other", "extensions/other/requirements.txt")
    add_package(root, "tiny-bundled", "models/bundled.txt", requires="absent")
    add_package(root, "pytest", "tests/requirements.txt", source=PYTEST)
    return root, start(root, "--listen", "--model", "a b")


@pytest.fixture
def project(first_start, tmp_path):
    return shutil.copytree(first_start[0], tmp_path / "project", symlinks=True)


@pytest.fixture
def new_project(first_start, tmp_path):
    without_venv = shutil.ignore_patterns(".venv*")
    return shutil.copytree(first_start[0], tmp_path / "project", ignore=without_venv)


def add_package(root, name, requirements_file, source="", requires=None):
    """A wheel in the project that `requirements_file` asks for by its path."""
    module = name.replace("-", "_")
    wheel = root / f"wheels/{module}-1.0-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    info = f"{module}-1.0.dist-info"
    dependency = f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{module}.py", source)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{dependency}"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    path = root / requirements_file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"./wheels/{wheel.name}\n")


def start(root, *arguments, prelude=None, **options):
    return popen(root, *arguments, prelude=prelude, **options).finish()


class Start(subprocess.Popen):
    """`python3 start.py ...` in a process; `finish` waits and leaves `output` and `returncode`."""

    def finish(self):
        try:
            self.output, _ = self.communicate(timeout=300)
        finally:
            self.kill()  # nothing happens to one that has ended
        assert "Traceback" not in self.output, self.output
        return self

    @property
    def installed(self):
        return re.findall(r"^Installing (\S+\.txt)$", self.output, re.M)

    @property
    def served(self):
        return json.loads(self.output.splitlines()[-1])


def popen(root, *arguments, prelude=None, environment=None, cwd=None):
    """`prelude` is Python that runs first in the same process, to change what start.py finds."""
    script = [str(root / "start.py")]
    if prelude:
        run = f"import runpy, sys; {prelude}; runpy.run_path(sys.argv[0], run_name='__main__')"
        script = ["-c", f"import sys; del sys.argv[0]; {run}", *script]
    return Start(
        [sys.executable, *script, *arguments],
        cwd=cwd or root,
        env={**os.environ, "PIP_NO_INDEX": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def break_pip(project):
    """From here on, every call of pip fails."""
    [pip] = project.glob(".venv/[Ll]ib/**/site-packages/pip")
    shutil.rmtree(pip)


def test_first_start_makes_the_environment_and_serves(first_start):
    root, run = first_start
    assert run.returncode == 0, run.output
    assert "Creating .venv" in run.output
    assert run.installed == ["requirements.txt", "models/bundled.txt"]
    assert run.served["argv"] == ["--listen", "--model", "a b"]
    assert Path(run.served["prefix"]) == root / ".venv"
    assert run.served["packages"] == ["tiny-bundled", "tiny-core"]


def test_second_start_installs_nothing(project):
    break_pip(project)
    run = start(project, "--model", "x")
    assert run.served["argv"] == ["--model", "x"]
    assert len(run.output.splitlines()) == 1


def test_only_changed_requirements_are_installed(project):
    add_package(project, "tiny-more", "requirements.txt")
    assert start(project, "install").installed == ["requirements.txt"]
    assert start(project).served["packages"] == ["tiny-bundled", "tiny-core", "tiny-more"]


@pytest.mark.parametrize(
    ("flags", "extensions"),
    [
        (["--api"], ["openai"]),
        (["--verbose", "--extensions", "other", "openai", "--listen"], ["other", "openai"]),
        (["--extensions", "other", "--api"], ["other", "openai"]),
        (["--extensions", "openai", "--api", "--extensions=other"], ["openai", "other"]),
        (["--extensions", "without_requirements"], []),
    ],
)
def test_extensions_asked_for_are_installed(project, flags, extensions):
    run = start(project, *flags)
    assert run.installed == [f"extensions/{name}/requirements.txt" for name in extensions]
    assert run.served["argv"] == flags


def test_install_stops_before_running(project):
    run = start(project, "install", "--api")
    assert run.returncode == 0
    assert run.installed == ["extensions/openai/requirements.txt"]
    assert "argv" not in run.output


def test_tests_run_with_everything_installed(project, tmp_path):
    run = start(project, "test", "-k", "x y", cwd=tmp_path)
    assert run.installed == [
        "extensions/openai/requirements.txt",
        "extensions/other/requirements.txt",
        "tests/requirements.txt",
    ]
    assert f"pytest got ['-k', 'x y'] in {project}" in run.output
    assert run.returncode == 5


def test_failed_installation_names_the_step_and_is_tried_again(project):
    requirements = project / "requirements.txt"
    good = requirements.read_text()
    requirements.write_text("absent-package==1.0\n")
    for _ in range(2):
        run = start(project, "--api")
        assert run.returncode == 1
        assert "Installing requirements.txt failed (exit code 1)" in run.output
        assert f"-r {requirements}" in run.output
        assert str(project / ".venv") in run.output
    requirements.write_text(good)  # what the failed one changed is not known
    assert "requirements.txt" in start(project).installed


def test_creation_that_was_cut_off_is_made_again(project):
    (project / ".venv/installed.json").unlink()
    break_pip(project)
    run = start(project)
    assert "Creating .venv" in run.output
    assert run.returncode == 0, run.output
    assert run.served["packages"] == ["tiny-bundled", "tiny-core"]


@pytest.mark.parametrize("stamp", ["", "[]", '{"python": "cpython-38", "requirements.txt": "x"}'])
def test_environment_of_another_python_is_made_again(project, stamp):
    (project / ".venv/installed.json").write_text(stamp)
    run = start(project, prelude="sys.modules['ensurepip'] = None")  # so that it stops there
    assert run.returncode == 1
    assert "create virtual environments" in run.output


def test_the_old_client_goes_into_a_folder_of_its_own(project):
    add_package(project, "tiny-old", "tests/openai-0.28.txt", requires="absent")
    run = start(project, "test")
    assert "tests/openai-0.28.txt" in run.installed
    assert (project / ".venv/openai-0.28/tiny_old.py").is_file()
    assert "tiny-old" not in start(project).served["packages"]


def test_download_passes_its_arguments_on(project, tmp_path):
    (project / "download-model.py").write_text("import sys; print('download', sys.argv[1:])")
    run = start(project, "download", "org/name", "--help", cwd=tmp_path)
    assert "download ['org/name', '--help']" in run.output


def test_exit_code_of_the_server_is_passed_on(project):
    assert start(project, "--fail").returncode == 3


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot replace a process")
def test_signals_reach_the_server(project):
    run = start(project)
    assert run.served["pid"] == run.pid


def test_server_runs_in_the_folder_of_the_user_without_foreign_packages(project, tmp_path):
    run = start(project, cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert run.served["cwd"] == str(tmp_path)
    assert run.served["python_path"] is None


def test_two_starts_at_once_install_once(project):
    add_package(project, "tiny-more", "requirements.txt")
    starts = [popen(project), popen(project)]
    runs = [process.finish() for process in starts]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum((run.installed for run in runs), []) == ["requirements.txt"]
    assert all("tiny-more" in run.served["packages"] for run in runs)


def test_help_installs_nothing(new_project):
    run = start(new_project, "--help")
    assert run.returncode == 0
    assert "start.py install" in run.output
    assert "README.md" in run.output
    assert not (new_project / ".venv").exists()


def test_help_of_the_server_follows(project):
    run = start(project, "--help")
    assert "start.py install" in run.output
    assert run.served["argv"] == ["--help"]


def test_old_python_is_refused_in_one_line(new_project):
    run = start(new_project, prelude="sys.version_info = (3, 8, 1, 'final', 0)")
    assert run.returncode == 1
    assert "Python 3.11 or newer is needed" in run.output
    assert len(run.output.splitlines()) == 1
    ast.parse((ROOT / "start.py").read_text(), feature_version=(3, 8))


def test_missing_ensurepip_names_the_package(new_project):
    run = start(new_project, prelude="sys.modules['ensurepip'] = None")
    assert run.returncode == 1
    assert f"python3.{sys.version_info.minor}-venv" in run.output
    assert not (new_project / ".venv").exists()


def test_every_requirement_is_pinned_and_no_two_pins_disagree():
    files = [*ROOT.glob("requirements.txt"), *ROOT.glob("*/*/requirements.txt")]
    files += [ROOT / "tests/requirements.txt", ROOT / "models/bundled.txt"]
    lines = [line.split("#")[0].strip() for path in files for line in path.read_text().splitlines()]
    pins = [line.split("==") for line in set(lines) if line]
    assert all(len(pin) == 2 for pin in pins), pins
    names = [re.sub(r"[-_.]+", "-", name).lower() for name, _ in pins]
    assert sorted(names) == sorted(set(names))
