"""Builds the package once, from a copy, so that the source tree stays clean."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

LEFT_OUT = shutil.ignore_patterns(
    '.git', '.venv*', '__pycache__', 'work_dirs', 'data', 'build', 'dist', '*.egg-info'
)


def clean_environ() -> dict:
    """The environment without what would make this checkout importable."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ('PYTHONPATH', 'PYTHONHOME')
    }


class Scratch:
    """A virtual environment that sees this one's libraries, but not its mmrest.

    This one's site-packages is put on the path by a .pth file, and Python does not
    read the .pth files (of an editable mmrest, say) in a folder added that way.
    """

    def __init__(self, folder: Path, libraries: bool = True):
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / 'bin' / 'python'
        self.site = folder / Path(
            sysconfig.get_path('purelib', vars={'base': str(folder)})
        ).relative_to(folder)
        self.libraries = self.site / 'libraries.pth'
        if libraries:
            self.show_libraries()

    def show_libraries(self):
        # pip removes the folder with the last package in it.
        self.site.mkdir(parents=True, exist_ok=True)
        self.libraries.write_text(sysconfig.get_path('purelib') + '\n')

    def pip(self, *args: str):
        """Runs this environment's pip on the scratch one, which has none."""
        # With the libraries hidden, so that pip takes nothing there for its own.
        self.libraries.unlink(missing_ok=True)
        command = [sys.executable, '-m', 'pip', '--python', str(self.python), *args]
        run(command)
        self.show_libraries()

    def run(self, *args: str, cwd: Path, check: bool = True):
        """Runs the scratch environment's Python."""
        return run([str(self.python), *args], cwd=cwd, check=check)


def run(command, cwd=None, check=True, **environ):
    """Runs a command and shows what it printed if it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean_environ(), **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope='session', name='run')
def run_fixture():
    """Returns the function that runs a command."""
    return run


@pytest.fixture(scope='session')
def source(repo: Path, tmp_path_factory) -> Path:
    """A copy of the source tree to build from."""
    copy = tmp_path_factory.mktemp('source') / 'mmrest'
    shutil.copytree(repo, copy, ignore=LEFT_OUT, symlinks=True)
    # `data` is left out above for its size, wherever it is only the users' own.
    shutil.copytree(repo / 'tests' / 'data', copy / 'tests' / 'data')
    return copy


@pytest.fixture(scope='session')
def build(source: Path, tmp_path_factory):
    """Returns a function: hook of the build backend, source -> the built file."""

    def call(hook: str, source: Path = source) -> Path:
        folder = tmp_path_factory.mktemp(hook)
        code = (
            'import sys; from setuptools import build_meta; '
            'getattr(build_meta, sys.argv[1])(sys.argv[2])'
        )
        run([sys.executable, '-c', code, hook, folder], cwd=source)
        (built,) = folder.iterdir()
        return built

    return call


@pytest.fixture(scope='session')
def wheel(build) -> Path:
    """The wheel, built from the source tree."""
    return build('build_wheel')


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    """An environment with everything but mmrest."""
    return Scratch(tmp_path / 'scratch')


@pytest.fixture
def bare(tmp_path: Path) -> Scratch:
    """An environment with nothing at all."""
    return Scratch(tmp_path / 'bare', libraries=False)
