"""AtomicCheckpointHook keeps the promises of MMEngine's hook, and says why it cannot."""

import errno
import hashlib
import os
import re

import pytest
import torch
from kill_checks import UNFINISHED, check_folder, same
from kill_runs import build, loader
from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner
from rest_runs import Regressor

from mmrest.checkpoint import CheckpointError, CheckpointWriteError, read_checkpoint
from mmrest.checkpoint.atomic import remove_unfinished, save_whole, write_whole
from mmrest.hooks import exact_resume as random_states

BEST = dict(save_best='val/loss', rule='less')
OPTIONS = {
    'kept': dict(max_keep_ckpts=2),
    'all kept': dict(max_keep_ckpts=-1),
    'best': BEST,
    'two bests': dict(save_best=['val/loss', 'val/other'], rule=['less', 'greater']),
    'published': dict(published_keys=['meta', 'state_dict'], **BEST),
    'names': dict(filename_tmpl='step{}.pt', max_keep_ckpts=1),
    'weights': dict(save_optimizer=False, save_param_scheduler=False),
    'from a point on': dict(save_begin=3, save_last=False, interval=2),
    'never': dict(interval=-1, save_last=False, **BEST),
}


class KeepsRandomStates(Hook):
    """What the hook here does in a validation, for a run with MMEngine's."""

    def before_val(self, runner):
        self.state = random_states.capture()

    def after_val(self, runner):
        random_states.restore(self.state)


def train(work_dir, kind, epochs, **options):
    hook = dict(type=kind, **{'save_best': None, 'rule': None, **options})
    hooks = [KeepsRandomStates()]
    build(work_dir, epochs=epochs, hook=hook, custom_hooks=hooks).train()


def content(work_dir):
    """The files without digests, and what the checkpoints hold."""
    files = {}
    for path in sorted(work_dir.iterdir()):
        if path.is_file() and path.suffix != '.py':
            name = re.sub(r'-[0-9a-f]{8}\.', '-DIGEST.', path.name)
            files[name] = path
    return files


@pytest.mark.parametrize('epochs', [False, True], ids=['iterations', 'epochs'])
@pytest.mark.parametrize('name', OPTIONS)
def test_same_files_as_mmengine(tmp_path, name, epochs):
    runs = []
    for kind in ('CheckpointHook', 'AtomicCheckpointHook'):
        (tmp_path / kind).mkdir()
        train(tmp_path / kind / 'run', kind, epochs, **OPTIONS[name])
        runs.append(content(tmp_path / kind / 'run'))
    theirs, ours = runs
    assert ours.keys() == theirs.keys()
    assert name == 'never' or 'last_checkpoint' in ours
    for file in ours:
        if file == 'last_checkpoint':
            one, other = ours[file].read_text(), theirs[file].read_text()
            assert os.path.basename(one) == os.path.basename(other)
            continue
        one, other = read_checkpoint(ours[file]), read_checkpoint(theirs[file])
        one.pop('resume_state', None)
        assert one.keys() == other.keys()
        for key in ('state_dict', 'optimizer', 'param_schedulers'):
            assert same(one.get(key), other.get(key))
        steps = [[c['meta'][k] for k in ('iter', 'epoch')] for c in (one, other)]
        assert steps[0] == steps[1]


def test_published_file_is_named_by_its_digest(tmp_path):
    """As ``torch.hub`` checks it."""
    train(tmp_path, 'AtomicCheckpointHook', False, published_keys=['state_dict'])
    (path,) = tmp_path.glob('iter_6-*.pth')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f'iter_6-{digest[:8]}.pth'
    assert set(read_checkpoint(path)) == {'state_dict'}


def test_validation_changes_nothing(tmp_path):
    """The training draws the same random numbers with and without it."""
    for validate in (True, False):
        build(tmp_path / str(validate), validate=validate).train()
    one, other = (
        read_checkpoint(tmp_path / str(flag) / 'iter_6.pth') for flag in (True, False)
    )
    assert same(one['state_dict'], other['state_dict'])


class MemoryBackend(BaseStorageBackend):
    """Stands for a remote storage."""

    files = {}

    def put(self, obj, filepath):
        self.files[str(filepath)] = obj

    def get(self, filepath):
        return self.files[str(filepath)]

    get_text = get

    def join_path(self, *parts):
        return '/'.join(parts)

    def isfile(self, filepath):
        return filepath in self.files

    def remove(self, filepath):
        del self.files[filepath]


def test_other_storages_go_mmengines_way(tmp_path):
    register_backend('memory', MemoryBackend, force=True)
    hook = dict(backend_args=dict(backend='memory'), out_dir='store')
    build(tmp_path / 'run', hook=hook, validate=False).train()
    assert list(MemoryBackend.files) == ['store/run/iter_6.pth']
    pointer = tmp_path / 'run' / 'last_checkpoint'
    assert pointer.read_text() == 'store/run/iter_6.pth'
    assert not list(tmp_path.rglob('*.pth'))


@pytest.mark.parametrize(
    ('error', 'advice'),
    [
        (OSError(errno.ENOSPC, 'x'), 'No space left on device. .*Free space'),
        (OSError(errno.EDQUOT, 'x'), 'your quota is used up. .*Free space'),
        (OSError(errno.EROFS, 'x'), 'Read-only file system. .*Make the folder'),
        (RuntimeError('[enforce fail at inline_container.cc:595] . x'), 'inline_con'),
    ],
)
@pytest.mark.parametrize('target', ['iter_4.pth', 'last_checkpoint', 'best_val'])
def test_failing_write_ends_the_run(tmp_path, monkeypatch, error, advice, target):
    replace = os.replace

    def failing_replace(source, path):
        if target in path and os.path.exists(tmp_path / 'iter_2.pth'):
            raise error
        replace(source, path)

    monkeypatch.setattr(os, 'replace', failing_replace)
    with pytest.raises(CheckpointWriteError, match=f'{target}.* could not .*{advice}'):
        build(tmp_path).train()
    check_folder(tmp_path)
    assert (tmp_path / 'iter_2.pth').is_file() and not list(tmp_path.glob(UNFINISHED))
    if target == 'iter_4.pth':
        assert {p.name for p in tmp_path.glob('iter*')} == {'iter_2.pth'}


