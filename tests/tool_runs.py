"""Tools within this process, and tools that run beside the test."""

import contextlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from unittest import mock

from mmengine.runner import CheckpointLoader
from mmengine.utils import ManagerMixin
from tool_process import command_of, environment_of

NO_VAL = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
# far more iterations than a test lets it make
OPTIONS = ['train_cfg.max_iters=100000', 'default_hooks.checkpoint.interval=100000']
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def forget_runs(kind=ManagerMixin):
    """Drop MMEngine's global loggers, scopes and visualizers of an earlier run."""
    kind._instance_dict.clear()
    for subclass in kind.__subclasses__():
        forget_runs(subclass)


@contextlib.contextmanager
def own_process():
    """Undo at the end what a tool changes in its process."""
    from pycocotools.coco import COCO  # not in every environment of the tests

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    loaders = dict(CheckpointLoader._schemes)
    folder, create_index = os.getcwd(), COCO.createIndex
    forget_runs()
    try:
        with mock.patch.dict(os.environ), mock.patch.object(sys, 'argv'):
            yield
    finally:
        forget_runs()
        os.chdir(folder)
        COCO.createIndex = create_index
        CheckpointLoader._schemes = loaders
        for number, handler in handlers.items():
            signal.signal(number, handler)


def call_tool(repo, tool, *args, cwd, fails=False):
    """Run a tool within this process; the output of both streams comes back."""
    output, status = io.StringIO(), None
    redirect = contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)
    with own_process(), redirect[0], redirect[1]:
        os.chdir(cwd)
        sys.argv = [tool, *map(str, args)]
        try:
            runpy.run_path(str(repo / 'tools' / tool), run_name='__main__')
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):
                print(status)
    assert bool(status) is fails, output.getvalue()[-6000:]
    return output.getvalue()


class Started:
    """A tool as a process whose output goes into a file of a folder.

    It imports what lies in that folder. ``variables`` are added to its environment.
    """

    def __init__(self, repo, folder, tool, *args, **variables):
        self._path = self.new_path(folder)
        environment = environment_of(repo)
        environment['PYTHONPATH'] += f'{os.pathsep}{folder}'
        with open(self._path, 'w') as file:
            self.process = subprocess.Popen(
                command_of(repo, tool, args),
                cwd=folder,
                env=dict(environment, PYTHONUNBUFFERED='1', **variables),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @staticmethod
    def new_path(folder):
        return folder / f'output{len(list(folder.glob("output*")))}'

    @property
    def output(self):
        return self._path.read_text()

    def wait_for(self, pattern, seconds=240):
        """Wait until the output has a line of this form."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            assert self.process.poll() is None, self.output[-4000:]
            assert time.monotonic() < end, self.output[-4000:]
            time.sleep(0.05)

    def end(self, seconds=240):
        """Wait for its status; more processes than it must not be left."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f'it hangs\n{self.output[-4000:]}') from None


def iterations(output):
    """The training iterations that a log names."""
    return [int(n) for n in re.findall(r'Iter\(train\) *\[ *(\d+)/', output)]
