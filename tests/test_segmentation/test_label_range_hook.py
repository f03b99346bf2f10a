"""The check of every batch, in training, validation and test."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmrest.hooks import LabelRangeHook

STAGES = ('before_train_iter', 'before_val_iter', 'before_test_iter')


@pytest.fixture(scope='module')
def segmentor(config):
    cfg = Config.fromfile(str(config))
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


@pytest.fixture(params=['plain', 'augmented test'])
def runner(request, segmentor):
    if request.param == 'plain':
        return SimpleNamespace(model=segmentor)
    return SimpleNamespace(
        model=MODELS.build(dict(type='SegTTAModel', module=segmentor))
    )


def batch_with(value, **meta):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = torch.zeros(1, 4, 5, dtype=torch.long)
    labels[0, 1, :3] = value
    truth = PixelData(data=labels)
    meta = dict(seg_map_path='labels/7.png', **meta)
    return dict(data_samples=[SegDataSample(gt_sem_seg=truth, metainfo=meta)])


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('value', [0, 2, 255])
def test_classes_and_the_ignored_label_pass(runner, stage, value):
    getattr(LabelRangeHook(), stage)(runner, 0, batch_with(value))


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('value', [3, 254])
def test_other_labels_are_named(runner, stage, value):
    with pytest.raises(ValueError) as error:
        getattr(LabelRangeHook(), stage)(runner, 0, batch_with(value))
    assert f'labels/7.png holds the index {value} in 3 pixels' in str(error.value)


def test_reduced_zero_label_is_mentioned(runner):
    data = batch_with(3, reduce_zero_label=True)
    with pytest.raises(ValueError, match='index 3 after reduce_zero_label'):
        LabelRangeHook().before_train_iter(runner, 0, data)


def test_augmented_images_and_images_without_labels(runner):
    data = batch_with(3)
    augmented = dict(data_samples=[data['data_samples'] * 2])
    with pytest.raises(ValueError, match='labels/7.png'):
        LabelRangeHook().before_test_iter(runner, 0, augmented)
    del data['data_samples'][0].gt_sem_seg
    LabelRangeHook().before_test_iter(runner, 0, data)
