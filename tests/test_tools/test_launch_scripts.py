"""The shell scripts hand every word on unchanged; srun and python are stand-ins."""

import os
import subprocess

import pytest

ECHO = '#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n'


@pytest.fixture
def call(repo, tmp_path):
    """Run a script from a folder of its own and list the words it would start."""
    for name in ('srun', 'python'):
        (tmp_path / name).write_text(ECHO)
        (tmp_path / name).chmod(0o755)

    def call_script(script, *args, **environment):
        path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
        kept = {k: v for k, v in os.environ.items() if k not in ('PYTHON', 'PORT')}
        return subprocess.run(
            [str(repo / 'tools' / script), *args],
            cwd=tmp_path,
            env=kept | dict(PATH=path) | environment,
            capture_output=True,
            text=True,
        )

    return call_script


SPACED = 'a.b=[(1, 2)]'


@pytest.mark.parametrize(
    ('script', 'args', 'tool'),
    [
        ('slurm_train.sh', ('gpu', 'job', 'c.py', 'work'), 'train.py'),
        ('slurm_test.sh', ('gpu', 'job', 'c.py', 'x.pth'), 'test.py'),
    ],
)
def test_slurm(call, repo, script, args, tool):
    done = call(script, *args, '--cfg-options', SPACED, GPUS='16')
    words = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert words[:2] == ['-p', 'gpu'] and '--job-name=job' in words
    assert '--ntasks=16' in words and '--gres=gpu:8' in words
    start = words.index('python')
    assert words[start + 2 : start + 4] == [str(repo / 'tools' / tool), 'c.py']
    assert words[-3:] == ['--launcher=slurm', '--cfg-options', SPACED]
    assert ('--work-dir=work' in words) is (tool == 'train.py')


def test_slurm_asks_for_no_more_gpus_a_node_than_in_all(call):
    words = call('slurm_train.sh', 'p', 'j', 'c.py', 'w', GPUS='2').stdout.split()
    assert '--gres=gpu:2' in words and '--ntasks-per-node=2' in words


@pytest.mark.parametrize(
    ('script', 'args', 'tool'),
    [
        ('dist_train.sh', ('c.py', '4'), 'train.py'),
        ('dist_test.sh', ('c.py', 'x.pth', '4'), 'test.py'),
    ],
)
def test_dist_takes_the_usual_variables(call, repo, script, args, tool):
    done = call(
        script,
        *args,
        '--cfg-options',
        SPACED,
        NNODES='2',
        NODE_RANK='1',
        PORT='29999',
        MASTER_ADDR='10.0.0.1',
    )
    words = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    for option in (
        '--nnodes=2',
        '--node_rank=1',
        '--master_addr=10.0.0.1',
        '--master_port=29999',
        '--nproc_per_node=4',
    ):
        assert option in words
    assert str(repo / 'tools' / tool) in words
    assert words[-4:] == ['--launcher', 'pytorch', '--cfg-options', SPACED]


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_usage(call, script):
    done = call(script, 'c.py')
    assert done.returncode == 2 and done.stderr.startswith('usage: ')


@pytest.mark.parametrize('count', ['0', 'x.pth', '-1', ''])
def test_number_of_processes(call, count):
    done = call('dist_train.sh', 'c.py', count)
    assert done.returncode == 2 and f"found '{count}'" in done.stderr
