"""SIGTERM and SIGUSR1 leave a checkpoint, status 75, and a run that goes on exactly."""

import functools
import os
import signal
import time

import pytest
import torch
from kill_checks import needs_past_data
from preempt_runs import FORK, Calls, in_process, kill_self, train, train_both

from mmrest.checkpoint import read_checkpoint
from mmrest.hooks.loader_signals import shield_loader_workers
from mmrest.hooks.stop_signals import REQUEUE_FILE, Preempted, StopSignals


def load(folder, name):
    return read_checkpoint(folder / name)


def assert_same(first, second, keys=('state_dict', 'optimizer', 'param_schedulers')):
    for key in keys:
        if key == 'state_dict' or key == 'ema_state_dict':
            assert first[key].keys() == second[key].keys()
            for name, value in first[key].items():
                assert torch.equal(value, second[key][name]), (key, name)
        else:
            assert str(first[key]) == str(second[key]), key


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """Work folder of a run without signals, by its options."""

    @functools.lru_cache
    def run(epochs=False, ema=False, workers=0):
        folder = tmp_path_factory.mktemp('undisturbed')
        hooks = [dict(type='EMAHook')] if ema else []
        code = in_process(train, folder, epochs=epochs, workers=workers, hooks=hooks)
        assert code == 0
        return folder

    return run


@pytest.mark.parametrize(
    ('name', 'epochs', 'at', 'last'),
    [
        ('SIGTERM', False, 3, 'iter_6.pth'),
        # a checkpoint and a validation are due
        ('SIGUSR1', False, 2, 'iter_6.pth'),
        ('SIGUSR1', True, 6, 'epoch_3.pth'),  # within the second epoch
        ('SIGTERM', True, 8, 'epoch_3.pth'),  # at its end
    ],
)
def test_continues_after_exactly_that_iteration(
    tmp_path, undisturbed, name, epochs, at, last
):
    stop = Calls(functools.partial(kill_self, name), train=at)
    assert in_process(train, tmp_path, stop, epochs=epochs) == 75
    stopped = tmp_path / f'iter_{at}.pth'
    assert (tmp_path / 'last_checkpoint').read_text() == str(stopped)
    saved = load(tmp_path, stopped.name)
    assert saved['meta']['iter'] == at

    assert in_process(train, tmp_path, resume=True, epochs=epochs) == 0
    whole = undisturbed(epochs)
    assert_same(load(tmp_path, last), load(whole, last))
    validations = (whole / 'validations').read_text()
    assert (tmp_path / 'validations').read_text() == validations
    names = {p.name for p in whole.glob('*.pth')}
    assert {p.name for p in tmp_path.glob('*.pth')} == names


def test_last_iteration_ends_the_training_as_usual(tmp_path):
    stop = Calls(functools.partial(kill_self, 'SIGTERM'), train=6)
    assert in_process(train, tmp_path, stop, validate=False) == 0
    assert load(tmp_path, 'iter_6.pth')['meta']['iter'] == 6


@pytest.mark.parametrize('ema', [False, True])
@pytest.mark.parametrize(('epochs', 'at'), [(False, 2), (True, 4)])
def test_validation_is_broken_off_and_done_again(
    tmp_path, undisturbed, epochs, at, ema
):
    hooks = [dict(type='EMAHook')] if ema else []
    stop = Calls(functools.partial(kill_self, 'SIGTERM'), val=2, at_iter=at)
    options = dict(epochs=epochs, hooks=hooks)
    assert in_process(train, tmp_path, stop, **options) == 75
    assert not (tmp_path / 'validations').exists()
    assert load(tmp_path, f'iter_{at}.pth')['meta']['iter'] == at
    assert in_process(train, tmp_path, resume=True, **options) == 0
    whole = undisturbed(epochs, ema)
    validations = (whole / 'validations').read_text()
    assert (tmp_path / 'validations').read_text() == validations
    last = 'epoch_3.pth' if epochs else 'iter_6.pth'
    keys = ('state_dict', 'ema_state_dict') if ema else ('state_dict', 'optimizer')
    assert_same(load(tmp_path, last), load(whole, last), keys)


