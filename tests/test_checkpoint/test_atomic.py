"""Files are written whole or not at all; what a kill leaves is in tests/test_hooks."""

import errno
import os
from pathlib import Path

import pytest
import torch

from mmrest.checkpoint import CheckpointWriteError
from mmrest.checkpoint.atomic import (
    atomic_path,
    atomic_save,
    atomic_write,
    remove_unfinished,
)


def fail_to_sync(descriptor):
    raise OSError(errno.ENOSPC, 'full')


def test_old_content_stays_until_the_new_is_whole(tmp_path, monkeypatch):
    path = tmp_path / 'folder' / 'file'
    atomic_write(path, b'old')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail_to_sync)
        with pytest.raises(CheckpointWriteError, match='no part of this one is left'):
            atomic_write(path, b'new')
        with pytest.raises(OSError, match='full'), atomic_path(path) as beside:
            Path(beside).write_bytes(b'new')
    assert path.read_bytes() == b'old' and len(list(path.parent.iterdir())) == 1
    atomic_write(path, b'new')
    assert path.read_bytes() == b'new'


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The content first, then the name, then the folder that holds the name."""
    steps = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor):
        kind = 'folder' if os.path.isdir(f'/dev/fd/{descriptor}') else 'file'
        steps.append(kind)
        sync(descriptor)

    def noted_replace(source, path):
        steps.append('name')
        replace(source, path)

    monkeypatch.setattr(os, 'fsync', noted_sync)
    monkeypatch.setattr(os, 'replace', noted_replace)
    atomic_write(tmp_path / 'a', b'x')
    assert steps == ['file', 'name', 'folder']


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_an_error_says_what_to_do(tmp_path, monkeypatch, number):
    def fail(source, path):
        raise OSError(number, 'x')

    monkeypatch.setattr(os, 'replace', fail)
    advice = 'Make the folder writable' if number == errno.EROFS else 'Free space'
    with pytest.raises(CheckpointWriteError, match=advice) as error:
        atomic_write(tmp_path / 'a', b'x')
    assert ('quota' in str(error.value)) is (number == errno.EDQUOT)
    assert not list(tmp_path.iterdir())


def test_another_error_is_not_called_one_of_writing(tmp_path):
    def save(beside):
        raise RuntimeError('CUDA error')

    with pytest.raises(RuntimeError, match='^CUDA error$'):
        atomic_save(str(tmp_path / 'a.pth'), save)


def test_every_process_ends_if_one_cannot_write(tmp_path, monkeypatch):
    def gathered(problem):
        return [problem, 'b.pth could not be written: disk on fire']

    monkeypatch.setattr('mmrest.checkpoint.atomic.all_gather_object', gathered)
    with pytest.raises(CheckpointWriteError, match='^b.pth .* on fire$'):
        atomic_save(
            str(tmp_path / 'a.pth'), lambda beside: atomic_write(beside, b'new')
        )
    assert not list(tmp_path.iterdir())


def test_sharded_folder_replaces_an_older_one(tmp_path):
    def save(beside):
        os.makedirs(beside)
        torch.save({}, f'{beside}/rank0.pth')

    for _ in range(2):
        atomic_save(str(tmp_path / 'iter_1.pth'), save)
    assert [p.name for p in tmp_path.rglob('*')] == ['iter_1.pth', 'rank0.pth']


def test_only_our_own_leftovers_are_removed(tmp_path):
    names = ['iter_1.pth.mmrest-unfinished', 'iter_2.pth', 'notes.tmp', 'iter_3.part']
    for name in names:
        (tmp_path / name).touch()
    assert remove_unfinished(tmp_path) == names[:1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])
    assert remove_unfinished(tmp_path / 'missing') == []
