"""Tools that run beside the test."""

import re
import subprocess
import time

from tool_process import command_of, environment_of

NO_VAL = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
# far more iterations than a test lets it make
OPTIONS = ['train_cfg.max_iters=100000', 'default_hooks.checkpoint.interval=100000']


class Started:
    """A tool as a process whose output goes into a file."""

    def __init__(self, repo, folder, tool, *args, **environment):
        self._path = folder / 'output'
        with open(self._path, 'a') as file:
            self.process = subprocess.Popen(
                command_of(repo, tool, args),
                cwd=folder,
                env=environment_of(repo) | dict(PYTHONUNBUFFERED='1') | environment,
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
