"""Files that are no checkpoints, and files that try to run something."""

import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

# the tests here share toy_run.py
sys.path.insert(0, str(Path(__file__).parent))


class Payload:
    """Touches a file when it is unpickled without safety."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {shlex.quote(str(self.marker))}',)


@pytest.fixture
def payload(tmp_path):
    """An object that touches ``payload.marker``; checks that it never does."""
    payload = Payload(tmp_path / 'executed')
    yield payload
    assert not payload.marker.exists(), 'the payload was executed'


@pytest.fixture
def weights():
    """A state dict of a linear layer."""
    return {'weight': torch.randn(4, 3), 'bias': torch.randn(4)}


@pytest.fixture
def save(tmp_path):
    """Save an object as a checkpoint and return its path."""

    def save(content, name='checkpoint.pth', **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return str(tmp_path / name)

    return save