def test_second_signal_ends_at_once(tmp_path):
    def twice():
        kill_self('SIGUSR1')
        time.sleep(0.01)
        kill_self('SIGTERM')
        time.sleep(60)

    stop = Calls(twice, train=3)
    code = in_process(train, tmp_path, stop, preemption=dict(repeat=0), validate=False)
    assert code == -signal.SIGTERM
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_2.pth')


def test_signal_that_is_handed_on_twice_is_one(tmp_path):
    def twice():
        kill_self('SIGUSR1')
        kill_self('SIGTERM')

    assert in_process(train, tmp_path, Calls(twice, train=3), validate=False) == 75
    assert (tmp_path / 'iter_3.pth').is_file()


def test_signals_and_status_can_be_chosen(tmp_path):
    options = dict(signals=('SIGUSR2',), status=99)
    stop = Calls(functools.partial(kill_self, 'SIGUSR2'), train=3)
    code = in_process(train, tmp_path, stop, preemption=options, validate=False)
    assert code == 99
    with pytest.raises(ValueError, match='unknown signals SIGNONE.*SIGTERM'):
        StopSignals(('SIGNONE',))


@needs_past_data
def test_loader_workers_outlive_the_signal(tmp_path, undisturbed):
    """Slurm and torchrun send it to each of a job's processes."""

    def train_in_group(*args, **kwargs):
        os.setpgid(0, 0)
        train(*args, workers=2, **kwargs)

    stop = Calls(functools.partial(kill_self, 'SIGTERM', group=True), train=3)
    assert in_process(train_in_group, tmp_path, stop) == 75
    assert in_process(train_in_group, tmp_path, resume=True) == 0
    assert_same(
        load(tmp_path, 'iter_6.pth'), load(undisturbed(workers=2), 'iter_6.pth')
    )


def test_workers_still_end_when_their_parent_wants_it():
    def check():
        shield_loader_workers()
        started = FORK.Event()
        worker = FORK.Process(target=lambda: started.set() or time.sleep(60))
        worker.start()
        assert started.wait(60)
        shield_loader_workers(False)
        os.kill(worker.pid, signal.SIGUSR1)
        in_process(os.kill, worker.pid, signal.SIGTERM)  # from somebody else
        worker.join(timeout=1)
        assert worker.exitcode is None
        worker.terminate()
        worker.join(timeout=60)
        assert worker.exitcode == 0

    assert in_process(check) == 0


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


def test_after_the_training_signals_are_as_before(tmp_path):
    def check(folder):
        mine = signal.signal(signal.SIGTERM, lambda *_: os._exit(3)), signal.SIG_DFL
        assert mine[0] is not None
        train(folder, validate=False)
        kill_self('SIGTERM')

    assert in_process(check, tmp_path) == 3


def test_training_that_failed_does_not_ask_to_be_repeated(tmp_path, monkeypatch):
    """torchrun sends SIGTERM to the processes of a job of which one has failed."""
    marker = tmp_path / 'marker'
    monkeypatch.setenv(REQUEUE_FILE, str(marker))

    def fail():
        raise KeyError('a mistake')

    def check(folder):
        with pytest.raises(KeyError):
            train(folder, Calls(fail, train=3), validate=False)
        kill_self('SIGTERM')
        time.sleep(60)

    assert in_process(check, tmp_path) == -signal.SIGTERM
    assert not marker.exists()


@pytest.mark.parametrize(
    ('when', 'saved'),
    [
        (dict(train=3), 4),  # the other process is told an iteration later
        (dict(val=1, at_iter=2), 2),
    ],
)
def test_signal_to_one_process_stops_all_at_the_same(tmp_path, when, saved):
    stop = Calls(functools.partial(kill_self, 'SIGUSR1'), **when)
    assert train_both(tmp_path, stop) == [75, 75]
    assert load(tmp_path, f'iter_{saved}.pth')['meta']['iter'] == saved
    assert train_both(tmp_path, resume=True) == [0, 0]
    assert (tmp_path / 'validations').read_text().split() == ['2', '4', '6']
