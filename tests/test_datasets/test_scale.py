"""A data set of COCO's size is checked in seconds, and in little memory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_as_many_annotations_as_coco(repo, tmp_path):
    """The bounds are for busy machines: 15 s are meant, see docs/dirty_data.md."""
    script = Path(__file__).with_name('large_files.py')
    output = subprocess.run(
        [sys.executable, script, tmp_path / 'data'],
        cwd=repo,
        env={'PYTHONPATH': str(repo), 'PATH': '', 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    print(output)
    assert '118000 images, 860000 annotations, 80 classes' in output
    cpu, memory = re.search(r'([\d.]+) s of CPU time, ([\d.]+) GB', output).groups()
    assert float(cpu) < 40 and float(memory) < 2
