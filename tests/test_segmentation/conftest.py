"""A segmentation set of two shapes, and a config for it as a user writes one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CONFIG = """
_base_ = 'mmrest::semantic_fpn/rest_lite_fpn_80k_ade20k_512x512.py'

data_root = {root!r}
metainfo = dict(
    classes=('ground', 'box', 'disc'),
    palette=[[90, 90, 90], [200, 40, 40], [40, 40, 200]],
)
model = dict(
    data_preprocessor=dict(size=(48, 64)),
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[8, 16, 24, 32],
            num_heads=[1, 2, 2, 4],
            depths=[1, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratios=2,
        ),
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    decode_head=dict(in_channels=[16, 16, 16, 16], channels=16, num_classes=3),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 48), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
shapes = dict(
    type='BaseSegDataset',
    data_root=data_root,
    img_suffix='.png',
    metainfo=metainfo,
)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='train', seg_map_path='train_labels'),
        pipeline=train_pipeline,
        **shapes,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='val', seg_map_path='val_labels'),
        pipeline=test_pipeline,
        **shapes,
    ),
)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


def write_dataset(root: Path, train: int = 4, val: int = 3) -> None:
    """Boxes and discs on noise, 70x50 pixels; a frame of 255 is no class."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:50, :70]
    for split, count in (('train', train), ('val', val)):
        for folder in (split, f'{split}_labels'):
            (root / folder).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(90, 140, (50, 70, 3), dtype=np.uint8)
            labels = np.zeros((50, 70), np.uint8)
            x, y = rng.integers(4, 14, 2)
            labels[y : y + 18, x : x + 18] = 1
            x, y = rng.integers(45, 55), rng.integers(18, 32)
            labels[(rows - y) ** 2 + (columns - x) ** 2 < 100] = 2
            pixels[labels == 1] = (200, 40, 40)
            pixels[labels == 2] = (40, 40, 200)
            labels[[0, -1]] = 255
            Image.fromarray(pixels).save(root / split / f'{index}.png')
            Image.fromarray(labels).save(root / f'{split}_labels' / f'{index}.png')


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A fresh data set that a test may damage."""
    write_dataset(tmp_path / 'shapes')
    return tmp_path / 'shapes'


@pytest.fixture(scope='session')
def config(tmp_path_factory) -> Path:
    """A user's config outside the repository, with its data."""
    folder = tmp_path_factory.mktemp('seg_project')
    write_dataset(folder / 'shapes')
    path = folder / 'shapes.py'
    path.write_text(CONFIG.format(root=str(folder / 'shapes')))
    return path
