"""Tools that run beside the test."""

import os
import re
import socket
import subprocess
import sys
import time

NO_VAL = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
# far more iterations than a test lets it make
OPTIONS = ['train_cfg.max_iters=100000', 'default_hooks.checkpoint.interval=100000']


class Started:
    """A tool as a process whose output goes into a file."""

    def __init__(self, repo, folder, tool, *args, **environment):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = str(probe.getsockname()[1])
        command = [str(repo / 'tools' / tool), *map(str, args)]
        if tool.endswith('.py'):
            command.insert(0, sys.executable)
        variables = dict(
            os.environ,
            PYTHON=sys.executable,
            PYTHONPATH=str(repo),
            PYTHONUNBUFFERED='1',
            OMP_NUM_THREADS='1',
            CUDA_VISIBLE_DEVICES='',
            PORT=port,
        )
        self._path = folder / 'output'
        with open(self._path, 'a') as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

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
    return [int(n) for n in re.findall(r'Iter\(train\) *\[ *(\d+)/', output)]
