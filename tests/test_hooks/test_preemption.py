"""SIGTERM and SIGUSR1 leave a checkpoint, status 75, and a run that goes on exactly."""

import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_checks import needs_past_data, same
from torch.utils.data import DataLoader, IterableDataset
from toy_runs import (
    FORK,
    Calls,
    Images,
    Validations,
    build,
    collate,
    exit_codes,
    in_process,
    kill_self,
    train,
    train_in_two,
)

from mmrest.checkpoint import read_checkpoint
from mmrest.hooks import Preempted, PreemptionHook, StopSignals, WorkerShield
from mmrest.hooks.preemption import REQUEUE_FILE

HOOK = dict(type='PreemptionHook')
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STATE = ('state_dict', 'optimizer', 'param_schedulers')


def stopped(folder, *calls, preemption=(), hooks=(), **kwargs):
    """Exit code of a training with the hook here."""
    hooks = [dict(HOOK, **dict(preemption)), Validations(), *hooks, *calls]
    return in_process(train, folder, hooks=hooks, **kwargs)


def at(name, *args, **moment):
    return Calls(functools.partial(kill_self, name, *args), **moment)


def saved(folder, name):
    return read_checkpoint(folder / name)


def assert_same(folder, other, name, keys=STATE):
    ours, theirs = saved(folder, name), saved(other, name)
    for key in keys:
        assert same(ours[key], theirs[key]), key
    validations = [path / 'validations' for path in (folder, other)]
    texts = [path.exists() and path.read_text() for path in validations]
    assert texts[0] == texts[1]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """Work folder of a run without signals, by its options."""

    @functools.lru_cache
    def run(epochs=0, ema=False, workers=0):
        folder = tmp_path_factory.mktemp('undisturbed')
        options = dict(num_workers=workers)
        hooks = [Validations(), *([dict(type='EMAHook')] if ema else [])]
        train(folder, hooks=hooks, epochs=epochs, validate=True, loader_options=options)
        return folder

    return run


@pytest.mark.parametrize(
    ('name', 'epochs', 'when', 'last'),
    [
        ('SIGTERM', 0, 3, 'iter_6.pth'),
        ('SIGUSR1', 0, 2, 'iter_6.pth'),  # a checkpoint and a validation are due
        ('SIGUSR1', 3, 6, 'epoch_3.pth'),  # within the second epoch
        ('SIGTERM', 3, 8, 'epoch_3.pth'),  # at its end
    ],
)
def test_continues_after_exactly_that_iteration(
    tmp_path, undisturbed, name, epochs, when, last
):
    options = dict(epochs=epochs, validate=True)
    assert stopped(tmp_path, at(name, train=when), **options) == 75
    path = tmp_path / f'iter_{when}.pth'
    assert (tmp_path / 'last_checkpoint').read_text() == str(path)
    assert saved(tmp_path, path.name)['meta']['iter'] == when

    assert stopped(tmp_path, resume=True, **options) == 0
    assert_same(tmp_path, undisturbed(epochs), last)
    names = {p.name for p in undisturbed(epochs).glob('*.pth')}
    assert {p.name for p in tmp_path.glob('*.pth')} == names


def test_last_iteration_ends_the_training_as_usual(tmp_path):
    assert stopped(tmp_path, at('SIGTERM', train=6)) == 0
    assert saved(tmp_path, 'iter_6.pth')['meta']['iter'] == 6


@pytest.mark.parametrize(
    ('epochs', 'when', 'ema'), [(0, 2, False), (0, 2, True), (3, 4, True)]
)
def test_validation_is_broken_off_and_done_again(
    tmp_path, undisturbed, epochs, when, ema
):
    hooks = [dict(type='EMAHook')] if ema else []
    options = dict(epochs=epochs, hooks=hooks, validate=True)
    assert stopped(tmp_path, at('SIGTERM', val=2, at_iter=when), **options) == 75
    assert not (tmp_path / 'validations').exists()
    assert saved(tmp_path, f'iter_{when}.pth')['meta']['iter'] == when
    assert stopped(tmp_path, resume=True, **options) == 0
    keys = ('state_dict', 'ema_state_dict') if ema else STATE
    last = 'epoch_3.pth' if epochs else 'iter_6.pth'
    assert_same(tmp_path, undisturbed(epochs, ema), last, keys)


