"""Two data sets that a test may spoil, and a tiny Mask R-CNN for them.

The pipelines are those of this repository's configs, for smaller images.
"""

import copy
import functools
import tempfile
from pathlib import Path

from dirty_files import CLASSES, Dataset, encode, rgb
from mmengine.config import Config

# a tiny Mask R-CNN for two classes
MODEL = """\
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[8, 16, 24, 32],
            num_heads=[1, 2, 3, 4],
            depths=[1, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratios=2,
        ),
        init_cfg=None,
    ),
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=2),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=2),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20)),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=10)),
)
"""
CONFIG = """
_base_ = 'mmrest::mask_rcnn/rest_lite_fpn_1x.py'

root = {root!r}
metainfo = dict(classes={classes})
{model}data = dict(data_root=root, data_prefix=dict(img='images'), metainfo=metainfo)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(**data, ann_file='train.json'), **loader)
val_dataloader = dict(dataset=dict(**data, ann_file='val.json'), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=root + '/val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_iters=6, val_interval=6)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=6))
"""


@functools.lru_cache
def read_config() -> Config:
    """Read the config, once for all tests; its data lie nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'dirty.py'
        path.write_text(CONFIG.format(root='nowhere', classes=CLASSES, model=MODEL))
        cfg = Config.fromfile(path)
    shrink(cfg)
    return cfg


def shrink(cfg):
    """The pipelines stay as they are, but for the sizes of images."""
    for split in ('train', 'val', 'test'):
        for step in cfg[f'{split}_dataloader'].dataset.pipeline:
            if step.type == 'RandomChoiceResize':
                step.scales = [(128, 96), (160, 96)]
            if step.type == 'Resize':
                step.scale = (128, 96)


class Sandbox:
    """A data set for training and one for validation, with a config for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train, self.val = (Dataset(folder / 'data') for _ in range(2))
        for part, name in ((self.train, 'sound_train.jpg'), (self.val, 'sound.jpg')):
            part.add_object(part.add_image(name, encode(rgb())))

    def config(self):
        """Write the annotation files and return the config."""
        self.train.write('train.json')
        self.val.write('val.json')
        cfg = copy.deepcopy(read_config())
        root = str(self.folder / 'data')
        for split in ('train', 'val', 'test'):
            cfg[f'{split}_dataloader'].dataset.data_root = root
        for split in ('val', 'test'):
            cfg[f'{split}_evaluator'].ann_file = f'{root}/val.json'
        cfg.preflight = dict(unused_categories=False)
        return cfg

    def part(self, split):
        return getattr(self, split)
