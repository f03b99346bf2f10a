"""ResT in several processes: every parameter takes part in every step."""

import subprocess
import sys
from pathlib import Path


def test_no_parameter_is_unused(repo):
    worker = Path(__file__).with_name('ddp_worker.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc_per_node', '2', str(worker)]
    result = subprocess.run(
        command, cwd=repo, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert '18 cases passed' in result.stdout
