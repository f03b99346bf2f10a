"""Training processes that are killed or fail: what is left, and what is said."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from kill_checks import UNFINISHED, check_folder, check_same_state
from tool_runs import NO_VAL, OPTIONS, iterations

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc'),
]

INTERVAL = 3
# writing takes about as long as computing, so that many kills meet it
SLOW_DISK = """
import time
from mmengine.fileio import LocalBackend

def put(self, content, path):
    with open(path, 'wb') as file:
        for start in range(0, len(content), len(content) // 8):
            file.write(content[start : start + len(content) // 8])
            file.flush()
            time.sleep(0.05)

LocalBackend.put = put
"""
FAILS = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Fails(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 1 and runner.iter == 2:
            raise KeyError('a mistake in one process')
"""


def status_of(pid):
    """The fields after the name in /proc/PID/stat: state, parent and more."""
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()


def family(pid):
    """A process and its descendants; torchrun puts each into a session of its own."""
    parents = {}
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            parents[int(entry.name)] = int(status_of(entry.name)[1])
        except OSError:
            continue  # it has ended meanwhile
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def ranks(launcher):
    """Process ids of a launcher's ranks."""
    found = {}
    for pid in family(launcher):
        words = Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')
        variables = dict(word.split(b'=', 1) for word in words if b'=' in word)
        parent = int(status_of(pid)[1])
        if b'LOCAL_RANK' in variables and int(status_of(parent)[1]) == launcher:
            found[int(variables[b'LOCAL_RANK'])] = pid
    return found


def is_gone(pid):
    try:
        return status_of(pid)[0] == 'Z'
    except OSError:
        return True


def kill(run, count, delay):
    """Kill a run some time after so many iterations; it must not have ended before."""
    end = time.monotonic() + 300
    while len(iterations(run.output)) < count:
        assert run.process.poll() is None and time.monotonic() < end, run.output
        time.sleep(0.02)
    time.sleep(delay)
    assert run.process.poll() is None, run.output[-4000:]
    for pid in family(run.process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    run.process.wait()


@pytest.fixture
def with_module(config, tmp_path):
    """A config of the user that imports a module with this code."""

    def write(code, **fields):
        (tmp_path / 'extra_module.py').write_text(code)
        imports = dict(imports=['mmrest', 'extra_module'], allow_failed_imports=False)
        path = tmp_path / 'changed.py'
        fields = dict(fields, _base_=str(config), custom_imports=imports)
        path.write_text('\n'.join(f'{key} = {fields[key]!r}' for key in fields))
        return path

    return write


@pytest.mark.parametrize(('processes', 'kills', 'iters'), [(1, 6, 45), (2, 3, 24)])
def test_killed_again_and_again(fork, with_module, tmp_path, processes, kills, iters):
    config = with_module(SLOW_DISK)
    options = ['--no-preflight', '--resume', '--cfg-options', *NO_VAL]
    options += [f'train_cfg.max_iters={iters}', 'randomness.seed=7']
    saving = 'default_hooks.checkpoint'
    options += [f'{saving}.interval={INTERVAL}', f'{saving}.max_keep_ckpts=2']

    def train(folder):
        work_dir = ['--work-dir', folder]
        return fork('train.py', config, *work_dir, *options, ranks=processes)

    seed = random.randrange(2**32)
    rng = random.Random(seed)
    whole, folder = tmp_path / 'whole', tmp_path / 'run'
    assert train(whole).end() == 0
    lost_writes = 0
    for number in range(kills):
        moment = rng.randint(1, 4), rng.uniform(0, 0.5)
        print(f'seed {seed}, kill {number}: {moment}')
        kill(train(folder), *moment)
        check_folder(folder)
        lost_writes += len(list(folder.glob(UNFINISHED)))
    print(f'{lost_writes} of the kills were in the middle of a file')
    last = train(folder)
    assert last.end() == 0, last.output[-4000:]
    check_folder(folder)
    saved = check_same_state(folder / f'iter_{iters}.pth', whole / f'iter_{iters}.pth')
    assert len(saved['resume_state']['random_states']) == processes
    names = {path.name for path in folder.glob('iter*')}
    assert names == {f'iter_{iters - INTERVAL}.pth', f'iter_{iters}.pth'}
    assert not list(folder.glob(UNFINISHED))


def test_killed_rank_ends_the_job(start, config, tmp_path):
    """The first, which the others meet at; another one fails below."""
    options = ['--work-dir', tmp_path / 'run', '--cfg-options', *NO_VAL, *OPTIONS]
    run = start('dist_train.sh', config, 2, *options)
    run.wait_for(r'Iter\(train\)')
    processes = ranks(run.process.pid)
    assert sorted(processes) == [0, 1], processes
    begin = time.monotonic()
    os.kill(processes[0], signal.SIGKILL)
    assert run.end(60) not in (0, 75), run.output[-4000:]
    assert time.monotonic() - begin < 30
    assert all(map(is_gone, processes.values()))
    # torchrun's report
    cause = run.output.rpartition('Root Cause')[2]
    assert re.search(r'rank +: 0 ', cause), cause
    assert f'Signal 9 (SIGKILL) received by PID {processes[0]}' in cause


def test_failing_rank_ends_the_job(start, with_module, tmp_path):
    kinds = ('CheckNonFiniteHook', 'PreemptionHook', 'Fails')
    config = with_module(FAILS, custom_hooks=[dict(type=kind) for kind in kinds])
    options = ['--work-dir', tmp_path / 'run', '--cfg-options', *NO_VAL, *OPTIONS]
    run = start('dist_train.sh', config, 2, *options)
    run.wait_for('a mistake in one process')
    begin = time.monotonic()
    assert run.end(60) not in (0, 75), run.output[-4000:]
    assert time.monotonic() - begin < 30
    cause = run.output.rpartition('Root Cause')[2]
    assert re.search(r'rank +: 1 ', cause), cause
