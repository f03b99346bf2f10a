"""ResT in several processes: no parameter unused, and the gradients of one process."""

import subprocess
import sys
from pathlib import Path

import pytest


def launch(repo, processes, *groups):
    """Run groups of cases of ddp_worker.py; how many have passed of each."""
    worker = Path(__file__).with_name('ddp_worker.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc_per_node', str(processes), str(worker), *groups]
    result = subprocess.run(
        command, cwd=repo, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # a gradient in another layout than its parameter costs a copy in every step
    assert 'strides do not match' not in result.stderr
    return result.stdout.split()


def test_every_parameter_is_used_and_gradients_are_those_of_one_process(repo):
    """For every ``frozen_stages``, with and without ``with_cp``, frozen BN and GN."""
    assert launch(repo, 2, 'unused', 'variants', 'equal') == ['18', '22', '24']


@pytest.mark.parametrize('processes', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_number_of_processes(repo, processes):
    assert launch(repo, processes, 'equal') == ['24']


@pytest.mark.slow
def test_restv2(repo):
    assert launch(repo, 2, 'unused_v2', 'equal_v2') == ['8', '8']
