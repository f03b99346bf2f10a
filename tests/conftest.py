"""Fixtures that all tests share."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
# so that tests can import weights_rule and the helpers of test_ops
sys.path[:0] = [str(TESTS), str(TESTS / 'test_ops')]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope='session')
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """The golden arrays and key lists."""
    return TESTS / 'data'


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of real images and reference files; not on a user's machine."""
    path = Path(os.environ.get('MMREST_SHARED', REPO.parent / 'shared'))
    if not (path / 'data').is_dir():
        pytest.skip(f'needs the real data of {path} (or set MMREST_SHARED)')
    return path


@pytest.fixture(scope='session')
def published_shapes(data_dir: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each published ImageNet checkpoint its keys and shapes."""
    text = (data_dir / 'imagenet_checkpoint_keys.json').read_text()
    return {
        arch: {key: tuple(shape) for key, shape in keys.items()}
        for arch, keys in json.loads(text).items()
    }
