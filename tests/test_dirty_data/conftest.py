"""A data set that a test may spoil, and datasets built from it."""

import pytest
from dirty_sandbox import Sandbox
from mmengine.registry import DATASETS, init_default_scope


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.fixture
def build():
    """Build the dataset of a split as the Runner does."""

    def build_dataset(cfg, split):
        init_default_scope('mmdet')
        return DATASETS.build(cfg[f'{split}_dataloader'].dataset)

    return build_dataset
