"""State dict to state dict, both ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from published_form import PUBLISHED

from mmrest.converters import (
    ConversionError,
    Detector,
    entries,
    recognise,
    to_detectron2,
    to_mmdet,
)
from mmrest.converters.layout import constants, swap_anchor_order

# the golden detectors are small ones, so that these are loaded anyway
SMALL_FIRST = [
    pytest.param(kind, arch, marks=[pytest.mark.slow] if arch == 'base' else [])
    for kind, arch in PUBLISHED
]


@pytest.mark.parametrize(('kind', 'arch'), PUBLISHED)
def test_names_and_shapes_are_the_published_ones(kind, arch, detector_shapes):
    found = {
        entry.detectron2: list(entry.shape)
        for entry in entries(Detector(kind, arch, 80))
    }
    assert found == detector_shapes[f'{kind}_rest_{arch}']


@pytest.mark.parametrize(('kind', 'arch'), SMALL_FIRST)
def test_converted_weights_fit_the_published_config(kind, arch, native):
    native(kind, arch)  # load_state_dict(strict=True)


PIXELS = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)


@pytest.mark.parametrize(('kind', 'arch'), PUBLISHED)
def test_published_config_changes_what_the_files_need(
    kind, arch, repo, published_config
):
    config = published_config(kind, arch).to_dict()
    base = Config.fromfile(repo / 'configs' / kind / f'rest_{arch}_fpn_1x.py').to_dict()
    base['model']['data_preprocessor'].update(PIXELS)
    if kind == 'retinanet':
        base['model']['bbox_head']['type'] = 'ClipLastRetinaHead'
        base['model']['bbox_head']['bbox_coder']['clip_border'] = False
    for cfg in (config, base):
        cfg.pop('custom_imports', None)
    assert config == base
    (resize,) = (t for t in config['test_pipeline'] if t['type'] == 'Resize')
    assert resize['backend'] == 'pillow' and resize['scale'] == (1333, 800)


@pytest.mark.parametrize(('kind', 'arch'), SMALL_FIRST)
def test_there_and_back_is_the_identity(kind, arch, published):
    source = published(kind, arch)
    converted = to_mmdet(source)
    back = to_detectron2(converted.state_dict)
    assert converted.detector == back.detector == Detector(kind, arch, 80)
    assert list(back.state_dict) == list(source)
    assert all(torch.equal(back.state_dict[name], source[name]) for name in source)


@pytest.mark.parametrize('kind', ['mask_rcnn', 'retinanet'])
def test_stored_constants_and_missing_counters_come_back(kind, published):
    source = published(kind, 'small')
    frozen = 'backbone.bottom_up.stem.norm1.num_batches_tracked'
    del source[frozen]  # detectron2's frozen batch norm has none
    source.update(constants(kind))
    converted = to_mmdet(source)
    assert converted.added == [frozen]
    counter = converted.state_dict['backbone.stem.norm1.num_batches_tracked']
    assert counter.dtype == torch.long and int(counter) == 0
    back = to_detectron2(
        converted.state_dict, converted.added, converted.constants
    ).state_dict
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], source[name]) for name in source)


@pytest.mark.parametrize(
    ('kind', 'prefix', 'octaves'),
    [
        ('mask_rcnn', 'proposal_generator.anchor_generator', [1]),
        ('retinanet', 'anchor_generator', [1, 2 ** (1 / 3), 2 ** (2 / 3)]),
    ],
)
def test_anchors_of_a_cell(kind, prefix, octaves):
    """All ratios (height to width) of a size, then those of the next, around 0."""
    known = constants(kind)
    for level in range(5):
        x1, y1, x2, y2 = known[f'{prefix}.cell_anchors.{level}'].unbind(1)
        assert torch.equal(x1, -x2) and torch.equal(y1, -y2)
        sizes = [2 ** (5 + level) * octave for octave in octaves for _ in range(3)]
        found = ((x2 - x1) * (y2 - y1)).sqrt()
        torch.testing.assert_close(found, torch.tensor(sizes, dtype=found.dtype))
        ratios = torch.tensor([0.5, 1.0, 2.0] * len(octaves))
        torch.testing.assert_close((y2 - y1) / (x2 - x1), ratios)


def test_the_source_is_not_changed(published):
    source = published('retinanet', 'small')
    before = {name: tensor.clone() for name, tensor in source.items()}
    to_mmdet(source)
    assert source.keys() == before.keys()
    assert all(torch.equal(source[name], before[name]) for name in before)


@given(width=st.integers(1, 90), columns=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_anchor_order(width, columns):
    old = torch.arange(9 * width * columns).view(9 * width, columns)
    new = swap_anchor_order(old)
    for size in range(3):
        for ratio in range(3):
            to, fro = 3 * ratio + size, 3 * size + ratio
            assert torch.equal(new.view(9, width, -1)[to], old.view(9, width, -1)[fro])
    assert torch.equal(swap_anchor_order(new), old)


@given(
    kind=st.sampled_from(['mask_rcnn', 'retinanet']),
    arch=st.sampled_from(['lite', 'small', 'base', 'large']),
    num_classes=st.integers(1, 400),
)
@settings(max_examples=6, deadline=None)
def test_recognises_backbone_and_class_count(kind, arch, num_classes):
    detector = Detector(kind, arch, num_classes)
    for form in ('detectron2', 'mmdet'):
        names = {
            getattr(entry, form): torch.empty(entry.shape, device='meta')
            for entry in entries(detector)
        }
        assert recognise(names, form) == detector


def rename(state, old, new):
    state[new] = state.pop(old)


FC1 = 'roi_heads.box_head.fc1.weight'
BROKEN = {
    'empty': (lambda s: s.clear(), 'empty'),
    'no detector': (lambda s: s.pop('roi_heads.box_predictor.cls_score.weight'), 'no '),
    'both detectors': (
        lambda s: s.update({'head.cls_score.weight': torch.zeros(720, 1)}),
        'Mask R-CNN and of a RetinaNet',
    ),
    'missing tensor': (lambda s: s.pop(FC1), rf'Missing in the file \(1\): {FC1}'),
    'unknown tensor': (
        lambda s: rename(s, FC1, 'extra'),
        r'Not in the model \(1\): extra',
    ),
    'another shape': (
        lambda s: s.update({FC1: torch.zeros(1024, 1)}),
        rf'{FC1} \(1024, 1\) instead of \(1024, 12544\)',
    ),
    'NaN': (
        lambda s: s.update({FC1: torch.full((1024, 12544), float('nan'))}),
        f'NaN or infinite values in 1: {FC1}',
    ),
    'another depth': (
        lambda s: s.update({'backbone.bottom_up.stage3.9.norm1.weight': s[FC1]}),
        r'\(64, \(2, 2, 10, 2\)\)',
    ),
    'no ResT': (
        lambda s: s.pop('backbone.bottom_up.stem.conv3.weight'),
        r'one of .*stem\.conv3\.weight \(ResT\).*; missing',
    ),
    'two generations': (
        lambda s: s.update(
            {'backbone.bottom_up.stem.proj.3.weight': torch.ones(2, 2, 1, 1)}
        ),
        'both are there',
    ),
    'other pixels': (
        lambda s: s.update(pixel_std=torch.full((3, 1, 1), 57.0)),
        'pixel_std: expected',
    ),
}


@pytest.mark.parametrize('case', BROKEN)
def test_refuses(case, published):
    change, message = BROKEN[case]
    state = published('mask_rcnn', 'small')
    change(state)
    with pytest.raises(ConversionError, match=message):
        to_mmdet(state)


def test_names_what_an_imagenet_checkpoint_is_for(published_shapes):
    shapes = published_shapes['rest_small']
    state = {name: torch.empty(shape, device='meta') for name, shape in shapes.items()}
    with pytest.raises(ConversionError, match='init_cfg'):
        to_mmdet(state)


def test_names_the_other_tool(published):
    source = published('retinanet', 'small')
    with pytest.raises(ConversionError, match='mmdet_to_detectron2'):
        to_mmdet(to_mmdet(source).state_dict)
    with pytest.raises(ConversionError, match='detectron2_to_mmdet'):
        to_detectron2(source)


def test_long_lists_are_cut(published):
    state = published('mask_rcnn', 'small')
    state.update({f'extra{i}': torch.zeros(1) for i in range(50)})
    with pytest.raises(ConversionError, match=r'Not in the model \(50\)') as error:
        to_mmdet(state)
    assert 'and 42 more' in str(error.value)
