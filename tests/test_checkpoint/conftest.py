"""Files that are no checkpoints, and files that try to run something."""

import os
import shlex

import pytest
import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmrest.checkpoint import force_safe_loading
from mmrest.checkpoint.safe_globals import FORCE_SAFE, FORCE_UNSAFE


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


@pytest.fixture(autouse=True)
def as_after_import(monkeypatch):
    """MMEngine's loaders and the environment are as after ``import mmrest``."""
    for name in (FORCE_SAFE, FORCE_UNSAFE):
        monkeypatch.setenv(name, '')  # so that it is undone
        monkeypatch.delenv(name)
    register = CheckpointLoader.register_scheme
    register('', mmengine_checkpoint.load_from_local, force=True)
    addresses = ('http://', 'https://')
    register(addresses, mmengine_checkpoint.load_from_http, force=True)
    if hasattr(mmengine_checkpoint, 'get_torch_safe_globals'):  # OneDL's
        own = mmengine_checkpoint.get_torch_safe_globals
        monkeypatch.setattr(mmengine_checkpoint, 'get_torch_safe_globals', own)


@pytest.fixture
def safe_loading(as_after_import):
    """As in the tools."""
    assert force_safe_loading()