def test_accumulated_gradients_are_not_lost(tmp_path):
    """The run stops after the step that they belong to."""
    options = dict(iters=8, optim_wrapper=dict(accumulative_counts=4))
    options['checkpoint'] = dict(interval=4)
    assert stopped(tmp_path / 'run', at('SIGTERM', train=1), **options) == 75
    assert saved(tmp_path / 'run', 'iter_4.pth')['meta']['iter'] == 4
    assert stopped(tmp_path / 'run', resume=True, **options) == 0
    train(tmp_path / 'whole', **options)
    assert_same(tmp_path / 'run', tmp_path / 'whole', 'iter_8.pth')


def test_second_signal_ends_at_once(tmp_path):
    def twice():
        kill_self('SIGUSR1')
        time.sleep(0.01)
        kill_self('SIGTERM')
        time.sleep(60)

    code = stopped(tmp_path, Calls(twice, train=3), preemption=dict(repeat=0))
    assert code == -signal.SIGTERM
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_2.pth')


def test_signal_that_is_handed_on_twice_is_one(tmp_path, monkeypatch):
    marker = tmp_path / 'marker'
    monkeypatch.setenv(REQUEUE_FILE, str(marker))

    def twice():
        kill_self('SIGUSR1')
        kill_self('SIGTERM')

    assert stopped(tmp_path, Calls(twice, train=3)) == 75
    assert (tmp_path / 'iter_3.pth').is_file()
    assert marker.read_text() == 'saved\n'  # which the launcher's script reads


def test_signals_and_status_can_be_chosen(tmp_path):
    options = dict(signals=('SIGUSR2',), status=99)
    assert stopped(tmp_path, at('SIGUSR2', train=3), preemption=options) == 99
    with pytest.raises(ValueError, match='unknown signals SIGNONE.*SIGTERM'):
        StopSignals(('SIGNONE',))


def test_before_the_training_it_ends_at_once(tmp_path, monkeypatch):
    marker = tmp_path / 'marker'
    monkeypatch.setenv(REQUEUE_FILE, str(marker))
    signals = StopSignals()
    signals.start()
    try:
        with pytest.raises(Preempted) as info:
            kill_self('SIGUSR1')
    finally:
        signals.stop()
    assert info.value.code == 75 and 'SIGUSR1' in str(info.value)
    assert marker.read_text() == 'start\n'


def process_state():
    """What a hook might change in a process: its handlers, and what a child does."""
    started = FORK.Event()

    def wait():
        started.set()
        for _ in range(600):  # a signal just before a long sleep would wait for its end
            time.sleep(0.1)

    child = FORK.Process(target=wait)
    child.start()
    assert started.wait(30)
    child.terminate()
    child.join(30)
    return [signal.getsignal(number) for number in SIGNALS], child.exitcode


class Fails(RuntimeError):
    pass


def fail():
    raise Fails


@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('epochs', [0, 1])
def test_process_is_as_before(tmp_path, epochs, fails):
    """After building the hook, after a training, and after one that failed."""
    before = process_state()
    assert before[1] == -signal.SIGTERM
    PreemptionHook()
    assert process_state() == before
    loaders = []

    class Look(Validations):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            loaders[:] = [runner.train_dataloader, runner.val_dataloader]
            kinds = [type(loader.worker_init_fn) for loader in loaders]
            assert kinds == [WorkerShield, WorkerShield]
            assert [signal.getsignal(n) for n in SIGNALS] != before[0]
            # Pool.terminate(), for one, relies on it
            assert process_state()[1] == -signal.SIGTERM

    runner = build(
        tmp_path,
        hooks=[HOOK, Look(), *([Calls(fail, train=3)] if fails else [])],
        iters=4,
        epochs=epochs,
        validate=True,
        loader_options=dict(num_workers=1),
        val_loader=dict(num_workers=1),
    )
    if fails:
        pytest.raises(Fails, runner.train)
    else:
        runner.train()
    assert process_state() == before
    assert len(loaders) == 2
    assert not any(isinstance(one.worker_init_fn, WorkerShield) for one in loaders)
    assert 'run' not in vars(runner.train_loop)


