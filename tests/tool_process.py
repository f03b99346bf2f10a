"""How the tests start a tool of this repository as a process of its own."""

import os
import socket
import sys
from pathlib import Path

SITE = Path(__file__).parent / 'process_site'


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def command_of(repo, tool, args):
    """The words of a command; ``tool`` is a path in ``tools/``."""
    command = [str(repo / 'tools' / tool), *map(str, args)]
    return [sys.executable, *command] if tool.endswith('.py') else command


def environment_of(repo):
    """This process's environment, one thread, no GPU, and a port of its own."""
    return dict(
        os.environ,
        PYTHON=sys.executable,
        PYTHONPATH=f'{repo}{os.pathsep}{SITE}',
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='',
        PORT=free_port(),  # two test runs may share the machine
    )