def test_another_error_is_not_called_one_of_writing(tmp_path):
    def save(beside):
        raise RuntimeError('CUDA error')

    with pytest.raises(RuntimeError, match='^CUDA error$'):
        save_whole(str(tmp_path / 'a.pth'), save)


def test_every_process_ends_if_one_cannot_write(tmp_path, monkeypatch):
    def gathered(problem):
        return [problem, 'b.pth could not be written: disk on fire']

    monkeypatch.setattr('mmrest.checkpoint.atomic.all_gather_object', gathered)
    path = tmp_path / 'a.pth'
    with pytest.raises(CheckpointWriteError, match='^b.pth .* on fire$'):
        save_whole(str(path), lambda beside: write_whole(beside, b'new'))
    assert not list(tmp_path.iterdir())


def test_old_content_stays_until_the_new_is_whole(tmp_path, monkeypatch):
    path = tmp_path / 'folder' / 'file'
    write_whole(path, b'old')

    def full(descriptor):
        raise OSError(errno.ENOSPC, 'full')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(CheckpointWriteError, match='nothing of this one is left'):
            write_whole(path, b'new')
    assert path.read_bytes() == b'old' and len(list(path.parent.iterdir())) == 1
    write_whole(path, b'new')
    assert path.read_bytes() == b'new'


def test_sharded_folder_replaces_an_older_one(tmp_path):
    def save(beside):
        os.makedirs(beside)
        torch.save({}, f'{beside}/rank0.pth')

    for _ in range(2):
        save_whole(str(tmp_path / 'iter_1.pth'), save)
    assert [p.name for p in tmp_path.rglob('*')] == ['iter_1.pth', 'rank0.pth']


def test_only_our_own_leftovers_are_removed(tmp_path):
    names = ['iter_1.pth.mmrest-unfinished', 'iter_2.pth', 'notes.tmp', 'iter_3.part']
    for name in names:
        (tmp_path / name).touch()
    assert remove_unfinished(tmp_path) == names[:1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])
    assert remove_unfinished(tmp_path / 'missing') == []


def test_random_states_of_another_number_of_processes():
    state = random_states.capture()
    assert random_states.own([state]) is state
    with pytest.raises(LookupError, match='saved by 2 processes, and these are 1'):
        random_states.own([state, state])


@pytest.mark.parametrize('state', [{}, None, dict(numpy=('a', [1], 2), python=0)])
def test_forged_random_states(state):
    with pytest.raises(CheckpointError, match='random states in the checkpoint'):
        random_states.restore(state)


def test_forged_list_of_outdated_files(tmp_path):
    """A checkpoint cannot make the run delete what is not its own."""
    build(tmp_path / 'run', validate=False).train()
    path = tmp_path / 'run' / 'iter_6.pth'
    names = ['notes.txt', '../iter_1.pth', 'best_/../../iter_1.pth', 'iter_1.pth']
    for file in ('run/notes.txt', 'run/iter_1.pth', 'iter_1.pth'):
        (tmp_path / file).touch()
    saved = read_checkpoint(path)
    saved['resume_state']['outdated'] = names
    torch.save(saved, path)
    build(tmp_path / 'run', str(path), validate=False).train()
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*.*')}
    assert {'run/notes.txt', 'iter_1.pth'} <= left
    assert 'run/iter_1.pth' not in left  # which is one of its own


def test_forged_resume_state(tmp_path):
    build(tmp_path, validate=False).train()
    path = tmp_path / 'iter_6.pth'
    saved = read_checkpoint(path)
    for state in ([], dict(random_states=3, validated=False)):
        torch.save(dict(saved, resume_state=state), path)
        with pytest.raises(CheckpointError, match='resume_state in the checkpoint'):
            build(tmp_path, str(path), validate=False).train()


def flexible(work_dir, load_from=None):
    """The runner that MMEngine's strategies, such as FSDP's, need."""
    torch.manual_seed(0)
    return FlexibleRunner(
        model=Regressor(drop_rate=0.2, norm_eval=False),
        strategy=dict(type='SingleDeviceStrategy'),
        work_dir=str(work_dir),
        train_dataloader=loader(0, shuffle=True),
        train_cfg=dict(by_epoch=False, max_iters=6),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(
            checkpoint=dict(
                type='AtomicCheckpointHook', by_epoch=False, interval=2, max_keep_ckpts=2
            )
        ),
        default_scope='mmengine',
        experiment_name=f'flexible_{work_dir.name}_{load_from is None}',
        log_level='ERROR',
        randomness=dict(seed=3),
        load_from=load_from,
        resume=load_from is not None,
    )


def test_flexible_runner(tmp_path):
    flexible(tmp_path / 'whole').train()
    assert {p.name for p in (tmp_path / 'whole').glob('*.pth*')} == {
        'iter_4.pth',
        'iter_6.pth',
    }
    start = tmp_path / 'whole' / 'iter_4.pth'
    flexible(tmp_path / 'resumed', str(start)).train()
    one, other = (
        read_checkpoint(tmp_path / name / 'iter_6.pth') for name in ('whole', 'resumed')
    )
    for key in ('state_dict', 'optimizer', 'resume_state'):
        assert same(one[key], other[key]), key
