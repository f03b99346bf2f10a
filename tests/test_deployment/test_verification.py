"""What a file is told to differ in, and what is the rounding of another CPU."""

import copy
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmrest.deployment import verification
from mmrest.deployment.verification import check, compare_detections


@torch.no_grad()
def run(module, image, size):
    outputs = module(torch.from_numpy(image), torch.from_numpy(size))
    return {n: x.numpy() for n, x in zip(module.output_names, outputs)}


@pytest.mark.parametrize(
    'task, arch',
    [
        ('retinanet', 'rest_lite'),
        ('mask_rcnn', 'rest_lite'),
        ('mask_rcnn', 'restv2_tiny'),
    ],
)
def test_detections_are_clear(task, arch, detector):
    """The detectors of these tests: rounding moves none out of the tolerances."""
    _, reference, images, size = detector(task, arch)
    for image in images:
        expected = reference.predict(image, size)
        for seed in range(2):
            rounded = verification.change_weights(reference, seed)
            pairs, _ = reference.compare(rounded.predict(image, size), expected)
            assert len(pairs) > 9
            assert max(pairs)[0] < 1, max(pairs)


def test_rounding_is_no_difference(detector, monkeypatch):
    """Boxes that rounding moves by more than the tolerance.

    That of another CPU is imitated by weights that are changed by eight steps of
    float32; this CPU's own is between the two forms of the model.
    """
    exported, reference, images, size = detector('mask_rcnn', sensitive=True)
    with monkeypatch.context() as patch:
        patch.setattr(verification, 'CHANGE', 2.0**-20)
        other = verification.change_weights(reference, 9)
    beyond = 0
    for image in images:
        found = other.predict(image, size)
        pairs, _ = reference.compare(found, reference.predict(image, size))
        beyond += sum(value > 1 for value, _ in pairs)
        assert check(found, reference, image, size)[0] == ''
        assert check(run(exported, image, size), reference, image, size)[0] == ''
    assert beyond


def one_weight(module):
    module.model.neck.fpn_convs[0].conv.weight.data *= 1.001


def overlap(module):
    module.cfg.nms.iou_threshold = 0.55


def proposals(module):
    module.model.rpn_head.test_cfg.max_per_img = 30


def mask_threshold(module):
    module.cfg.mask_thr_binary = 0.52


def order_of_channels(module):
    module.preprocess.to_bgr = not module.preprocess.to_bgr


@pytest.mark.parametrize('sensitive', [False, True])
@pytest.mark.parametrize(
    'fault', [one_weight, overlap, proposals, mask_threshold, order_of_channels]
)
def test_faults_are_differences(fault, sensitive, detector):
    exported, reference, images, size = detector('mask_rcnn', sensitive=sensitive)
    # configs are shared between copies
    exported.cfg = copy.deepcopy(exported.cfg)
    fault(exported)
    problem, _ = check(run(exported, images[1], size), reference, images[1], size)
    assert 'beyond rounding, such as class' in problem


class Line(nn.Module):
    """A detector of one box, whose left side rounding moves by up to 1e-4 * gain."""

    def __init__(self, gain):
        super().__init__()
        self.model = nn.Linear(64, 1, bias=False)
        self.model.weight.data.fill_(1)
        self.gain = gain

    def predict(self, image, size):
        weight = self.model.weight.detach().double()
        moved = self.gain * float((weight - 1).sum())
        box = np.array([[10 + moved, 20, 30, 40]], np.float32)
        scores, labels = np.array([0.5], np.float32), np.array([1])
        return dict(boxes=box, scores=scores, labels=labels)

    def compare(self, found, expected):
        return compare_detections(found, expected, 0.05, 100)


@pytest.mark.parametrize(
    'gain, change, problem',
    [
        (1, dict(), ''),
        (1, dict(left=0.009), ''),
        (1, dict(left=0.02), 'box by 0.020 pixel'),
        (1e3, dict(left=0.02), ''),
        (1e3, dict(left=0.2), 'box by 0.200 pixel'),
        (1e3, dict(score=0.002), 'score by 2.0e-03'),
        (1e3, dict(label=2), 'class 2 with score 0.5000 .*: not of the model'),
        (1e3, dict(left=np.nan), 'not of the model'),
        (1e3, dict(count=0), 'class 1 with score 0.5000 .*: missing'),
        (1e3, dict(count=2), 'not of the model'),
    ],
)
def test_tolerance(gain, change, problem):
    module, image, size = Line(gain), np.zeros((1, 8, 8, 3)), np.array([8, 8])
    found = module.predict(image, size)
    found['boxes'][0, 0] += change.get('left', 0)
    found['scores'] += np.float32(change.get('score', 0))
    found['labels'] += change.get('label', 1) - 1
    found = {n: np.repeat(x, change.get('count', 1), 0) for n, x in found.items()}
    text, count = check(found, module, image, size)
    assert re.search(problem, text) and bool(text) is bool(problem)
    assert count == ('' if problem else '1 detections')


@pytest.mark.parametrize(
    'score, threshold, limit', [(0.05005, 0.05, 100), (0.5, 0.05, 1)]
)
def test_what_is_near_the_threshold_may_be_missing(score, threshold, limit):
    expected = dict(
        boxes=np.array([[1, 2, 3, 4]], np.float32),
        scores=np.array([score], np.float32),
        labels=np.array([0]),
    )
    nothing = {name: array[:0] for name, array in expected.items()}
    for pair in ((nothing, expected), (expected, nothing)):
        assert compare_detections(*pair, threshold, limit)[0] == []


def test_probabilities_that_are_not_numbers(trained):
    from mmrest.deployment.classifiers import Classifier

    cfg = Config.fromfile(trained('classifier')[0])
    init_default_scope(cfg.default_scope)
    module = Classifier(MODELS.build(cfg.model).eval())
    image, size = np.zeros((1, 64, 64, 3), np.uint8), np.array([64, 64])
    found = module.predict(image, size)
    assert check(found, module, image, size) == ('', '3 probabilities')
    found['scores'] *= np.nan
    assert 'a probability by nan' in check(found, module, image, size)[0]
