"""A data set of two shapes, a config for it as a user writes one, and processes."""

import signal
from pathlib import Path

import numpy as np
import pytest
from dirty_files import Dataset, encode, polygon
from dirty_sandbox import MODEL
from PIL import Image
from tool_runs import Started

CONFIG = """
_base_ = 'mmrest::mask_rcnn/rest_lite_fpn_1x.py'

data_root = {root!r}
metainfo = dict(classes=('box', 'diamond'))
{model}train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(120, 80), keep_ratio=True, backend='pillow'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='train.json',
        data_prefix=dict(img='images'),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='val.json',
        data_prefix=dict(img='images'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""

# Without masks. The repository's own augmentation enlarges to 1600 pixels.
RETINA = """
_base_ = 'mmrest::retinanet/rest_lite_fpn_1x.py'

shapes = dict(
    data_root={root!r},
    data_prefix=dict(img='images'),
    metainfo=dict(classes=('box', 'diamond')),
)
load = dict(type='LoadImageFromFile')
resize = dict(type='Resize', scale=(120, 80), keep_ratio=True)
annotations = dict(type='LoadAnnotations', with_bbox=True)
keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
pack = dict(type='PackDetInputs', meta_keys=keys)
flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
tta_pipeline = [
    load,
    dict(
        type='TestTimeAug',
        transforms=[
            [resize],
            flips,
            [annotations],
            [dict(pack, meta_keys=keys + ('flip', 'flip_direction'))],
        ],
    ),
]
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[8, 16, 32, 64],
            num_heads=[1, 2, 4, 8],
            depths=[1, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
        ),
        init_cfg=None,
    ),
    neck=dict(in_channels=[16, 32, 64], out_channels=16),
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1),
    test_cfg=dict(score_thr=0, max_per_img=10),
)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    dataset=dict(
        ann_file='train.json',
        pipeline=[load, annotations, dict(type='PackDetInputs')],
        **shapes,
    ),
    **loader,
)
val_dataloader = dict(
    dataset=dict(
        ann_file='val.json', pipeline=[load, resize, annotations, pack], **shapes
    ),
    **loader,
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={root!r} + '/val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


def write_dataset(root: Path, train: int = 6, val: int = 5) -> None:
    """Boxes and diamonds on grey, 96x64 pixels, in COCO format.

    The number of validation images is odd, so that two processes share them
    unevenly.
    """
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        part = Dataset(root, (1, 2), ('box', 'diamond'))
        for index in range(count):
            pixels, objects = rng.integers(90, 140, (64, 96, 3), dtype=np.uint8), []
            for label in range(2):
                x, y = int(rng.integers(0, 20)) + 48 * label, int(rng.integers(0, 30))
                side = int(rng.integers(16, 28))
                pixels[y : y + side, x : x + side] = (200, 40, 40) if label else 20
                objects.append([x, y, side, side])
            image = encode(Image.fromarray(pixels))
            key = part.add_image(f'{split}_{index}.jpg', image)
            for label, box in enumerate(objects, 1):
                outline = diamond(*box) if label == 2 else polygon(box)
                fields = dict(area=box[2] * box[3], segmentation=[outline])
                part.add_object(key, box, category_id=label, **fields)
        part.write(f'{split}.json')


def diamond(x, y, width, height):
    middle = x + width / 2, y + height / 2
    return [middle[0], y, x + width, middle[1], middle[0], y + height, x, middle[1]]


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A fresh data set that a test may damage."""
    write_dataset(tmp_path / 'shapes')
    return tmp_path / 'shapes'


@pytest.fixture(scope='session')
def config(tmp_path_factory) -> Path:
    """A user's config outside the repository, with its data."""
    folder = tmp_path_factory.mktemp('project')
    write_dataset(folder / 'shapes')
    path = folder / 'shapes.py'
    path.write_text(CONFIG.format(root=str(folder / 'shapes'), model=MODEL))
    return path


@pytest.fixture(scope='session')
def retina(config) -> Path:
    """Another config for the same data, of a detector without masks."""
    path = config.parent / 'retina.py'
    path.write_text(RETINA.format(root=str(config.parent / 'shapes')))
    return path


@pytest.fixture(scope='session')
def trained(call, config, tmp_path_factory):
    """Work folder and output of a run of four iterations, started elsewhere."""
    folder = tmp_path_factory.mktemp('elsewhere')
    options = ['--work-dir', 'run', '--resume', '--tensorboard']
    return folder / 'run', call('train.py', config, *options, cwd=folder)


@pytest.fixture
def start(repo, tmp_path):
    """Start a tool; what still runs at the end of the test is ended."""

    started = []

    def start_tool(*args, **variables):
        started.append(Started(repo, tmp_path, *args, **variables))
        return started[-1]

    yield start_tool
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
            one.process.wait(60)
