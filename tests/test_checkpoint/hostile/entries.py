"""Every way into a process that a checkpoint has, as functions of its path or URL.

``ENTRIES`` maps a name to a function ``(source, folder)`` that loads it, and
``SOUND`` to one that makes the content of a sound checkpoint for it.
"""

import functools

from dirty_sandbox import Sandbox
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint_with_prefix
from torch import nn
from toy_run import ToyModel, build

from mmrest import ResT
from mmrest.checkpoint import (
    check_load_from,
    load_pretrained,
    read_checkpoint,
    read_state_dict,
)
from mmrest.converters import convert_to_detectron2, convert_to_mmdet, publish

ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratios=2,
)
CLASSIFIER = dict(
    default_scope='mmpretrain',
    model=dict(
        type='ImageClassifier',
        backbone=dict(type='mmrest.ResT', arch=ARCH, out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
    ),
)
SEGMENTOR = dict(
    default_scope='mmseg',
    model=dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32)),
        backbone=dict(type='mmrest.ResT', arch=ARCH),
        decode_head=dict(
            type='FCNHead',
            in_channels=32,
            in_index=3,
            channels=8,
            num_convs=1,
            num_classes=3,
            norm_cfg=dict(type='BN'),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    ),
)


def rest(**options):
    return ResT(arch=ARCH, **options)


class Plain(BaseModule):
    """A module of mmengine's, whose own ``init_cfg`` is at work."""

    def __init__(self, **options):
        super().__init__(**options)
        self.backbone = nn.Linear(3, 3)

    class Inner(BaseModule):
        """A part of it."""

        def __init__(self, **options):
            super().__init__(**options)
            self.weight = nn.Parameter(nn.Linear(3, 3).weight.detach())
            self.bias = nn.Parameter(nn.Linear(3, 3).bias.detach())


def pretrained(source, **options):
    return dict(type='Pretrained', checkpoint=str(source), **options)


def init(module):
    module.init_weights()


def resume_auto(source, folder):
    work_dir = folder / 'auto'
    work_dir.mkdir(exist_ok=True)
    (work_dir / 'last_checkpoint').write_text(str(source))
    runner = build(work_dir, resume=True)
    runner.train()


@functools.cache
def detector_config(folder):
    """A config file of a tiny detector, its data beside it; made once a session."""
    part = folder / 'detector'
    part.mkdir()
    cfg = Sandbox(part).config()
    cfg.dump(part / 'detector.py')
    return str(part / 'detector.py')


def in_scope(function):
    # the toolboxes' functions leave their scope set
    @functools.wraps(function)
    def call(source, folder):
        with DefaultScope.overwrite_default_scope('mmengine'):
            return function(source, folder)

    return call


@in_scope
def det_inferencer(source, folder):
    from mmdet.apis import DetInferencer

    config = detector_config(folder.parent)
    DetInferencer(model=config, weights=str(source), device='cpu')


@in_scope
def det_inferencer_without_config(source, folder):
    from mmdet.apis import DetInferencer

    DetInferencer(weights=str(source), device='cpu')


@in_scope
def init_detector(source, folder):
    from mmdet.apis import init_detector

    init_detector(detector_config(folder.parent), str(source), device='cpu')


@in_scope
def init_segmentor(source, folder):
    from mmseg.apis import init_model

    init_model(Config(SEGMENTOR), str(source), device='cpu')


@in_scope
def get_classifier(source, folder):
    from mmpretrain.apis import get_model

    get_model(Config(CLASSIFIER), pretrained=str(source), device='cpu')


ENTRIES = {
    'read_checkpoint': lambda source, _: read_checkpoint(source),
    'read_state_dict': lambda source, _: read_state_dict(source),
    'load_pretrained': lambda source, _: load_pretrained(rest(), source),
    'check_load_from': lambda source, _: check_load_from(ToyModel(), source),
    'check_fine_tuning': lambda source, _: check_load_from(
        ToyModel(), source, exact=False
    ),
    'to_mmdet': lambda source, _: convert_to_mmdet(source),
    'to_detectron2': lambda source, _: convert_to_detectron2(source),
    'publish': lambda source, folder: publish(source, folder / 'published.pth'),
    'init_cfg': lambda source, _: init(rest(init_cfg=pretrained(source))),
    'init_cfg-prefix': lambda source, _: init(
        rest(init_cfg=pretrained(source, prefix='backbone.'))
    ),
    'init_cfg-mmengine': lambda source, _: init(Plain(init_cfg=pretrained(source))),
    'init_cfg-mmengine-prefix': lambda source, _: init(
        Plain.Inner(init_cfg=pretrained(source, prefix='backbone'))
    ),
    'CheckpointLoader': lambda source, _: CheckpointLoader.load_checkpoint(
        str(source), map_location='cpu'
    ),
    'load_checkpoint': lambda source, _: load_checkpoint(ToyModel(), str(source)),
    'with_prefix': lambda source, _: _load_checkpoint_with_prefix(
        'backbone', str(source), map_location='cpu'
    ),
    'load_from': lambda source, folder: build(
        folder / 'run', epochs=1, load_from=str(source)
    ).train(),
    'resume': lambda source, folder: build(
        folder / 'run', load_from=str(source), resume=True
    ).train(),
    'resume-auto': resume_auto,
    'DetInferencer': det_inferencer,
    'DetInferencer-alone': det_inferencer_without_config,
    'init_detector': init_detector,
    'mmseg-init_model': init_segmentor,
    'mmpretrain-get_model': get_classifier,
}


def weights_of(module):
    return dict(state_dict=module.state_dict(), meta={})


def with_prefix(module):
    return dict(
        state_dict={f'backbone.{k}': v for k, v in module.state_dict().items()}, meta={}
    )


@functools.cache
def built(kind):
    from mmengine.registry import MODELS

    config = dict(seg=SEGMENTOR, cls=CLASSIFIER)[kind]
    with DefaultScope.overwrite_default_scope(config['default_scope']):
        return MODELS.build(Config(config).model)


# What loads without an error; of the others the converters' tests and those of the
# tools have sound files.
SOUND = {
    'read_checkpoint': lambda: weights_of(ToyModel()),
    'read_state_dict': lambda: weights_of(ToyModel()),
    'load_pretrained': lambda: weights_of(rest()),
    'check_load_from': lambda: weights_of(ToyModel()),
    'check_fine_tuning': lambda: weights_of(ToyModel()),
    'publish': lambda: weights_of(ToyModel()),
    'init_cfg': lambda: weights_of(rest()),
    'init_cfg-prefix': lambda: with_prefix(rest()),
    'init_cfg-mmengine': lambda: weights_of(Plain()),
    'init_cfg-mmengine-prefix': lambda: with_prefix(Plain.Inner()),
    'CheckpointLoader': lambda: weights_of(ToyModel()),
    'load_checkpoint': lambda: weights_of(ToyModel()),
    'with_prefix': lambda: with_prefix(Plain.Inner()),
    'load_from': lambda: weights_of(ToyModel()),
    'mmseg-init_model': lambda: weights_of(built('seg')),
    'mmpretrain-get_model': lambda: weights_of(built('cls')),
}
# Those that take an address as well.
BY_ADDRESS = tuple(name for name in ENTRIES if name not in ('to_mmdet', 'resume-auto'))
