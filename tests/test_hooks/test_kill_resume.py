"""A run that is killed while it writes loses nothing and ends as if it had not been.

The processes come from a server that has imported everything, so that one takes a
second. ``test_tools/test_kill_resume.py`` kills the tools from outside.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import kill_runs
import pytest
import torch
from kill_checks import (
    UNFINISHED,
    check_folder,
    check_same_state,
    needs_past_data,
    same,
)

from mmrest.checkpoint import CheckpointError, read_checkpoint

LAST = f'iter_{kill_runs.ITERS}.pth'
KILLED = -signal.SIGKILL


@pytest.fixture(scope='module')
def start():
    """Start a function of ``kill_runs`` in a process."""
    context = multiprocessing.get_context('forkserver')
    # with what a Runner imports when it starts
    modules = ['mmrest', 'mmengine.runner', 'torchvision', 'matplotlib.pyplot']
    context.set_forkserver_preload(modules)

    started = []

    def start_process(function, *args, **kwargs):
        process = context.Process(target=function, args=args, kwargs=kwargs)
        process.start()
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()  # after a failed test


@pytest.fixture(scope='module')
def call(start):
    """Run a function of ``kill_runs`` in a process; its exit code."""

    def wait_for(function, *args, **kwargs):
        process = start(function, *args, **kwargs)
        process.join(120)
        assert process.exitcode is not None, 'the process hangs'
        return process.exitcode

    return wait_for


@pytest.fixture(scope='module')
def undisturbed(call, tmp_path_factory):
    """The work folder of a whole run, and the names of what it did to the disk."""
    folder = tmp_path_factory.mktemp('undisturbed')
    names = folder / 'steps.txt'
    assert call(kill_runs.train, folder / 'run', names=names) == 0
    return folder / 'run', names.read_text().splitlines()


def check_same_end(work_dir, reference, last=LAST):
    ours = check_same_state(work_dir / last, reference / last)
    # nothing left over, neither half files nor outdated ones
    latest = {
        p.name for p in work_dir.iterdir() if p.name.startswith(('iter', 'epoch'))
    }
    assert latest == {last}
    assert not list(work_dir.glob(UNFINISHED))
    best = list(work_dir.glob('best_*'))
    named = ours['message_hub']['runtime_info'].get('best_ckpt')
    assert named is None or str(best[0]) == named and len(best) == 1


def kill_and_resume(call, work_dir, undisturbed, fatal):
    reference, steps = undisturbed
    print(f'killed at step {fatal} of {len(steps)}: {steps[fatal - 1]}')
    assert call(kill_runs.train, work_dir, fatal) == KILLED
    check_folder(work_dir)
    assert call(kill_runs.train, work_dir) == 0
    check_folder(work_dir)
    check_same_end(work_dir, reference)


def test_steps_are_what_they_should_be(undisturbed):
    """In this order: the file, the pointer to it, the removal of the one before."""
    folder, steps = undisturbed
    start = steps.index('begin iter_4.pth.mmrest-unfinished')
    second = [step for step in steps[start:] if step != 'before fsync']
    assert second[:8] == [
        'begin iter_4.pth.mmrest-unfinished',
        'half iter_4.pth.mmrest-unfinished',
        'before rename to iter_4.pth',
        'after rename to iter_4.pth',
        'before rename to last_checkpoint',
        'after rename to last_checkpoint',
        'before removal of iter_2.pth',
        'after removal of iter_2.pth',
    ]
    at = steps.index('before rename to iter_4.pth')
    assert steps[at - 1] == 'before fsync' and steps[at + 2] == 'before fsync'
    assert (folder / 'last_checkpoint').read_text() == str(folder / LAST)
    assert any(step.startswith('after rename to best_') for step in steps)


# the steps around the second checkpoint and the best one before it
CHOSEN = [
    'begin best_val_loss_iter_2.pth.mmrest-unfinished',
    'half best_val_loss_iter_2.pth.mmrest-unfinished',
    'after rename to best_val_loss_iter_2.pth',
    'half iter_4.pth.mmrest-unfinished',
    'before rename to iter_4.pth',
    'after rename to iter_4.pth',
    'before removal of iter_2.pth',
]


@pytest.mark.parametrize('name', CHOSEN)
def test_kill_at_a_step(call, undisturbed, tmp_path, name):
    fatal = undisturbed[1].index(name) + 1
    kill_and_resume(call, tmp_path, undisturbed, fatal)


@pytest.mark.slow
def test_kill_at_any_step(call, undisturbed, tmp_path):
    seed = random.randrange(2**32)
    print(f'seed {seed}')
    steps = range(1, len(undisturbed[1]) + 1)
    for fatal in random.Random(seed).sample(steps, 20):
        kill_and_resume(call, tmp_path / str(fatal), undisturbed, fatal)


def test_kill_again_and_again(call, undisturbed, tmp_path):
    """Killed at each new start, at a random step of those that are left."""
    seed = random.randrange(2**32)
    print(f'seed {seed}')
    rng = random.Random(seed)
    kills = 0
    while kills < 4:
        exitcode = call(kill_runs.train, tmp_path, rng.randint(2, 14))
        check_folder(tmp_path)
        if exitcode == 0:
            break
        assert exitcode == KILLED
        kills += 1
    assert kills
    assert call(kill_runs.train, tmp_path) == 0
    check_same_end(tmp_path, undisturbed[0])


def test_mmengines_own_hook_fails_here(call, tmp_path):
    """That the checks above can fail: its file is left half written."""
    hook = dict(type='CheckpointHook')
    assert call(kill_runs.train, tmp_path, 6, validate=False, hook=hook) == KILLED
    with pytest.raises(CheckpointError, match=r'iter_4\.pth is not a usable'):
        check_folder(tmp_path)


def test_two_processes(start, tmp_path):
    """The first is killed while it writes, the second by the launcher."""

    def train(name, work_dir, fatal=None):
        rendezvous = tmp_path / name
        return [
            start(kill_runs.train_distributed, rank, rendezvous, work_dir, fatal)
            for rank in range(2)
        ]

    def finish(processes):
        for process in processes:
            process.join(120)
            assert process.exitcode == 0

    finish(train('a', tmp_path / 'whole'))
    first, second = train('b', tmp_path / 'run', fatal=24)
    first.join(120)
    assert first.exitcode == KILLED
    second.kill()
    second.join(120)
    check_folder(tmp_path / 'run')
    finish(train('c', tmp_path / 'run'))
    check_same_end(tmp_path / 'run', tmp_path / 'whole')
    states = read_checkpoint(tmp_path / 'run' / LAST)['resume_state']['random_states']
    assert len(states) == 2 and not same(states[0], states[1])


@pytest.mark.parametrize(
    ('workers', 'epochs'),
    [
        pytest.param(0, False, id='0-iterations'),
        pytest.param(0, True, id='0-epochs'),
        pytest.param(2, False, id='2-iterations', marks=needs_past_data),
        pytest.param(2, True, id='2-epochs'),
    ],
)
def test_data_and_random_numbers_continue(call, tmp_path, workers, epochs):
    """Killed between checkpoints; eight images make four iterations an epoch."""
    kwargs = dict(validate=False, workers=workers, epochs=epochs)
    reference, run = tmp_path / 'whole', tmp_path / 'run'
    assert call(kill_runs.train, reference, **kwargs) == 0
    assert call(kill_runs.train_until, run, 6 if epochs else 3, **kwargs) == KILLED
    assert call(kill_runs.train, run, **kwargs) == 0
    check_same_end(run, reference, 'epoch_3.pth' if epochs else LAST)


def test_without_random_states_the_end_is_another(call, tmp_path):
    """That the test above can fail: as with a checkpoint of MMEngine's hook."""
    reference, run = tmp_path / 'whole', tmp_path / 'run'
    assert call(kill_runs.train, reference, validate=False) == 0
    assert call(kill_runs.train_until, run, 3, validate=False) == KILLED
    saved = read_checkpoint(run / 'iter_2.pth')
    del saved['resume_state']
    torch.save(saved, run / 'iter_2.pth')
    assert call(kill_runs.train, run, validate=False) == 0
    with pytest.raises(AssertionError, match='state_dict'):
        check_same_state(run / LAST, reference / LAST)


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
def test_workers_do_not_outlive_a_killed_process(call, tmp_path):
    """They would keep their memory for ever, waiting to hand over a batch."""
    folder = tmp_path / 'workers'
    folder.mkdir()
    assert call(kill_runs.train_with_large_items, tmp_path / 'run', folder) == KILLED
    workers = [int(path.name) for path in folder.iterdir()]
    assert len(workers) == 2
    end = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < end, 'workers are left'
        time.sleep(0.2)


def is_alive(process):
    try:
        os.kill(process, 0)
        state = Path(f'/proc/{process}/stat').read_text().rpartition(') ')[2][0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != 'Z'  # where nobody collects the status of orphans
