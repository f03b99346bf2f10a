"""The training tools killed from outside at random moments, and resumed."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from kill_checks import UNFINISHED, check_folder, check_same_state

ITERS, KILLS = 45, 10
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
OPTIONS = [
    '--no-preflight',
    '--resume',
    '--cfg-options',
    f'train_cfg.max_iters={ITERS}',
    'randomness.seed=7',
    'val_cfg=None',
    'val_dataloader=None',
    'val_evaluator=None',
    'default_hooks.checkpoint.interval=3',
    'default_hooks.checkpoint.max_keep_ckpts=2',
]


def family(process):
    """A process and its descendants; torchrun puts each into a session of its own."""
    parents = {}
    for status in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = status.read_text().rpartition(')')[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        parents[int(status.parent.name)] = int(fields[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


class Training:
    """A tool as a process group; its iterations are counted from its output."""

    def __init__(self, command, folder, port):
        self.iterations, self.lines = 0, []
        self._news = threading.Condition()
        path = os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])
        self.process = subprocess.Popen(
            [*map(str, command)],
            cwd=folder,
            env=dict(
                os.environ,
                PYTHON=sys.executable,
                PYTHONPATH=path,
                OMP_NUM_THREADS='1',
                CUDA_VISIBLE_DEVICES='',
                PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self.iterations += bool(re.search(r'Iter\(train\)', line))
                self._news.notify_all()
        with self._news:
            self.iterations = ITERS  # it has ended; wait no longer
            self._news.notify_all()

    def kill(self, iterations, delay):
        """Kill it some time after so many iterations; whether it was alive."""
        with self._news:
            reached = self._news.wait_for(lambda: self.iterations >= iterations, 300)
        assert reached, self.output()
        time.sleep(delay)
        was_alive = self.process.poll() is None
        self.end()
        return was_alive

    def end(self):
        for process in family(self.process.pid):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        self._reader.join(30)

    def finish(self):
        assert self.process.wait(300) == 0, self.output()
        self._reader.join(30)

    def output(self):
        return ''.join(self.lines[-60:])


@pytest.fixture
def slow_config(config, tmp_path):
    """The user's config on a slow disk."""
    (tmp_path / 'slow_disk.py').write_text(SLOW_DISK)
    imports = dict(imports=['mmrest', 'slow_disk'], allow_failed_imports=False)
    text = f'_base_ = {str(config)!r}\ncustom_imports = {imports!r}\n'
    (tmp_path / 'slow.py').write_text(text)
    return tmp_path / 'slow.py'


def command(repo, config, work_dir, processes):
    tools = repo / 'tools'
    start = [sys.executable, tools / 'train.py', config]
    if processes > 1:
        start = [tools / 'dist_train.sh', config, processes]
    return [*start, '--work-dir', work_dir, *OPTIONS]


@pytest.fixture
def start(repo, slow_config, free_ports, tmp_path):
    """Start a tool in a work folder."""
    started = []

    def start_training(work_dir, processes):
        words = command(repo, slow_config, work_dir, processes)
        started.append(Training(words, tmp_path, next(free_ports)))
        return started[-1]

    yield start_training
    for training in started:
        training.end()


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
@pytest.mark.parametrize('processes', [1, 2])
def test_killed_ten_times(start, tmp_path, processes):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    whole, run = tmp_path / 'whole', tmp_path / 'run'
    start(whole, processes).finish()
    lost_writes = 0
    for number in range(KILLS):
        training = start(run, processes)
        moment = rng.randint(1, 4), rng.uniform(0, 0.5)
        print(f'seed {seed}, kill {number}: {moment}')
        assert training.kill(*moment), training.output()
        check_folder(run)
        lost_writes += len(list(run.glob(UNFINISHED)))
    print(f'{lost_writes} of the kills were in the middle of a file')
    start(run, processes).finish()
    check_folder(run)
    saved = check_same_state(run / f'iter_{ITERS}.pth', whole / f'iter_{ITERS}.pth')
    assert len(saved['resume_state']['random_states']) == processes
    names = {path.name for path in run.iterdir() if path.is_file()}
    assert {n for n in names if n.startswith('iter')} == {'iter_42.pth', 'iter_45.pth'}
    assert not list(run.glob(UNFINISHED))


def test_damaged_newest_checkpoint(run, config, trained, tmp_path):
    """The one before is taken with a warning; if both are damaged, none."""
    source, _ = trained
    for name in ('iter_2.pth', 'iter_4.pth'):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_4.pth'))
    os.truncate(tmp_path / 'iter_4.pth', 20000)
    options = ['--work-dir', tmp_path, '--resume', '--no-preflight', '--cfg-options']
    options += ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
    output = run('train.py', config, *options, cwd=tmp_path)
    assert re.findall(r'Iter\(train\) *\[(\d)/4', output) == ['3', '4']
    warning = next(line for line in output.splitlines() if 'WARNING - last_' in line)
    assert 'iter_4.pth' in warning and 'iter_2.pth, the newest that is' in warning
    check_folder(tmp_path)  # iter_4.pth is new
    for name in ('iter_2.pth', 'iter_4.pth'):
        os.truncate(tmp_path / name, 20000)
    output = run('train.py', config, *options, cwd=tmp_path, fails=True)
    assert 'tools/train.py: ' in output and 'no whole checkpoint' in output
    assert 'Traceback' not in output and 'Iter(train)' not in output