def test_given_data_loader_is_put_back(tmp_path):
    """One that the user has built is the user's."""
    mine = functools.partial(print, end='')
    options = dict(num_workers=1, worker_init_fn=mine, collate_fn=collate)
    loader = DataLoader(Images(), batch_size=2, **options)
    hooks = [HOOK, Calls(fail, train=2)]
    pytest.raises(Fails, train, tmp_path, hooks=hooks, epochs=1, dataloader=loader)
    assert loader.worker_init_fn is mine


class Stream(IterableDataset):
    """Images in order, and numbers from the generator of the process."""

    metainfo = Images.metainfo

    def __len__(self):
        return 8

    def __iter__(self):
        images = Images(noisy=True)
        return (images[index] for index in range(len(self)))


class PlainLoader:
    """What MMEngine's loops need of a data loader, and no more."""

    dataset = Stream()

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(DataLoader(self.dataset, batch_size=2, collate_fn=collate))


@pytest.mark.parametrize(
    ('kind', 'epochs', 'when'), [('own', 0, 3), ('own', 2, 6), ('iterable', 2, 6)]
)
def test_loaders_without_a_sampler(tmp_path, kind, epochs, when):
    """A stream has no batches that could be skipped without reading them."""
    loader = DataLoader(Stream(), batch_size=2, collate_fn=collate)
    options = dict(epochs=epochs, dataloader=PlainLoader() if kind == 'own' else loader)
    assert stopped(tmp_path / 'run', at('SIGTERM', train=when), **options) == 75
    assert stopped(tmp_path / 'run', resume=True, **options) == 0
    train(tmp_path / 'whole', **options)
    last = 'epoch_2.pth' if epochs else 'iter_6.pth'
    assert_same(tmp_path / 'run', tmp_path / 'whole', last)


def test_training_that_failed_does_not_ask_to_be_repeated(tmp_path, monkeypatch):
    """torchrun sends SIGTERM to the processes of a job of which one has failed."""
    marker = tmp_path / 'marker'
    monkeypatch.setenv(REQUEUE_FILE, str(marker))

    def check():
        StopSignals().start()  # as tools/train.py does
        with pytest.raises(Fails):
            train(tmp_path, hooks=[HOOK, Calls(fail, train=3)])
        kill_self('SIGTERM')
        time.sleep(60)

    assert in_process(check) == -signal.SIGTERM
    assert not marker.exists()


def test_numbers_are_the_same_with_the_hook(tmp_path):
    """Workers that are started again take nothing from the random state."""
    options = dict(loader_options=dict(num_workers=1))
    train(tmp_path / 'with', hooks=[HOOK], **options)
    train(tmp_path / 'without', **options)
    assert_same(tmp_path / 'with', tmp_path / 'without', 'iter_6.pth')


@needs_past_data
@pytest.mark.parametrize('epochs', [0, 3])
def test_loader_workers_outlive_the_signal(tmp_path, undisturbed, epochs):
    """Slurm sends it to each of a job's processes."""
    options = dict(epochs=epochs, validate=True, loader_options=dict(num_workers=2))

    def train_in_group():
        os.setpgid(0, 0)
        train(
            tmp_path,
            hooks=[HOOK, Validations(), at('SIGTERM', True, train=3)],
            **options,
        )

    assert in_process(train_in_group) == 75
    assert stopped(tmp_path, resume=True, **options) == 0
    last = 'epoch_3.pth' if epochs else 'iter_6.pth'
    if not epochs:  # within an epoch new workers start from their seeds
        assert_same(tmp_path, undisturbed(workers=2), last)
    assert saved(tmp_path, last)['meta']['iter'] == (12 if epochs else 6)


