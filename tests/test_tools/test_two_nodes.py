"""Two machines: here two launchers of two processes each, over the loopback."""

import os
import signal
import subprocess

import pytest
from tool_process import free_port
from tool_runs import NO_VAL, OPTIONS, iterations

pytestmark = pytest.mark.slow


def kill_all(pid):
    """As a machine that loses its power: every process at once."""
    children = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_all(int(child))


def test_a_node_dies_and_a_node_is_preempted(start, finish, config, tmp_path):
    options = ['--work-dir', tmp_path / 'run', '--resume', '--cfg-options', *NO_VAL]
    options += [*OPTIONS, 'default_hooks.checkpoint.interval=2']

    def start_both():
        shared = dict(NNODES='2', PORT=free_port())
        command = ('dist_train.sh', config, 2, *options)
        return [start(*command, NODE_RANK=str(rank), **shared) for rank in range(2)]

    nodes = start_both()
    nodes[0].wait_for(r'Iter\(train\) *\[ *4/')
    kill_all(nodes[1].process.pid)
    assert nodes[0].end() not in (0, 75), nodes[0].output[-4000:]

    nodes = start_both()
    nodes[0].wait_for(r'resumed epoch: 0, iter: \d+')
    nodes[0].wait_for(r'Iter\(train\)')
    nodes[1].process.send_signal(signal.SIGTERM)
    assert [node.end() for node in nodes] == [75, 75], nodes[0].output[-4000:]
    assert 'a signal to another process' in nodes[0].output
    done = iterations(nodes[0].output)[-1]

    options.append(f'train_cfg.max_iters={done + 1}')
    output = finish('train.py', config, *options, ranks=4)
    assert iterations(output) == [done + 1]
