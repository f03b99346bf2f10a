"""AtomicCheckpointHook keeps the promises of MMEngine's hook, killed at any moment."""

import errno
import hashlib
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from kill_checks import UNFINISHED, check_folder, check_same_state, same
from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.hooks import Hook
from toy_runs import (
    Calls,
    DiskSteps,
    Images,
    exit_codes,
    in_process,
    kill_self,
    train,
    train_in_two,
)

from mmrest.checkpoint import (
    CheckpointError,
    CheckpointWriteError,
    find_latest,
    read_checkpoint,
)
from mmrest.hooks import exact_resume

BEST = dict(save_best='val/loss', rule='less')
KILLED = -signal.SIGKILL
LAST = 'iter_6.pth'


def run(folder, fatal=None, names=None, **kwargs):
    """Train, from the latest checkpoint on, until a step of writing to the disk."""
    steps = DiskSteps(fatal)
    options = dict(validate=True, checkpoint=BEST, resume=True, **kwargs)
    train(folder, **options)
    if names is not None:
        names.write_text('\n'.join(steps.names))


# ------------------------------------------------------ as MMEngine's hook does it


class KeepsRandomStates(Hook):
    """What the hook here does in a validation, for a run with MMEngine's."""

    def before_val(self, runner):
        self.state = exact_resume.capture()

    def after_val(self, runner):
        exact_resume.restore(self.state)


@pytest.mark.parametrize('epochs', [0, 3], ids=['iterations', 'epochs'])
@pytest.mark.parametrize(
    'options',
    [
        dict(max_keep_ckpts=2),
        dict(max_keep_ckpts=-1),
        BEST,
        dict(save_best=['val/loss', 'val/other'], rule=['less', 'greater']),
        dict(published_keys=['meta', 'state_dict'], **BEST),
        dict(filename_tmpl='step{}.pt'),
        dict(save_optimizer=False, save_param_scheduler=False),
        dict(save_begin=3, save_last=False, interval=2),
        dict(interval=-1, save_last=False, **BEST),
    ],
    ids=str,
)
def test_same_files_as_mmengine(tmp_path, options, epochs):
    found = []
    for kind in ('CheckpointHook', 'AtomicCheckpointHook'):
        folder = tmp_path / kind / 'run'
        checkpoint = dict(options, type=kind)
        hooks = [KeepsRandomStates()]
        train(folder, hooks=hooks, checkpoint=checkpoint, epochs=epochs, validate=True)
        files = [p for p in folder.iterdir() if p.is_file() and p.suffix != '.py']
        digest = r'-[0-9a-f]{8}\.'
        found.append({re.sub(digest, '-DIGEST.', p.name): p for p in files})
    theirs, ours = found
    assert ours.keys() == theirs.keys() and ours
    for name, path in ours.items():
        if name == 'last_checkpoint':
            texts = path.read_text(), theirs[name].read_text()
            assert os.path.basename(texts[0]) == os.path.basename(texts[1])
            continue
        one, other = read_checkpoint(path), read_checkpoint(theirs[name])
        one.pop('resume_state', None)
        assert one.keys() == other.keys()
        for key in ('state_dict', 'optimizer', 'param_schedulers'):
            assert same(one.get(key), other.get(key))
        for key in ('iter', 'epoch'):
            assert one['meta'][key] == other['meta'][key]


def test_published_file_is_named_by_its_digest(tmp_path):
    """As ``torch.hub`` checks it."""
    train(tmp_path, checkpoint=dict(published_keys=['state_dict']))
    (path,) = tmp_path.glob('iter_6-*.pth')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f'iter_6-{digest[:8]}.pth'
    assert set(read_checkpoint(path)) == {'state_dict'}


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
    checkpoint = dict(backend_args=dict(backend='memory'), out_dir='store')
    train(tmp_path / 'run', checkpoint=checkpoint)
    assert list(MemoryBackend.files) == ['store/run/iter_6.pth']
    pointer = tmp_path / 'run' / 'last_checkpoint'
    assert pointer.read_text() == 'store/run/iter_6.pth'
    assert not list(tmp_path.rglob('*.pth'))


