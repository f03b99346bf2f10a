"""Published files of ResTV2: Mask R-CNN (detectron2) and UPerNet (mmseg 0.x)."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from published_form import empty
from test_golden_detectors import as_dict, assert_same_detections
from weights_rule import fill

from mmrest.converters import (
    ConversionError,
    Detector,
    entries,
    recognise,
    to_detectron2,
    to_mmdet,
)
from mmrest.converters.files import convert_to_detectron2, convert_to_mmdet, save
from mmrest.converters.layout import constants

ARCHS = ('tiny', 'small', 'base')
RECIPE = 'upernet_160k_ade20k_512x512'
# 2.5 times what lies between the golden arrays and the same network in float64
SCORES = 4e-4


def detector(arch):
    return Detector('mask_rcnn', arch, 80, 'ResTV2')


def build(repo, path):
    cfg = Config.fromfile(repo / 'configs' / path)
    cfg.model.backbone.init_cfg = None
    from mmengine.registry import MODELS

    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model).eval()


def read_json(data_dir, name):
    return json.loads((data_dir / f'{name}.json').read_text())


@pytest.fixture(scope='module')
def published(detector_shapes, data_dir):
    """The state dict of a published ResTv2-Tiny Mask R-CNN."""
    gains = read_json(data_dir, 'detector_gains')['mask_rcnn']
    return fill(empty(detector_shapes['mask_rcnn_restv2_tiny']), gains)


@pytest.mark.parametrize('arch', ARCHS)
def test_names_and_shapes_are_the_published_ones(arch, detector_shapes):
    expected = detector_shapes[f'mask_rcnn_restv2_{arch}']
    found = {entry.detectron2: entry for entry in entries(detector(arch))}
    assert {name: list(entry.shape) for name, entry in found.items()} == expected
    names = {n: torch.empty(shape, device='meta') for n, shape in expected.items()}
    assert recognise(names) == detector(arch)
    names = {e.mmdet: names[e.detectron2] for e in found.values()}
    assert recognise(names, 'mmdet') == detector(arch)


def test_there_and_back_in_files_is_the_identity(tmp_path, published):
    source = {**published, **constants('mask_rcnn', 'ResTV2')}
    counter = 'backbone.bottom_up.stem.proj.1.num_batches_tracked'
    del source[counter]
    torch.save({'model': source}, tmp_path / 'published.pth')
    conversion, checkpoint = convert_to_mmdet(tmp_path / 'published.pth')
    assert conversion.detector == detector('tiny')
    assert checkpoint['meta']['config'] == 'mask_rcnn/restv2_tiny_fpn_3x.py'
    save(checkpoint, tmp_path / 'mmdet.pth')
    torch.load(tmp_path / 'mmdet.pth', weights_only=True)
    _, back = convert_to_detectron2(tmp_path / 'mmdet.pth')
    assert back['model'].keys() == source.keys()
    assert all(torch.equal(back['model'][name], source[name]) for name in source)


@pytest.mark.parametrize('name', ['pixel_mean', 'pixel_std'])
def test_statistics_in_another_order_of_channels_are_refused(name, published):
    value = constants('mask_rcnn', 'ResTV2')[name].flip(0)
    with pytest.raises(ConversionError, match=f'{name}: expected'):
        to_mmdet({**published, name: value})


def test_retinanet_of_ones_own(detector_shapes):
    own = Detector('retinanet', 'tiny', 3, 'ResTV2')
    tensors = fill(empty({e.mmdet: e.shape for e in entries(own)}))
    back = to_mmdet(to_detectron2(tensors).state_dict)
    assert back.detector == own
    assert all(torch.equal(back.state_dict[name], tensors[name]) for name in tensors)


@pytest.mark.slow
def test_golden_mask_rcnn(repo, data_dir, published, detect):
    golden = dict(np.load(data_dir / 'golden_mask_rcnn_restv2_tiny.npz'))
    model = build(repo, 'mask_rcnn/restv2_tiny_fpn_3x.py')
    model.load_state_dict(to_mmdet(published).state_dict, strict=True)
    features, found = detect(model, golden['image'])
    for level, feature in enumerate(features, start=2):
        expected = float(golden[f'fpn_mean_abs/p{level}'])
        assert float(feature.abs().mean()) == pytest.approx(expected, rel=2e-5)
    np.testing.assert_allclose(features[4], golden['fpn/p6'], rtol=0, atol=5e-4)
    width = golden['image'].shape[1]
    expected = {n: torch.from_numpy(golden[n]) for n in ('boxes', 'scores', 'labels')}
    masks = np.unpackbits(golden['masks'], axis=-1)[..., :width]
    expected['masks'] = torch.from_numpy(masks.astype(bool))
    assert_same_detections(as_dict(found), expected, 0.01, SCORES)


@pytest.mark.parametrize('arch', ['tiny', 'base'])
def test_published_upernet_has_our_names(repo, data_dir, arch):
    """So that a file of mmseg 0.x loads with ``strict=True``."""
    shapes = read_json(data_dir, 'mmseg_checkpoint_keys')[f'upernet_restv2_{arch}']
    with torch.device('meta'):
        model = build(repo, f'upernet/restv2_{arch}_{RECIPE}.py')
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == shapes


@pytest.mark.slow
def test_golden_upernet(repo, data_dir):
    from weights_rule import image

    golden = np.load(data_dir / 'golden_upernet_restv2_tiny.npz')
    model = build(repo, f'upernet/restv2_tiny_{RECIPE}.py')
    shapes = read_json(data_dir, 'mmseg_checkpoint_keys')['upernet_restv2_tiny']
    model.load_state_dict(fill(empty(shapes)), strict=True)
    model.double()
    with torch.no_grad():
        logits = model.decode_head(model.backbone(image((1, 3, 128, 160), 21).double()))
        expected = torch.from_numpy(golden['logits'])
        error = (logits - expected).abs().max() / expected.abs().max()
        assert float(error) <= 1e-10
        whole = torch.nn.functional.interpolate(
            logits, size=(128, 160), mode='bilinear', align_corners=False
        )
    labels = whole.argmax(1)
    assert (labels.numpy() == golden['label_map']).mean() == 1.0


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        *((f'mask_rcnn/restv2_{a}_fpn_3x.py', f'mask_rcnn_restv2_{a}') for a in ARCHS),
        *(
            (f'upernet/restv2_{a}_{RECIPE}.py', f'upernet_restv2_{a}')
            for a in ('tiny', 'base')
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(repo, data_dir, path, name):
    (expected,) = read_json(data_dir, 'parameter_counts')[name].values()
    with torch.device('meta'):
        model = build(repo, path)
    assert sum(p.numel() for p in model.parameters()) == expected
