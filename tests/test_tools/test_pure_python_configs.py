"""Configs in pure Python, whose types are classes, as mmdet has some."""

import pickle

import pytest
from mmengine.config import Config
from tool_runs import iterations

from mmrest.utils.config_types import find_toolbox, type_name

RUNTIME = """
from mmengine.hooks import (
    DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook,
)
from mmengine.runner import LogProcessor
from mmengine.visualization import LocalVisBackend

from mmdet.engine.hooks import DetVisualizationHook
from mmdet.visualization import DetLocalVisualizer
from mmrest.hooks import AtomicCheckpointHook

default_scope = {scope!r}
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=AtomicCheckpointHook, by_epoch=False, interval=2),
    sampler_seed=dict(type=DistSamplerSeedHook),
    visualization=dict(type=DetVisualizationHook),
)
visualizer = dict(
    type=DetLocalVisualizer, vis_backends=[dict(type=LocalVisBackend)], name='v'
)
log_processor = dict(type=LogProcessor, by_epoch=False)
"""
CONFIG = """
from mmengine.config import read_base

with read_base():
    from .runtime import *

from mmcv.transforms import LoadImageFromFile, TestTimeAug
from mmengine.dataset.sampler import DefaultSampler, InfiniteSampler
from mmengine.optim.optimizer.optimizer_wrapper import OptimWrapper
from mmengine.runner.loops import IterBasedTrainLoop, TestLoop, ValLoop
from torch.optim.adamw import AdamW

from mmdet.datasets.coco import CocoDataset
from mmdet.datasets.transforms.formatting import PackDetInputs
from mmdet.datasets.transforms.loading import LoadAnnotations
from mmdet.datasets.transforms.transforms import RandomFlip, Resize
from mmdet.evaluation.metrics.coco_metric import CocoMetric
from mmdet.models.data_preprocessors.data_preprocessor import DetDataPreprocessor
from mmdet.models.dense_heads.retina_head import RetinaHead
from mmdet.models.detectors.retinanet import RetinaNet
from mmdet.models.losses.focal_loss import FocalLoss
from mmdet.models.losses.smooth_l1_loss import L1Loss
from mmdet.models.necks.fpn import FPN
from mmdet.models.task_modules.assigners.max_iou_assigner import MaxIoUAssigner
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators.anchor_generator import AnchorGenerator
from mmdet.models.task_modules.samplers.pseudo_sampler import PseudoSampler
from mmdet.models.test_time_augs.det_tta import DetTTAModel
from mmrest import ResT

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(
        type=DetDataPreprocessor, mean=[120.0] * 3, std=[58.0] * 3, pad_size_divisor=32
    ),
    backbone=dict(
        type=ResT,
        arch=dict(
            embed_dims=[8, 16, 32, 64],
            num_heads=[1, 2, 4, 8],
            depths=[1, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratios=2,
        ),
        out_indices=(1, 2, 3),
    ),
    neck=dict(
        type=FPN,
        in_channels=[16, 32, 64],
        out_channels=16,
        num_outs=5,
        add_extra_convs='on_input',
    ),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=2,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        anchor_generator=dict(
            type=AnchorGenerator,
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss),
        loss_bbox=dict(type=L1Loss),
    ),
    train_cfg=dict(
        assigner=dict(
            type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.0
        ),
        sampler=dict(type=PseudoSampler),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=100, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=10,
    ),
)
keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
resize = dict(type=Resize, scale=(96, 64), keep_ratio=True)
annotations = dict(type=LoadAnnotations, with_bbox=True)
data = dict(
    type=CocoDataset,
    data_root={root!r},
    data_prefix=dict(img='images'),
    metainfo=dict(classes=('box', 'diamond')),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type=InfiniteSampler, shuffle=True),
    dataset=dict(
        ann_file='train.json',
        pipeline=[dict(type=LoadImageFromFile), annotations, dict(type=PackDetInputs)],
        **data,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        ann_file='val.json',
        test_mode=True,
        pipeline=[
            dict(type=LoadImageFromFile), resize, annotations,
            dict(type=PackDetInputs, meta_keys=keys),
        ],
        **data,
    ),
)
test_evaluator = dict(type=CocoMetric, ann_file={root!r} + '/val.json', metric='bbox')
test_cfg = dict(type=TestLoop)
val_dataloader = val_evaluator = val_cfg = None
train_cfg = dict(type=IterBasedTrainLoop, max_iters=2, val_interval=100)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-4))
tta_model = dict(
    type=DetTTAModel,
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
)
tta_pipeline = [
    dict(type=LoadImageFromFile),
    dict(
        type=TestTimeAug,
        transforms=[
            [resize],
            [dict(type=RandomFlip, prob=1.0), dict(type=RandomFlip, prob=0.0)],
            [annotations],
            [dict(type=PackDetInputs, meta_keys=keys + ('flip', 'flip_direction'))],
        ],
    ),
]
"""