# ------------------------------------------------------------------ failing writes


def test_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b'caf\xe9')
    train(folder, iters=2)
    assert find_latest(folder).iteration == 2 and not find_latest(folder).warning


@pytest.mark.parametrize(
    ('error', 'advice'),
    [
        (OSError(errno.ENOSPC, 'x'), 'No space left on device. .*Free space'),
        (OSError(errno.EROFS, 'x'), 'Read-only file system. .*Make the folder'),
        (OSError(errno.ENOENT, 'x'), 'No such file.*each a --work-dir of its own'),
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
        train(tmp_path, validate=True, checkpoint=BEST)
    check_folder(tmp_path)
    assert (tmp_path / 'iter_2.pth').is_file() and not list(tmp_path.glob(UNFINISHED))
    if target == 'iter_4.pth':
        assert {p.name for p in tmp_path.glob('iter*')} == {'iter_2.pth'}


# ------------------------------------------------------------------- killed writes


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The work folder of a whole run, and the names of what it did to the disk."""
    folder = tmp_path_factory.mktemp('undisturbed')
    names = folder / 'steps.txt'
    assert in_process(run, folder / 'run', names=names) == 0
    return folder / 'run', names.read_text().splitlines()


def check_same_end(work_dir, reference, last=LAST):
    ours = check_same_state(work_dir / last, reference / last)
    # nothing left over, neither half files nor outdated ones
    files = {p.name for p in work_dir.iterdir()}
    assert {n for n in files if n.startswith(('iter', 'epoch'))} == {last}
    assert not list(work_dir.glob(UNFINISHED))
    best = [str(path) for path in work_dir.glob('best_*')]
    named = ours['message_hub']['runtime_info'].get('best_ckpt')
    assert best == ([] if named is None else [named])


def left_in(folder):
    """Names and sizes of the checkpoints' files, and what the pointer names."""
    files = [path for path in folder.iterdir() if path.is_file()]
    pointer = folder / 'last_checkpoint'
    named = os.path.basename(pointer.read_text()) if pointer.exists() else ''
    return frozenset(
        (p.name, p.stat().st_size) for p in files if 'pth' in p.name
    ), named


def kill_and_resume(work_dir, undisturbed, fatal, seen=None):
    reference, steps = undisturbed
    print(f'killed at step {fatal} of {len(steps)}: {steps[fatal - 1]}')
    assert in_process(run, work_dir, fatal) == KILLED
    check_folder(work_dir)
    left = left_in(work_dir)
    if seen is not None:
        if left in seen:
            return
        seen.add(left)
    assert in_process(run, work_dir) == 0
    check_folder(work_dir)
    check_same_end(work_dir, reference)


def test_steps_are_what_they_should_be(undisturbed):
    """In this order: the file, the pointer to it, the removal of the one before."""
    folder, steps = undisturbed
    start = steps.index('begin iter_4.pth.mmrest-unfinished')
    assert steps[start : start + 11] == [
        'begin iter_4.pth.mmrest-unfinished',
        'half iter_4.pth.mmrest-unfinished',
        'before fsync',
        'before rename to iter_4.pth',
        'after rename to iter_4.pth',
        'before fsync',
        'before fsync',
        'before rename to last_checkpoint',
        'after rename to last_checkpoint',
        'before fsync',
        'before removal of iter_2.pth',
    ]
    assert (folder / 'last_checkpoint').read_text() == str(folder / LAST)
    assert any(step.startswith('after rename to best_') for step in steps)


# around the second checkpoint and the best one before it
@pytest.mark.parametrize(
    'name',
    [
        'half best_val_loss_iter_2.pth.mmrest-unfinished',
        'after rename to best_val_loss_iter_2.pth',
        'half iter_4.pth.mmrest-unfinished',
        'before rename to iter_4.pth',
        'after rename to iter_4.pth',
        'before removal of iter_2.pth',
    ],
)
def test_kill_at_a_step(undisturbed, tmp_path, name):
    kill_and_resume(tmp_path, undisturbed, undisturbed[1].index(name) + 1)


@pytest.mark.slow
def test_kill_at_any_step(undisturbed, tmp_path):
    """What leaves the same files is continued once."""
    seen = set()
    for fatal in range(1, len(undisturbed[1]) + 1):
        kill_and_resume(tmp_path / str(fatal), undisturbed, fatal, seen)


def test_kill_again_and_again(undisturbed, tmp_path):
    """Killed at each new start, at a random step of those that are left."""
    seed = random.randrange(2**32)
    print(f'seed {seed}')
    rng = random.Random(seed)
    for _ in range(4):
        exitcode = in_process(run, tmp_path, rng.randint(2, 14))
        check_folder(tmp_path)
        assert exitcode in (KILLED, 0)
    assert in_process(run, tmp_path) == 0
    check_same_end(tmp_path, undisturbed[0])


def test_mmengines_own_hook_fails_here(tmp_path):
    """That the checks above can fail: its file is left half written."""

    def run_theirs():
        DiskSteps(6)
        train(tmp_path, checkpoint=dict(type='CheckpointHook'))

    assert in_process(run_theirs) == KILLED
    with pytest.raises(CheckpointError, match=r'iter_4\.pth is not a usable'):
        check_folder(tmp_path)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The first is killed while it writes, the second by the launcher."""
    options = dict(validate=True, checkpoint=BEST, resume=True)
    options['randomness'] = dict(seed=3, diff_rank_seed=True)
    whole, folder = tmp_path / 'whole', tmp_path / 'run'

    def hooks(rank):
        if rank == 0:
            DiskSteps(24)
        return []

    assert exit_codes(train_in_two(whole, **options)) == [0, 0]
    first, second = train_in_two(folder, hooks, **options)
    assert exit_codes([first]) == [KILLED]
    second.kill()
    second.join(30)
    check_folder(folder)
    assert exit_codes(train_in_two(folder, **options)) == [0, 0]
    check_same_end(folder, whole)
    states = read_checkpoint(folder / LAST)['resume_state']['random_states']
    assert len(states) == 2 and not same(states[0], states[1])


def test_forged_list_of_outdated_files(tmp_path):
    """A checkpoint cannot make the run delete what is not its own."""
    folder = tmp_path / 'run'
    train(folder)
    for file in ('run/notes.txt', 'run/iter_1.pth', 'iter_1.pth'):
        (tmp_path / file).touch()
    saved = read_checkpoint(folder / LAST)
    saved['resume_state']['outdated'] = [
        'notes.txt',
        '../iter_1.pth',
        'best_/../../iter_1.pth',
        'iter_1.pth',
    ]
    torch.save(saved, folder / LAST)
    train(folder, resume=str(folder / LAST))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*.*')}
    assert {'run/notes.txt', 'iter_1.pth'} <= left
    assert 'run/iter_1.pth' not in left  # which is one of its own


class LargeItems(Images):
    """More than a pipe takes, from workers that leave their numbers in a folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __getitem__(self, index):
        (self.folder / str(os.getpid())).touch()
        item = super().__getitem__(index)
        item['data_samples'].set_metainfo(dict(comment=os.urandom(2**20)))
        return item


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
def test_workers_do_not_outlive_a_killed_process(tmp_path):
    """They would keep their memory for ever, waiting to hand over a batch."""
    folder = tmp_path / 'workers'
    folder.mkdir()
    hooks = [dict(type='PreemptionHook'), Calls(lambda: kill_self('SIGKILL'), train=3)]
    options = dict(loader_options=dict(num_workers=2), data=LargeItems(folder))
    assert in_process(train, tmp_path / 'run', hooks=hooks, **options) == KILLED
    workers = [path.name for path in folder.iterdir()]
    assert len(workers) >= 2
    end = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < end, 'workers are left'
        time.sleep(0.2)


def is_alive(process):
    try:
        stat = Path(f'/proc/{process}/stat').read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(') ')[2][0] != 'Z'  # an orphan nobody asks for its status
