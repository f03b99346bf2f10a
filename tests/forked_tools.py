"""Tools in processes that a server forks, which has imported the toolboxes once.

Starting Python and importing them takes longer than most runs of the tests. The
server is a process of its own, so that what a test did before, such as compiling, is
not forked.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from unittest import mock

from tool_process import environment_of, free_port
from tool_runs import Started

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(
    [
        'mmrest.launch',
        *(
            f'mmdet.{part}'
            for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization')
        ),
    ]
)


class Process:
    """One of multiprocessing's, in the words of ``subprocess.Popen``."""

    def __init__(self, *args):
        self._process = SERVER.Process(target=run_tool, args=args)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Forked(Started):
    """A tool that runs beside the test.

    With ``ranks`` there are so many processes of it, as torchrun starts them.
    """

    def __init__(self, repo, folder, tool, *args, ranks=1):
        self._path = self.new_path(folder)
        self._path.touch()
        words = [str(repo / 'tools' / tool), *map(str, args)]
        if ranks > 1:
            words += ['--launcher', 'pytorch']
        with mock.patch.dict(os.environ, environment_of(repo)):
            self.process = Process(words, str(folder), str(self._path), ranks)


def run_tool(words, folder, output, ranks):
    """Run a tool in this process, or in some that it forks."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = words
    if ranks > 1:
        become_a_rank(ranks)
    runpy.run_path(words[0], run_name='__main__')


def become_a_rank(count):
    """Fork the ranks, and return in each; if one fails, end the others."""
    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE=str(count)
    )
    children = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return
        children.append(pid)
    status = 0
    while children:
        pid, code = os.wait()
        children.remove(pid)
        if code and not status:
            status = os.waitstatus_to_exitcode(code)
            for child in children:
                os.kill(child, signal.SIGKILL)
    sys.exit(status)
