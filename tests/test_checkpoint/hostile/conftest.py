"""A command that leaves a trace, and a web server of hostile files."""

import shlex
from pathlib import Path

import pytest


class Trace:
    """The command of a payload, and whether it was run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.command = f'touch {shlex.quote(str(path))}'

    @property
    def left(self) -> bool:
        return self.path.exists()


@pytest.fixture
def trace(tmp_path):
    trace = Trace(tmp_path / 'executed')
    yield trace
    assert not trace.left, 'the payload was executed'
