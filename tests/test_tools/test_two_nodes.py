"""Two machines: here two launchers of two processes each, over the loopback."""

import os
import signal
import subprocess

import pytest
from tool_process import command_of, environment_of
from tool_runs import NO_VAL, OPTIONS, Started, iterations

pytestmark = pytest.mark.slow


class Node(Started):
    """What one machine starts; its output goes into a file of a folder."""

    def __init__(self, rank, repo, folder, port, *args):
        self._path = folder / f'node{rank}_{len(list(folder.glob("node*")))}'
        variables = dict(NNODES='2', NODE_RANK=str(rank), PORT=port)
        with open(self._path, 'w') as file:
            self.process = subprocess.Popen(
                command_of(repo, 'dist_train.sh', args),
                cwd=folder,
                env={**environment_of(repo), **variables, 'PYTHONUNBUFFERED': '1'},
                stdout=file,
                stderr=subprocess.STDOUT,
            )


def kill_all(pid):
    """As a machine that loses its power: every process at once."""
    children = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_all(int(child))


def test_a_node_dies_and_a_node_is_preempted(repo, config, tmp_path):
    options = ['--work-dir', tmp_path / 'run', '--resume', '--cfg-options', *NO_VAL]
    options += [*OPTIONS, 'default_hooks.checkpoint.interval=2']
    nodes = []

    def start(*more):
        port = environment_of(repo)['PORT']
        command = (repo, tmp_path, port, config, 2, *options, *more)
        nodes[:] = [Node(rank, *command) for rank in range(2)]

    try:
        start()
        nodes[0].wait_for(r'Iter\(train\) *\[ *4/')
        kill_all(nodes[1].process.pid)
        assert nodes[0].end() not in (0, 75), nodes[0].output[-4000:]

        start()
        nodes[0].wait_for(r'resumed epoch: 0, iter: \d+')
        nodes[0].wait_for(r'Iter\(train\)')
        nodes[1].process.send_signal(signal.SIGTERM)
        assert [node.end() for node in nodes] == [75, 75], nodes[0].output[-4000:]
        assert 'a signal to another process' in nodes[0].output
        done = iterations(nodes[0].output)[-1]

        start(f'train_cfg.max_iters={done + 1}')
        assert [node.end() for node in nodes] == [0, 0], nodes[0].output[-4000:]
        assert iterations(nodes[0].output) == [done + 1]
    finally:
        for node in nodes:
            if node.process.poll() is None:
                kill_all(node.process.pid)
