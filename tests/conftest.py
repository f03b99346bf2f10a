"""Fixtures that all tests share."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
# so that tests can import weights_rule and the helpers of test_ops
sys.path[:0] = [str(TESTS), str(TESTS / 'test_ops')]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope='session')
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """The golden arrays and key lists."""
    return TESTS / 'data'


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of real images and reference files; not on a user's machine."""
    path = Path(os.environ.get('MMREST_SHARED', REPO.parent / 'shared'))
    if not (path / 'data').is_dir():
        pytest.skip(f'needs the real data of {path} (or set MMREST_SHARED)')
    return path


@pytest.fixture(scope='session')
def published_shapes(data_dir: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each published ImageNet checkpoint its keys and shapes."""
    text = (data_dir / 'imagenet_checkpoint_keys.json').read_text()
    return {
        arch: {key: tuple(shape) for key, shape in keys.items()}
        for arch, keys in json.loads(text).items()
    }


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope='session')
def free_ports():
    """Ports for launchers, one after the other."""
    return iter(free_port, None)


@pytest.fixture(scope='session')
def run(repo):
    """Run a tool as a process; the output of both streams comes back."""

    def run_tool(tool, *args, cwd, fails=False):
        command = [str(repo / 'tools' / tool), *map(str, args)]
        if tool.endswith('.py'):
            command.insert(0, sys.executable)
        variables = dict(
            os.environ,
            PYTHON=sys.executable,
            PYTHONPATH=str(repo),
            OMP_NUM_THREADS='1',
            CUDA_VISIBLE_DEVICES='',
            PORT=free_port(),  # two test runs may share the machine
        )
        done = subprocess.run(
            command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, output[-6000:]
        return output

    return run_tool


@pytest.fixture(scope='session')
def metrics():
    """The metrics that the last test run wrote into a work folder."""

    def read(work_dir):
        files = [p for p in work_dir.glob('*/*.json') if re.match(r'\d+_\d+', p.name)]
        return json.loads(max(files).read_text())

    return read
