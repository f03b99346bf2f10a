"""A full disk and a read-only folder: told clearly, and earlier files are whole."""

import resource
import shutil
import subprocess
import sys

import pytest
from tool_process import environment_of
from tool_runs import NO_VAL, iterations

from mmrest.checkpoint import read_checkpoint

SAVED = ['train_cfg.max_iters=6', 'default_hooks.checkpoint.max_keep_ckpts=-1']


@pytest.fixture
def train(repo, config, tmp_path):
    def run(folder, *options, limit=None, flags=()):
        """Exit status and output of a training in ``folder``."""

        def limit_files():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [sys.executable, repo / 'tools' / 'train.py', config]
        command += ['--work-dir', folder, *flags]
        done = subprocess.run(
            [*map(str, command), '--cfg-options', *NO_VAL, *SAVED, *options],
            cwd=tmp_path,
            env=environment_of(repo),
            preexec_fn=limit_files if limit else None,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def mount(tmp_path):
    """Mount a file system of its own on a new folder."""
    mounted = []

    def mount_new(options):
        folder = tmp_path / f'mounted{len(mounted)}'
        folder.mkdir()
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'needs the right to mount a tmpfs: {done.stderr.strip()}')
        mounted.append(folder)
        return folder

    if not (shutil.which('mount') and shutil.which('umount')):
        pytest.skip('needs mount and umount')
    yield mount_new
    for folder in mounted:
        subprocess.run(['umount', str(folder)], check=True)


def assert_ended_well(folder, status, output, free):
    """Status, message, and a checkpoint of iteration 2 that is the last and whole."""
    assert status == 1, output[-4000:]
    assert 'Traceback' not in output and 'Logging error' not in output, output[-6000:]
    message = output[output.rindex('tools/train.py: ') :]
    assert str(folder / 'iter_4.pth') in message and free in message
    assert 'bytes are free' in message and '--resume' in message
    assert (folder / 'last_checkpoint').read_text() == str(folder / 'iter_2.pth')
    assert {path.name for path in folder.glob('iter_*')} == {'iter_2.pth'}
    assert not list(folder.glob('*unfinished*'))
    assert read_checkpoint(folder / 'iter_2.pth')['meta']['iter'] == 2


@pytest.mark.slow
def test_file_larger_than_allowed(train, finish, config, tmp_path):
    folder = tmp_path / 'run'
    command = ['train.py', config, '--work-dir', folder, '--resume', '--cfg-options']
    command += [*NO_VAL, *SAVED]
    finish(*command, 'train_cfg.max_iters=2')
    size = (folder / 'iter_2.pth').stat().st_size
    status, output = train(folder, limit=size // 2, flags=['--resume'])
    assert_ended_well(folder, status, output, 'File too large')
    assert iterations(finish(*command, 'train_cfg.max_iters=4')) == [3, 4]


@pytest.mark.slow
def test_full_disk(fork, config, trained, mount):
    size = (trained[0] / 'iter_2.pth').stat().st_size
    folder = mount(f'size={int(1.6 * size)}') / 'run'
    options = ['--work-dir', folder, '--cfg-options', *NO_VAL, *SAVED]
    run = fork('train.py', config, *options)
    assert_ended_well(folder, run.end(), run.output, 'No space left on device')


def test_folder_that_cannot_be_written_is_told_first(call, config, mount, tmp_path):
    folder = mount('ro')
    work_dir = ['--work-dir', folder / 'run']
    output = call('train.py', config, *work_dir, cwd=tmp_path, fails=True)
    assert f'--work-dir: nothing can be written in {folder}/run (in {folder})' in output
    assert 'Read-only file system' in output and 'bytes are free' in output
    assert 'Iter(train)' not in output


def test_full_folder_is_told_first(call, config, mount, tmp_path):
    folder = mount('size=8k')
    work_dir = ['--work-dir', folder]
    output = call('train.py', config, *work_dir, cwd=tmp_path, fails=True)
    assert 'Traceback' not in output, output[-4000:]
    assert f'nothing can be written in {folder}: No space left on device' in output


def test_work_dir_that_is_a_file_is_told_first(call, config, tmp_path):
    (tmp_path / 'file').write_text('mine')
    work_dir = ['--work-dir', tmp_path / 'file' / 'run']
    output = call('train.py', config, *work_dir, cwd=tmp_path, fails=True)
    assert 'it is a file' in output or 'Not a directory' in output
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.slow
def test_log_that_cannot_be_written_costs_a_line(train, tmp_path):
    """The limit is reached by the log's last lines; there is no checkpoint."""
    options = ['default_hooks.checkpoint=None', 'train_cfg.max_iters=2']
    first, second = tmp_path / 'run1', tmp_path / 'run2'
    quiet = ['--no-preflight']  # which would refuse
    assert train(first, *options, flags=quiet)[0] == 0
    size = next(first.glob('*/*.log')).stat().st_size
    status, output = train(second, *options, limit=size - 200, flags=quiet)
    assert status == 0, output[-4000:]
    assert output.count('cannot be written: File too large') == 1, output[-4000:]
    assert 'Logging error' not in output