@pytest.fixture(scope='module')
def pure(config, tmp_path_factory):
    """Write such a config: pure(default_scope)."""

    def write(scope=None):
        folder = tmp_path_factory.mktemp('pure')
        (folder / 'runtime.py').write_text(RUNTIME.format(scope=scope))
        root = str(config.parent / 'shapes')
        (folder / 'pure.py').write_text(CONFIG.replace('{root!r}', repr(root)))
        return folder / 'pure.py'

    return write


@pytest.mark.parametrize('scope', [None, pytest.param('mmdet', marks=pytest.mark.slow)])
def test_train_and_test(call, pure, scope, metrics):
    path = pure(scope)
    folder = path.parent
    output = call('train.py', path, '--work-dir', 'run', '--tensorboard', cwd=folder)
    assert iterations(output) == [1, 2]
    assert list(folder.glob('run/*/vis_data/events.out.tfevents.*'))
    test = ['test.py', path, 'run/iter_2.pth', '--work-dir']
    call(*test, 'drawn', '--show-dir', 'p', '--out', 'results.json', cwd=folder)
    assert len(list(folder.glob('drawn/*/p/*.jpg'))) == 5
    assert (folder / 'results.bbox.json').stat().st_size > 100
    call(*test, 'tta', '--tta', '--out', 'results.pkl', cwd=folder)
    predictions = pickle.loads((folder / 'results.pkl').read_bytes())
    assert predictions[0]['pred_instances']['bboxes'].shape == (10, 4)
    assert 'coco/bbox_mAP' in metrics(folder / 'tta')


def test_wrong_number_of_classes_is_seen(call, pure):
    path = pure()
    options = ['--cfg-options', 'model.bbox_head.num_classes=3']
    output = call('train.py', path, *options, cwd=path.parent, fails=True)
    assert 'model.bbox_head.num_classes is 3' in output


def test_get_flops(call, pure):
    path = pure()
    options = ['--shape', '64', '96', '--cfg-options', 'model.backbone.in_channels=4']
    output = call('analysis_tools/get_flops.py', path, *options, cwd=path.parent)
    assert 'one image of 64x96' in output and 'bbox_head' in output


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        (dict(default_scope='mmseg', model=dict(type='RetinaNet')), 'mmseg'),
        (dict(default_scope=None, model=dict(type='mmdet.RetinaNet')), 'mmdet'),
        (dict(model=dict(type='ImageClassifier', _scope_='mmpretrain')), 'mmpretrain'),
        (dict(model=dict(type='mmseg.UNet', _scope_='mmrest')), 'mmseg'),
        (dict(model=dict(type='RetinaNet')), None),
        (dict(), None),
    ],
)
def test_toolbox_of_a_text_config(fields, expected):
    assert find_toolbox(Config(fields)) == expected


def test_toolbox_of_a_class(pure):
    cfg = Config.fromfile(pure())
    assert cfg.default_scope is None and find_toolbox(cfg) == 'mmdet'
    assert type_name(cfg.test_evaluator) == 'CocoMetric'
