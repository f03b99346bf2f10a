"""Losses and gradients of the 1x configs against the published formulas.

On random features instead of a backbone's, so that the choice of anchors and
proposals, which is random in training, can be made complete: fewer candidates than
samples.
"""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from published_form import grid_anchors as published_anchors
from published_form import (
    mask_loss,
    match,
    rasterize,
    retinanet_losses,
    roi_losses,
    rpn_losses,
)

from mmrest.converters.layout import Detector, entries, swap_anchor_order

TIGHT = {'rtol': 1e-5, 'atol': 1e-7}


@pytest.fixture
def head(repo, published):
    """Build heads of a 1x config: head(kind, part) gives module and weights."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    from mmrest.converters import to_mmdet

    register_all_modules(init_default_scope=True)

    def build(kind, part):
        cfg = Config.fromfile(repo / 'configs' / kind / 'rest_small_fpn_1x.py').model
        train = {'rpn_head': 'rpn', 'roi_head': 'rcnn'}.get(part)
        train_cfg = cfg.train_cfg[train] if train else cfg.train_cfg
        test_cfg = cfg.test_cfg[train] if train else cfg.test_cfg
        module = MODELS.build(
            {**cfg[part], 'train_cfg': train_cfg, 'test_cfg': test_cfg}
        )
        source = published(kind, 'small')
        weights = to_mmdet(source).state_dict
        prefix = f'{part}.'
        module.load_state_dict(
            {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
        )
        names = {
            entry.mmdet[len(prefix) :]: entry
            for entry in entries(Detector(kind, 'small', 80))
            if entry.mmdet.startswith(prefix)
        }
        for entry in names.values():
            source[entry.detectron2] = source[entry.detectron2].clone().requires_grad_()
        return module, source, names

    return build


def features(height, width, levels):
    """Random FPN maps for an image of this size, for mmdet and for the recipe."""
    torch.manual_seed(1)
    maps = []
    for level in levels:
        side = [-(-s // 2**level) for s in (height, width)]
        maps.append(torch.randn(1, 256, *side) / 4)
    mine = [x.clone().requires_grad_() for x in maps]
    theirs = {f'p{n}': x.clone().requires_grad_() for n, x in zip(levels, maps)}
    return mine, theirs


def sample(height, width, boxes, labels, polygons=None):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import PolygonMasks

    size = (height, width)
    result = DetDataSample(
        metainfo={'img_shape': size, 'pad_shape': size, 'batch_input_shape': size}
    )
    result.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    if polygons is not None:
        masks = [[np.array(polygon)] for polygon in polygons]
        result.gt_instances.masks = PolygonMasks(masks, height, width)
    return result


def total(losses):
    return {
        name: torch.stack([v.sum() for v in value]).sum()
        if isinstance(value, list)
        else value.sum()
        for name, value in losses.items()
        if 'loss' in name
    }


def assert_same_losses(losses, expected, module, source, names, mine, theirs):
    losses = total(losses)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert float(value) > 0
        torch.testing.assert_close(value, expected[name], **TIGHT)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    compared = 0
    for name, parameter in module.named_parameters():
        entry = names[name]
        wanted = source[entry.detectron2].grad
        if wanted is None:
            assert parameter.grad is None
            continue
        if entry.anchor_order:
            wanted = swap_anchor_order(wanted)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=2e-5 * scale)
        compared += 1
    for got, wanted in zip(mine, theirs.values()):
        if wanted.grad is not None:
            scale = float(wanted.grad.abs().max())
            torch.testing.assert_close(got.grad, wanted.grad, rtol=0, atol=2e-5 * scale)
    assert compared > 0


def test_retinanet(head):
    module, source, names = head('retinanet', 'bbox_head')
    boxes = torch.tensor([[10.0, 8, 70, 60], [40, 30, 120, 90], [5, 60, 25, 78]])
    labels = torch.tensor([3, 17, 79])
    mine, theirs = features(96, 128, range(3, 8))
    losses = module.loss(mine, [sample(96, 128, boxes, labels)])
    expected = retinanet_losses(theirs, source, boxes, labels)
    assert_same_losses(losses, expected, module, source, names, mine, theirs)


def test_retinanet_normalizer(head):
    """The deliberate difference: positives of this step, not a running mean."""
    module, source, _ = head('retinanet', 'bbox_head')
    boxes, labels = torch.tensor([[10.0, 8, 70, 60]]), torch.tensor([3])
    mine, theirs = features(96, 128, range(3, 8))
    losses = total(module.loss(mine, [sample(96, 128, boxes, labels)]))
    running = retinanet_losses(theirs, source, boxes, labels, normalizer=100.0)
    own = retinanet_losses(theirs, source, boxes, labels)
    ratio = float(own['loss_cls'] / running['loss_cls'])
    for name in losses:
        assert float(losses[name] / running[name]) == pytest.approx(ratio, rel=1e-4)


def test_rpn(head):
    module, source, names = head('mask_rcnn', 'rpn_head')
    # One object: of two that share a best anchor, mmdet may take the other one.
    boxes = torch.tensor([[2.0, 3, 24, 26]])
    mine, theirs = features(32, 28, range(2, 7))
    anchors = torch.cat(published_anchors(theirs, [1.0]))
    assert len(anchors) < 256
    _, label = match(anchors, boxes, 0.3, 0.7, low_quality=True)
    losses = module.loss(mine, [sample(32, 28, boxes, torch.zeros(1).long())])
    sampled = (label >= 0).nonzero().flatten()
    expected = rpn_losses(theirs, source, boxes, sampled)
    assert_same_losses(losses, expected, module, source, names, mine, theirs)


@pytest.mark.slow
def test_roi_heads(head):
    module, source, names = head('mask_rcnn', 'roi_head')
    boxes = torch.tensor([[2.0, 3, 40, 46], [20, 11, 60, 57]])
    labels = torch.tensor([5, 42])
    polygons = [[2.0, 3, 40, 3, 30, 46, 2, 40], [20.0, 11, 60, 20, 55, 57, 25, 50]]
    torch.manual_seed(2)
    near = boxes.repeat(6, 1) + torch.randn(12, 4) * 3
    far = torch.rand(8, 4) * 20 + torch.tensor([0.0, 0, 10, 10])
    proposals = torch.cat((near, far)).clamp(0, 64)
    mine, theirs = features(64, 64, range(2, 7))
    losses = module.loss(
        mine,
        [InstanceData(bboxes=proposals, scores=torch.ones(20), labels=torch.zeros(20))],
        [sample(64, 64, boxes, labels, polygons)],
    )
    rois = torch.cat((boxes, proposals))  # objects are proposals as well
    expected = roi_losses(theirs, source, rois, boxes, labels)
    index, label = match(rois, boxes, 0.5, 0.5, low_quality=False)
    chosen, index = rois[label == 1], index[label == 1]
    targets = [rasterize(polygons[i], box) for i, box in zip(index, chosen)]
    expected['loss_mask'] = mask_loss(
        theirs, source, chosen, labels[index], torch.stack(targets)
    )
    assert 2 < len(chosen) < len(rois)
    assert_same_losses(losses, expected, module, source, names, mine, theirs)
