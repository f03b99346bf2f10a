"""The tools as processes that get real signals: statuses, checkpoints, resuming."""

import os
import signal
import time

import pytest
from tool_runs import NO_VAL, OPTIONS, iterations

from mmrest.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow


def latest(folder):
    path = (folder / 'last_checkpoint').read_text()
    return read_checkpoint(path)['meta']['iter']


# the script hands on a SIGUSR1 as SIGTERM, see test_requeue_scripts.py
@pytest.mark.parametrize(
    ('tool', 'name'), [('train.py', 'SIGTERM'), ('dist_train.sh', 'SIGUSR1')]
)
def test_signal_saves_and_asks_for_more(start, fork, config, tmp_path, tool, name):
    folder = tmp_path / 'run'
    options = ['--work-dir', folder, '--resume', '--cfg-options', *NO_VAL, *OPTIONS]
    count = [2] if tool == 'dist_train.sh' else []
    run = start(tool, config, *count, *options)
    run.wait_for(r'Iter\(train\)')
    run.process.send_signal(getattr(signal, name))
    assert run.end() == 75, run.output[-4000:]
    done = latest(folder)
    # with two processes one may have logged an iteration that the file lacks
    assert done == iterations(run.output)[-1]
    assert f'after iteration {done}, saved as {folder}/iter_{done}.pth' in run.output
    if tool == 'dist_train.sh':
        assert run.output.rstrip().endswith('Exit status 75.')

    options.append(f'train_cfg.max_iters={done + 2}')
    again = fork('train.py', config, *options, ranks=1 + len(count))
    assert again.end() == 0, again.output[-4000:]
    assert iterations(again.output)[-2:] == [done + 1, done + 2]


def test_signal_before_the_training_asks_for_more(fork, config, tmp_path):
    """There is nothing to save."""
    pipe = tmp_path / 'load_from'
    os.mkfifo(pipe)  # reading it waits for a writer
    options = ['--no-preflight', '--cfg-options', f'load_from={pipe}', *NO_VAL]
    run = fork('train.py', config, *options)
    end = time.monotonic() + 240
    while True:  # opening succeeds as soon as the tool reads
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            assert run.process.poll() is None, run.output[-4000:]
            assert time.monotonic() < end
            time.sleep(0.05)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75, run.output[-4000:]
    os.close(writer)
    assert 'SIGTERM before the training began' in run.output
    assert 'Traceback' not in run.output