WORKERS = """
import os, signal, subprocess, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from mmrest.hooks.preemption import shield_workers

class Pids(Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return os.getpid()

def own(worker_id):
    assert worker_id < count
    torch.manual_seed(worker_id)

def alive(pid):
    try:
        state = open(f'/proc/{pid}/stat').read().rpartition(') ')[2][0]
    except FileNotFoundError:
        return False
    return state != 'Z'

# a forked worker holds the pipes of those before it; others import everything anew
count = 2 if sys.argv[1] == 'fork' else 1

if __name__ == '__main__':
    loader = DataLoader(Pids(), batch_size=1, num_workers=count, worker_init_fn=own,
                        multiprocessing_context=sys.argv[1])
    with shield_workers([loader], ['SIGUSR2']):
        batches = iter(loader)
        pids = {int(next(batches)) for _ in range(8)}
        assert len(pids) == count
        for name in ('TERM', 'USR1', 'USR2', 'TERM'):
            subprocess.run(['kill', f'-{name}', *map(str, pids)], check=True)
        time.sleep(1.5)
        next(batches)
        print(*pids, flush=True)
        if sys.argv[2] == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
    assert loader.worker_init_fn is own
    # asked to end meanwhile, and nothing keeps them any more
    end = time.monotonic() + 30
    while any(map(alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
@pytest.mark.parametrize('end', ['ended', 'killed'])
@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
def test_workers_of_each_start_method(repo, tmp_path, method, end):
    """They outlive signals, and neither the run nor a main process that is killed."""
    path = tmp_path / 'workers.py'
    path.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, str(path), method, end],
        env=dict(os.environ, PYTHONPATH=str(repo), OPENBLAS_NUM_THREADS='2'),
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = -signal.SIGKILL if end == 'killed' else 0
    assert done.returncode == expected, done.stderr
    deadline = time.monotonic() + 30
    while any(Path(f'/proc/{pid}').exists() for pid in done.stdout.split()):
        assert time.monotonic() < deadline, 'workers are left'
        time.sleep(0.2)


def test_shield_can_be_pickled_and_calls_the_loaders_function():
    copy = pickle.loads(pickle.dumps(WorkerShield(functools.partial(divmod, 5))))
    assert copy.init.func is divmod

    def check():
        WorkerShield(lambda worker_id: os._exit(3 + worker_id))(1)

    assert in_process(check) == 4


def test_workers_ignore_the_signals_of_the_hook(tmp_path):
    """Also those that do not inherit its handlers, with spawn and forkserver."""
    shields = []

    class Look(Validations):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            shields.append(runner.train_dataloader.worker_init_fn)

    hook = dict(HOOK, signals=('SIGTERM', 'SIGUSR2'))
    build(
        tmp_path, hooks=[hook, Look()], iters=1, loader_options=dict(num_workers=1)
    ).train()

    def check():
        WorkerShield(signals=shields[0].signals)(0)  # that of the run has ended
        for name in ('SIGTERM', 'SIGUSR1', 'SIGUSR2'):
            kill_self(name)
        os._exit(4)

    assert in_process(check) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ('moment', 'last'),
    [
        (dict(train=3), 4),  # the other process is told an iteration later
        (dict(val=1, at_iter=2), 2),
    ],
)
def test_signal_to_one_process_stops_all_at_the_same(tmp_path, moment, last):
    def hooks(rank):
        calls = [at('SIGUSR1', **moment)] if rank == 1 else []
        return [HOOK, Validations(), *calls]

    options = dict(validate=True)
    assert exit_codes(train_in_two(tmp_path, hooks, **options)) == [75, 75]
    assert saved(tmp_path, f'iter_{last}.pth')['meta']['iter'] == last

    def calm(rank):
        return [HOOK, Validations()]

    resumed = train_in_two(tmp_path, calm, resume=True, **options)
    assert exit_codes(resumed) == [0, 0]
    assert (tmp_path / 'validations').read_text().split() == ['2', '4', '6']
    assert torch.load(tmp_path / 'iter_6.pth', weights_only=False)['meta']['iter'] == 6
