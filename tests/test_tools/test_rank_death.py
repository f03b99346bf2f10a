"""One process of two dies or fails: the job ends soon and says which and why."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from tool_runs import NO_VAL, OPTIONS

FAILS = """
_base_ = {config!r}
custom_imports = dict(imports=['fails'], allow_failed_imports=False)
custom_hooks = [
    dict(type='CheckNonFiniteHook'), dict(type='PreemptionHook'), dict(type='Fails')
]
"""
HOOK = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Fails(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and runner.iter == 2:
            raise KeyError('a mistake in one process')
"""


def ranks(launcher):
    """Process ids of the ranks, which are torchrun's children."""
    found = {}
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            words = (entry / 'environ').read_bytes().split(b'\0')
            parent = int((entry / 'stat').read_text().rpartition(')')[2].split()[1])
            torchrun = (Path('/proc') / str(parent) / 'stat').read_text()
        except OSError:
            continue
        variables = dict(word.split(b'=', 1) for word in words if b'=' in word)
        grandparent = int(torchrun.rpartition(')')[2].split()[1])
        if b'LOCAL_RANK' in variables and grandparent == launcher:
            found[int(variables[b'LOCAL_RANK'])] = int(entry.name)
    return found


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc')
@pytest.mark.parametrize('rank', [0, 1])
def test_killed_rank_ends_the_job(start, config, tmp_path, rank):
    options = ['--work-dir', tmp_path / 'run', '--cfg-options', *NO_VAL, *OPTIONS]
    run = start('dist_train.sh', config, 2, *options)
    run.wait_for(r'Iter\(train\)')
    processes = ranks(run.process.pid)
    assert sorted(processes) == [0, 1], processes
    begin = time.monotonic()
    os.kill(processes[rank], signal.SIGKILL)
    status = run.end(60)
    assert status not in (0, 75), run.output[-4000:]
    assert time.monotonic() - begin < 30
    assert all(map(is_gone, processes.values()))
    # torchrun's report
    cause = run.output.rpartition('Root Cause')[2]
    assert re.search(rf'rank +: {rank} ', cause), cause
    assert f'Signal 9 (SIGKILL) received by PID {processes[rank]}' in cause


@pytest.mark.slow
def test_failing_rank_ends_the_job(start, config, tmp_path):
    (tmp_path / 'fails.py').write_text(HOOK)
    path = tmp_path / 'fails_config.py'
    path.write_text(FAILS.format(config=str(config)))
    options = ['--work-dir', tmp_path / 'run', '--cfg-options', *NO_VAL, *OPTIONS]
    python_path = f'{tmp_path}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    run = start('dist_train.sh', path, 2, *options, PYTHONPATH=python_path)
    run.wait_for('a mistake in one process')
    begin = time.monotonic()
    assert run.end(60) not in (0, 75), run.output[-4000:]
    assert time.monotonic() - begin < 30
    cause = run.output.rpartition('Root Cause')[2]
    assert re.search(r'rank +: 1 ', cause), cause
