"""Ways into a process that a checkpoint has, as functions of its path or URL.

``FUNNELS`` are the two functions through which all of them read. ``ENTRIES`` maps the
others to a function ``(source, folder)`` that loads it, and to one that makes the
content of a sound checkpoint for it, if one is made here.
"""

import functools

from dirty_sandbox import Sandbox
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader
from small_models import TINY, classifier
from torch import nn
from toy_run import ToyModel, build

from mmrest import ResT
from mmrest.checkpoint import check_load_from, load_pretrained, read_checkpoint
from mmrest.converters import convert_to_detectron2, convert_to_mmdet, publish

CLASSIFIER = dict(default_scope='mmpretrain', model=classifier())
SEGMENTOR = dict(
    default_scope='mmseg',
    model=dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32)),
        backbone=dict(type='mmrest.ResT', arch=TINY),
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


class Plain(BaseModule):
    """A module of MMEngine's, whose own ``init_cfg`` is at work."""

    def __init__(self, source, **options):
        super().__init__(pretrained(source, **options))
        self.backbone = nn.Linear(3, 3)


def pretrained(source, **options):
    return dict(type='Pretrained', checkpoint=str(source), **options)


def resume_auto(source, folder):
    work_dir = folder / 'auto'
    work_dir.mkdir(exist_ok=True)
    (work_dir / 'last_checkpoint').write_text(str(source))
    build(work_dir, resume=True).train()


@functools.cache
def detector_config(folder):
    """A config file of a tiny detector, its data beside it; made once a session."""
    part = folder / 'detector'
    part.mkdir()
    Sandbox(part).config().dump(part / 'detector.py')
    return str(part / 'detector.py')


def in_scope(function):
    # the toolboxes' functions leave their scope set
    @functools.wraps(function)
    def call(source, folder):
        with DefaultScope.overwrite_default_scope('mmengine'):
            return function(str(source), folder)

    return call


@in_scope
def det_inferencer(source, folder):
    from mmdet.apis import DetInferencer

    DetInferencer(detector_config(folder.parent), source, device='cpu')


@in_scope
def det_inferencer_without_config(source, folder):
    from mmdet.apis import DetInferencer

    DetInferencer(weights=source, device='cpu')


@in_scope
def init_segmentor(source, folder):
    from mmseg.apis import init_model

    init_model(Config(SEGMENTOR), source, device='cpu')


@in_scope
def get_classifier(source, folder):
    from mmpretrain.apis import get_model

    get_model(Config(CLASSIFIER), pretrained=source, device='cpu')


def weights_of(module, prefix=''):
    state = {prefix + name: value for name, value in module.state_dict().items()}
    return dict(state_dict=state, meta={})


def built(cfg):
    with DefaultScope.overwrite_default_scope(cfg['default_scope']):
        return MODELS.build(Config(cfg).model)


FUNNELS = {
    'ours': lambda source, _: read_checkpoint(source),
    'mmengine': lambda source, _: CheckpointLoader.load_checkpoint(
        str(source), map_location='cpu'
    ),
}


def rest(source, **options):
    return ResT(arch=TINY, init_cfg=pretrained(source, **options))


ENTRIES = {
    'load_pretrained': (
        lambda source, _: load_pretrained(ResT(arch=TINY), source),
        lambda: weights_of(ResT(arch=TINY)),
    ),
    'check_load_from': (
        lambda source, _: check_load_from(ToyModel(), source, exact=False),
        lambda: weights_of(ToyModel()),
    ),
    'to_mmdet': (lambda source, _: convert_to_mmdet(source), None),
    'to_detectron2': (lambda source, _: convert_to_detectron2(source), None),
    'publish': (
        lambda source, folder: publish(source, folder / 'published.pth'),
        lambda: weights_of(ToyModel()),
    ),
    'init_cfg': (
        lambda source, _: rest(source, prefix='backbone.').init_weights(),
        lambda: weights_of(ResT(arch=TINY), 'backbone.'),
    ),
    'init_cfg-mmengine': (
        lambda source, _: Plain(source).init_weights(),
        lambda: weights_of(nn.Linear(3, 3), 'backbone.'),
    ),
    'init_cfg-mmengine-prefix': (
        lambda source, _: Plain(source, prefix='student.').init_weights(),
        lambda: weights_of(nn.Linear(3, 3), 'student.backbone.'),
    ),
    'load_from': (
        lambda source, folder: build(
            folder / 'run', epochs=1, load_from=str(source)
        ).train(),
        lambda: weights_of(ToyModel()),
    ),
    'resume': (
        lambda source, folder: build(
            folder / 'run', load_from=str(source), resume=True
        ).train(),
        None,
    ),
    'resume-auto': (resume_auto, None),
    'DetInferencer': (det_inferencer, None),
    'DetInferencer-alone': (det_inferencer_without_config, None),
    'mmseg-init_model': (init_segmentor, lambda: weights_of(built(SEGMENTOR))),
    'mmpretrain-get_model': (get_classifier, lambda: weights_of(built(CLASSIFIER))),
}
