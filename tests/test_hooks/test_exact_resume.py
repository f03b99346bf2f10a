"""A resumed run continues exactly, and says what it does not take from the config."""

import pytest
import torch
from kill_checks import check_same_state, needs_past_data, same
from toy_runs import (
    Calls,
    QuietFlexibleRunner,
    Validations,
    build,
    in_process,
    kill_self,
    train,
)

from mmrest.checkpoint import CheckpointError, read_checkpoint
from mmrest.hooks import AtomicCheckpointHook, exact_resume


@pytest.mark.parametrize(
    ('workers', 'epochs'),
    [
        pytest.param(0, 0, id='0-iterations'),
        pytest.param(0, 3, id='0-epochs'),
        pytest.param(2, 0, id='2-iterations', marks=needs_past_data),
        pytest.param(2, 3, id='2-epochs'),
    ],
)
def test_data_and_random_numbers_continue(tmp_path, workers, epochs):
    """Killed between checkpoints; eight images make four iterations an epoch."""
    options = dict(epochs=epochs, loader_options=dict(num_workers=workers))
    train(tmp_path / 'whole', **options)
    stop = Calls(lambda: kill_self('SIGKILL'), train=7 if epochs else 4)
    assert in_process(train, tmp_path / 'run', hooks=[stop], **options) == -9
    train(tmp_path / 'run', resume=True, **options)
    last = 'epoch_3.pth' if epochs else 'iter_6.pth'
    check_same_state(tmp_path / 'run' / last, tmp_path / 'whole' / last)


def test_without_random_states_the_end_is_another(tmp_path):
    """That the test above can fail: as with a checkpoint of MMEngine's hook."""
    train(tmp_path / 'whole')
    train(tmp_path / 'run', iters=2)
    path = tmp_path / 'run' / 'iter_2.pth'
    saved = read_checkpoint(path)
    del saved['resume_state']
    torch.save(saved, path)
    train(tmp_path / 'run', resume=True)
    with pytest.raises(AssertionError, match='state_dict'):
        check_same_state(*(tmp_path / n / 'iter_6.pth' for n in ('run', 'whole')))


def test_validation_changes_nothing(tmp_path):
    """The training draws the same random numbers with and without it."""
    for validate in (True, False):
        train(tmp_path / str(validate), validate=validate)
    one, other = (
        read_checkpoint(tmp_path / str(flag) / 'iter_6.pth') for flag in (True, False)
    )
    assert same(one['state_dict'], other['state_dict'])


def test_validation_is_not_made_twice(tmp_path):
    """A new best one makes the checkpoint be saved again after the validation."""
    best = dict(save_best='val/loss', rule='less')
    options = dict(validate=True, checkpoint=best, hooks=[Validations()])
    train(tmp_path, iters=2, **options)
    train(tmp_path, iters=4, resume=True, **options)
    assert (tmp_path / 'validations').read_text() == '2\n4\n'


def test_flexible_runner(tmp_path):
    """The runner that MMEngine's strategies, such as FSDP's, need."""
    strategy = dict(type='SingleDeviceStrategy')
    options = dict(runner_type=QuietFlexibleRunner, checkpoint=dict(max_keep_ckpts=2))
    train(tmp_path / 'whole', strategy=strategy, **options)
    names = {path.name for path in (tmp_path / 'whole').glob('*.pth*')}
    assert names == {'iter_4.pth', 'iter_6.pth'}
    start = str(tmp_path / 'whole' / 'iter_4.pth')
    train(tmp_path / 'resumed', resume=start, strategy=strategy, **options)
    one, other = (
        read_checkpoint(tmp_path / name / 'iter_6.pth') for name in ('whole', 'resumed')
    )
    for key in ('state_dict', 'optimizer', 'resume_state'):
        assert same(one[key], other[key]), key


@pytest.mark.parametrize('state', [{}, None, dict(numpy=('a', [1], 2), python=0)])
def test_forged_random_states(state):
    with pytest.raises(CheckpointError, match='random states in the checkpoint'):
        exact_resume.restore(state)


def test_forged_resume_state(tmp_path):
    train(tmp_path)
    path = tmp_path / 'iter_6.pth'
    saved = read_checkpoint(path)
    for state in ([], dict(random_states=3, validated=False)):
        torch.save(dict(saved, resume_state=state), path)
        with pytest.raises(CheckpointError, match='resume_state in the checkpoint'):
            train(tmp_path, resume=str(path))


def test_another_number_of_processes_is_said(tmp_path):
    train(tmp_path, iters=2)
    path = tmp_path / 'iter_2.pth'
    saved = read_checkpoint(path)
    saved['resume_state']['random_states'] *= 2
    torch.save(saved, path)
    train(tmp_path, resume=str(path))
    assert 'saved by 2 processes, and these are 1' in log_of(tmp_path)


# --------------------------------------------------- learning rates and schedules

SGD = dict(type='SGD', lr=0.01, momentum=0.9)


