"""Small models of each toolbox, with checkpoints as MMEngine writes them."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from rest_variants import TINY
from tool_runs import own_process

BACKBONE = f'backbone=dict(arch=dict(_delete_=True, **{TINY!r}), init_cfg=None)'
CONFIGS = {
    'mmdet': f"""
_base_ = 'mmrest::mask_rcnn/rest_lite_fpn_1x.py'
model = dict(
    {BACKBONE},
    neck=dict(in_channels={TINY['embed_dims']}, out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=2),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=2),
    ),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=4)),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CheckImageSize'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
metainfo = dict(classes=('box', 'diamond'))
test_dataloader = dict(dataset=dict(pipeline=pipeline, metainfo=metainfo))
""",
    'mmseg': f"""
_base_ = 'mmrest::semantic_fpn/rest_lite_fpn_80k_ade20k_512x512.py'
model = dict(
    {BACKBONE},
    neck=dict(in_channels={TINY['embed_dims']}, out_channels=16),
    decode_head=dict(in_channels=[16] * 4, channels=16, num_classes=2),
    test_cfg=dict(_delete_=True, mode='whole'),
)
metainfo = dict(classes=('road', 'sky'), palette=[[128, 64, 128], [70, 130, 180]])
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline, metainfo=metainfo))
""",
    'mmpretrain': f"""
_base_ = 'mmrest::imagenet/rest_lite_8xb128_in1k.py'
model = dict({BACKBONE}, head=dict(in_channels=32))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=64, edge='short'),
    dict(type='CenterCrop', crop_size=48),
    dict(type='PackInputs'),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
""",
}


@pytest.fixture(autouse=True)
def _own_process():
    with own_process():
        yield


@pytest.fixture(scope='session')
def model_files(tmp_path_factory):
    """For a toolbox the paths of a config and a checkpoint."""
    made = {}

    def make(toolbox):
        pytest.importorskip(toolbox)
        if toolbox not in made:
            folder = tmp_path_factory.mktemp(toolbox)
            (folder / 'config.py').write_text(CONFIGS[toolbox])
            with own_process():
                cfg = Config.fromfile(folder / 'config.py')
                with DefaultScope.overwrite_default_scope(toolbox):
                    torch.manual_seed(0)
                    model = MODELS.build(cfg.model)
                model.backbone.init_weights()
            meta = {}
            if toolbox == 'mmdet':
                meta['dataset_meta'] = dict(classes=('box', 'diamond'))
            torch.save(
                dict(meta=meta, state_dict=model.state_dict()), folder / 'model.pth'
            )
            made[toolbox] = folder / 'config.py', folder / 'model.pth'
        return made[toolbox]

    return make


@pytest.fixture(scope='session')
def write_image():
    """Write an image of noise, 96x64 pixels unless told otherwise."""

    def write(path, width=96, height=64):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    return write
