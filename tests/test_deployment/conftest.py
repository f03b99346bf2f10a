"""Tiny models of every task, with checkpoints whose detections are far apart."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch import nn

import mmrest  # noqa: F401, the scope mmrest:: of configs

PIPELINE = """
test_dataloader = dict(
    dataset=dict(
        metainfo=dict(classes=('a', 'b', 'c')),
        pipeline=[dict(type='Resize', scale=(160, 120), keep_ratio=True,
                       backend='pillow')],
    )
)
"""
BACKBONE = """dict(
        arch=dict(
            _delete_=True,
            embed_dims=[8, 16, 32, 64],
            num_heads=[1, 2, 4, 8],
            depths=[1, 1, 1, 1],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratios=2,
        ),
        init_cfg=None,
    )"""
CONFIGS = dict(
    retinanet="""
_base_ = 'mmrest::retinanet/{arch}_fpn_1x.py'
model = dict(
    backbone={backbone},
    neck=dict(in_channels=[16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3),
)""",
    mask_rcnn="""
_base_ = 'mmrest::mask_rcnn/{arch}_fpn_1x.py'
model = dict(
    backbone={backbone},
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=3),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(
            in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3
        ),
    ),
    test_cfg=dict(rpn=dict(max_per_img=40), rcnn=dict(max_per_img=20)),
)""",
    upernet="""
_base_ = 'mmrest::upernet/{arch}_upernet_160k_ade20k_512x512.py'
model = dict(
    backbone={backbone},
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=16, num_classes=3),
    auxiliary_head=None,
)""",
    semantic_fpn="""
_base_ = 'mmrest::semantic_fpn/{arch}_fpn_80k_ade20k_512x512.py'
model = dict(
    backbone={backbone},
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    decode_head=dict(in_channels=[16, 16, 16, 16], channels=16, num_classes=3),
)""",
    classifier="""
_base_ = 'mmrest::imagenet/{arch}_8xb128_in1k.py'
model = dict(
    backbone={backbone},
    data_preprocessor=dict(num_classes=3),
    head=dict(in_channels=64, num_classes=3),
    train_cfg=None,
)""",
)

# those of --verify in the other tests
SHAPES = [(113, 161), (57, 81), (23, 33)]

COLOUR_DETECTOR = """
<ir_version: 9, opset_import: ["" : 18]>
detector (uint8[batch, height, width, 3] image, int64[2] size)
    => (float[n, 4] boxes, float[n] scores, int64[n] labels)
<
    float[1, 4] parts = {0.25, 0.5, 0.75, 1.0},
    int64[4] order = {1, 0, 1, 0},
    int64[3] others = {1, 2, 3},
    float[4, 3, 1, 1] weight = {
        0.1, 0.2, -0.3, 0.4, -0.5, 0.6, 0.7, 0.8, -0.9, 1.0, -1.1, 1.2
    },
    float bound = {255.0}
>
{
    pixels = Cast<to = 1>(image)
    parted = Div(pixels, bound)
    x = Transpose<perm = [0, 3, 1, 2]>(parted)
    height_and_width = Constant<value_ints = [2, 3]>()
    colours = ReduceMean<keepdims = 0>(x, height_and_width)
    labels = ArgMax<axis = 1, keepdims = 0>(colours)
    features = Conv(x, weight)
    activity = ReduceMean<keepdims = 0>(features, others)
    scores = Sigmoid(activity)
    sides = Cast<to = 1>(size)
    scale = Gather(sides, order)
    boxes = Mul(parts, scale)
}
"""


@pytest.fixture
def runner(repo, monkeypatch):
    """The module that a service copies."""
    monkeypatch.syspath_prepend(str(repo / 'tools' / 'deployment'))
    import run_exported

    return run_exported


@pytest.fixture
def exported_model(runner):
    """The class of it."""
    return runner.ExportedModel


@pytest.fixture
def colour_detector(tmp_path):
    """Write a file that finds one box, the middle of the lower half of a picture.

    Its class is the colour that there is most of.
    """
    import onnx

    def make(classes):
        model = onnx.parser.parse_model(COLOUR_DETECTOR)
        metadata = dict(
            task='detection',
            inputs=['image', 'size'],
            outputs=['boxes', 'scores', 'labels'],
            classes=list(classes),
            pipeline=[],
        )
        model.metadata_props.add(key='mmrest', value=json.dumps(metadata))
        path = tmp_path / 'colours.onnx'
        onnx.save(model, path)
        return path

    return make


@pytest.fixture(scope='session')
def trained(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Make a config and a checkpoint of a task: trained(task, arch)."""
    folder = tmp_path_factory.mktemp('trained')

    def make(task, arch='rest_lite'):
        config, checkpoint = (folder / f'{task}_{arch}{e}' for e in ('.py', '.pth'))
        if not config.exists():
            text = CONFIGS[task].format(arch=arch, backbone=BACKBONE)
            config.write_text(text + PIPELINE)
            cfg = Config.fromfile(config)
            init_default_scope(cfg.default_scope)
            torch.manual_seed(0)
            model = MODELS.build(cfg.model)
            for name, parameter in model.named_parameters():
                # the backbone as it is drawn: with larger weights rounding alone
                # moves boxes by more than the bounds, in PyTorch too
                if parameter.dim() > 1 and not name.startswith('backbone'):
                    nn.init.kaiming_normal_(parameter)
                    # no score may saturate, and boxes must stay near their anchors:
                    # see test_detections_are_clear
                    last = dict(retina_cls=0.3, rpn_cls=0.3, fc_cls=0.1, reg=0.02)
                    parameter.data *= next((last[n] for n in last if n in name), 1.0)
            torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
        return config, checkpoint

    return make


@pytest.fixture(scope='session')
def picture(tmp_path_factory) -> Path:
    """A picture of 165x235 pixels."""
    path = tmp_path_factory.mktemp('pictures') / 'picture.png'
    pixels = np.random.default_rng(1).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((235, 165)).save(path)
    return path


@pytest.fixture
def detector(trained, picture):
    """Make a model in two forms, and images with their size before resizing."""
    from mmrest.deployment import export
    from mmrest.deployment.verification import scale_picture

    def make(task, arch='rest_lite', sensitive=False):
        config, checkpoint = trained(task, arch)
        cfg = Config.fromfile(config)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model).eval()
        content = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(content['state_dict'])
        for name, parameter in model.named_parameters():
            if sensitive and 'reg' in name:
                parameter.data *= 15
        exported = export.exportable(copy.deepcopy(model))
        pixels = np.asarray(Image.open(picture))
        images = [scale_picture(pixels, shape)[None] for shape in SHAPES]
        return exported, type(exported)(model), images, np.array(pixels.shape[:2])

    return make


@pytest.fixture(scope='session')
def exported(trained, picture, call, tmp_path_factory):
    """A file of a task, verified, and the tool's output: exported(task, arch, '.xml').

    Writing a file takes up to half a minute.
    """

    @functools.cache
    def make(task, arch, ending):
        folder = tmp_path_factory.mktemp('exported')
        options = [folder / f'model{ending}', '--verify', picture]
        output = call(
            'deployment/export.py', *trained(task, arch), *options, cwd=folder
        )
        return options[0], output

    return make