def steps(*milestones, **options):
    kind = dict(type='MultiStepLR', by_epoch=False, end=10)
    return dict(kind, milestones=milestones, **options)


def log_of(folder):
    return max(folder.glob('*/*.log')).read_text()


def resume_with(folder, before, after, **kwargs):
    """Two iterations before, four after; the log of the latter, and its end."""
    train(folder, iters=2, **before, **kwargs)
    for log in folder.glob('*/*.log'):
        log.unlink()
    runner = train(folder, resume=True, **after, **kwargs)
    return log_of(folder), runner.optim_wrapper.optimizer.param_groups[0]


CHANGES = [
    (dict(optimizer=dict(SGD, lr=0.02)), ['lr 0.01 (config: 0.02)']),
    (
        dict(optimizer=dict(SGD, momentum=0.8, weight_decay=0.1)),
        ['momentum 0.9 (config: 0.8)', 'weight_decay 0 (config: 0.1)'],
    ),
    (
        dict(param_scheduler=[steps(5, gamma=0.5)]),
        ['MultiStepLR.milestones [1, 3] (config: [5])'],
    ),
    # without `end` MMEngine's is the end of the run: after it nothing happens
    (dict(param_scheduler=[steps(1, 3, end=4)]), ['MultiStepLR.end 10 (config: 4)']),
]
OTHER_KINDS = [
    dict(param_scheduler=[steps(1, 3), steps(4)]),
    dict(param_scheduler=dict(type='PolyLR', power=2, by_epoch=False, end=6)),
    dict(param_scheduler=None),
]
BEFORE = dict(optimizer=SGD, param_scheduler=[steps(1, 3)])


@pytest.mark.parametrize(('changes', 'texts'), CHANGES)
def test_changes_are_named_and_not_used(tmp_path, changes, texts):
    text, group = resume_with(tmp_path, BEFORE, {**BEFORE, **changes})
    assert 'continues with the optimizer and schedules of the checkpoint' in text
    assert 'default_hooks.checkpoint.schedule_from=config' in text
    for change in texts:
        assert change in text
    if 'optimizer' in changes:
        assert group['lr'] == pytest.approx(0.01 * 0.1**2)


@pytest.mark.parametrize('changes', [change for change, _ in CHANGES] + OTHER_KINDS)
@pytest.mark.parametrize('epochs', [0, 3])
def test_those_of_the_config_can_be_used(tmp_path, changes, epochs):
    """They are then where they would be after a whole run with them."""
    after, length, options = {**BEFORE, **changes}, dict(iters=2), {}
    if changes not in OTHER_KINDS:  # those are used anyway
        options['checkpoint'] = dict(schedule_from='config')
    if epochs:
        after['param_scheduler'] = dict(type='StepLR', step_size=1, gamma=0.5)
        options['epochs'], length = epochs, dict(epochs=1)
    train(tmp_path / 'run', **BEFORE, **{**options, **length})
    runner = train(tmp_path / 'run', resume=True, **after, **options)
    whole = train(tmp_path / 'whole', **after, **options)
    assert 'continues with the optimizer and schedules of the config' in log_of(
        tmp_path / 'run'
    )
    ours, theirs = (r.optim_wrapper.optimizer.param_groups[0] for r in (runner, whole))
    for key in theirs.keys() - {'params'}:
        assert ours[key] == theirs[key], key
    schedules = zip(runner.param_schedulers or [], whole.param_schedulers or [])
    for one, other in schedules:
        assert one.state_dict() == other.state_dict()


def test_nothing_is_said_where_nothing_changed(tmp_path):
    text, _ = resume_with(tmp_path, BEFORE, BEFORE)
    assert 'schedules of' not in text
    adam = dict(type='AdamW', lr=0.01, betas=(0.9, 0.99))
    momentum = dict(type='StepMomentum', step_size=1, by_epoch=False, end=10)
    options = dict(optimizer=adam, param_scheduler=[steps(1), momentum])
    text, _ = resume_with(tmp_path / 'momentum', options, options)
    assert 'schedules of' not in text
    # weights alone are no resumed run
    runner = build(tmp_path / 'new', optimizer=dict(SGD, lr=0.5))
    runner._load_from = str(tmp_path / 'iter_6.pth')
    runner.train()
    assert 'schedules of' not in log_of(tmp_path / 'new')


def test_option_is_checked():
    with pytest.raises(ValueError, match="'checkpoint' or 'config', found 'file'"):
        AtomicCheckpointHook(schedule_from='file')


@pytest.mark.parametrize(('interval', 'said'), [(2, True), (4, False)])
def test_checkpoints_between_two_steps_are_said(tmp_path, interval, said):
    train(
        tmp_path,
        iters=4,
        optim_wrapper=dict(accumulative_counts=4),
        checkpoint=dict(interval=interval),
    )
    assert ('accumulative_counts is 4' in log_of(tmp_path)) is said
