"""A command that leaves a trace, and a web server of hostile files."""

import shlex
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
# payload_forms.py, toy_run.py, dirty_sandbox.py, tool_runs.py
for folder in (HERE, HERE.parent, TESTS / 'test_dirty_data', TESTS / 'test_tools'):
    sys.path.insert(0, str(folder))


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
