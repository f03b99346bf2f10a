"""The tools on a system that lacks what Windows lacks."""

import subprocess
import sys

import pytest
from tool_process import environment_of
from tool_runs import NO_VAL, iterations

# The libraries come first: on Windows they have other code for themselves.
CODE = """
import runpy, signal, sys
import mmengine.hub, mmengine.runner, timm, torch.distributed.fsdp
from mmdet import datasets, engine, evaluation, models, visualization
for name in ('fcntl', 'grp', 'pwd', 'termios'):
    sys.modules[name] = None
for name in ('SIGALRM', 'SIGHUP', 'SIGKILL', 'SIGUSR1', 'SIGUSR2', 'siginterrupt'):
    delattr(signal, name)
import mmrest.timm, mmrest.weights
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
def test_a_training(repo, config, tmp_path):
    words = [str(repo / 'tools' / 'train.py'), str(config), '--cfg-options']
    done = subprocess.run(
        [sys.executable, '-c', CODE, *words, 'train_cfg.max_iters=1', *NO_VAL],
        cwd=tmp_path,
        env=environment_of(repo),
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert iterations(output) == [1]
