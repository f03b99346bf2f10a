"""ResT in several processes: no parameter unused, and the gradients of one process."""

import subprocess
import sys
from pathlib import Path

import pytest


def launch(repo, processes, what):
    worker = Path(__file__).with_name('ddp_worker.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc_per_node', str(processes), str(worker), what]
    result = subprocess.run(
        command, cwd=repo, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # a gradient in another layout than its parameter costs a copy in every step
    assert 'strides do not match' not in result.stderr
    return result.stdout


def test_no_parameter_is_unused(repo):
    assert '18 cases passed' in launch(repo, 2, 'unused')


@pytest.mark.slow
def test_restv2(repo):
    assert '8 cases passed' in launch(repo, 2, 'unused_v2')
    assert '8 cases passed' in launch(repo, 2, 'equal_v2')


def test_no_parameter_of_a_variant_is_unused(repo):
    assert '22 cases passed' in launch(repo, 2, 'variants')


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_gradients_do_not_depend_on_the_number_of_processes(repo, processes):
    """For every ``frozen_stages``, with and without ``with_cp``, frozen BN and GN."""
    assert '24 cases passed' in launch(repo, processes, 'equal')
