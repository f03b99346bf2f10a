"""What tools/check_results.py compares."""

import pytest
from mmengine.config import Config

from mmrest.utils.results import Expected, ResultsError, compare, expected

FIGURES = Expected({'box AP': 40.3, 'mask AP': 37.2}, 0.1, 'test figures')


@pytest.mark.parametrize(
    ('box', 'mask', 'agree'),
    [
        (0.403, 0.372, True),
        (0.404, 0.371, True),  # just inside
        (0.405, 0.372, False),
        (0.403, 0.370, False),
    ],
)
def test_compare(box, mask, agree):
    measured = {'coco/bbox_mAP': box, 'coco/segm_mAP': mask}
    result, text = compare(measured, FIGURES)
    assert result is agree
    assert 'test figures' in text
    assert ('DIFFERS' in text) is not agree


def test_accuracy_comes_in_percent(repo):
    name = 'configs/imagenet/rest_base_8xb128_in1k.py'
    figures = expected(Config(), name, repo)
    assert figures.metrics == {'top-1': 81.6} and figures.tolerance == 0.1
    assert compare({'accuracy/top1': 81.55, 'accuracy/top5': 95.0}, figures)[0]
    assert not compare({'accuracy/top1': 80.9}, figures)[0]


def test_a_missing_metric_is_no_agreement():
    with pytest.raises(ResultsError, match='mask AP was not measured'):
        compare({'coco/bbox_mAP': 0.403}, FIGURES)


@pytest.mark.parametrize(
    ('name', 'tolerance', 'weights'),
    [
        ('mmrest::retinanet/rest_small_fpn_1x.py', 1.0, 'retrained'),
        ('configs/retinanet/rest_small_fpn_1x_published.py', 0.1, 'converted'),
    ],
)
def test_index(name, tolerance, weights, repo):
    figures = expected(Config(), name, repo)
    assert figures.metrics == {'box AP': 40.3}
    assert figures.tolerance == tolerance
    assert f'published figures, for {weights} weights' in figures.kind


def test_the_config_comes_first(repo):
    own = {'metrics': {'box AP': 1.5}, 'tolerance': 0.2, 'kind': 'measured here'}
    cfg = Config({'expected_results': own})
    figures = expected(cfg, 'configs/retinanet/rest_small_fpn_1x.py', repo)
    assert figures == Expected({'box AP': 1.5}, 0.2, 'measured here (the config)')


@pytest.mark.parametrize(
    'own', [{}, {'metrics': {'AP': 1.0}, 'tolerance': 1, 'kind': 'x'}]
)
def test_incomplete_figures(own, repo):
    with pytest.raises(ResultsError, match='expected_results of the config takes'):
        expected(Config({'expected_results': own}), 'x.py', repo)


def test_no_figures(repo):
    with pytest.raises(ResultsError, match='no expected figures for'):
        expected(Config(), 'configs/retinanet/rest_lite_fpn_1x.py', repo)
