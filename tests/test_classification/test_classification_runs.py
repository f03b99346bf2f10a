"""A classifier through the tools: training, averaging, testing, and a detector."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmrest.checkpoint import read_checkpoint


def accuracies(output):
    """Top-1 and top-5 of the last evaluation that a tool has printed."""
    found = re.findall(r'accuracy/top1: ([\d.]+) +accuracy/top5: ([\d.]+)', output)
    return tuple(float(figure) for figure in found[-1])


@pytest.fixture(scope='module')
def first_epoch(class_folders, call):
    """Work folder of an epoch, and what its validation gave."""
    work = class_folders / 'work'
    output = call('train.py', 'config.py', '--work-dir', work, cwd=class_folders)
    return work, accuracies(output)


@pytest.fixture(scope='module')
def trained(class_folders, call, first_epoch):
    """One epoch, and a second one with averaged weights that resumes it."""
    work = first_epoch[0]
    config = class_folders / 'ema.py'
    config.write_text(
        "_base_ = './config.py'\n"
        'train_cfg = dict(max_epochs=2)\n'
        "custom_hooks = [dict(type='EMAHook', momentum=0.3)]\n"
    )
    output = call('train.py', config, '--work-dir', work, '--resume', cwd=class_folders)
    assert 'Epoch(train) [2]' in output and 'Epoch(train) [1]' not in output
    return work


@pytest.mark.slow
@pytest.mark.parametrize('prefix', [{}, dict(prefix='backbone.')], ids=str)
@pytest.mark.parametrize('epoch', [1, 2])
def test_a_trained_classifier_goes_into_a_detector(trained, repo, epoch, prefix):
    path = trained / f'epoch_{epoch}.pth'
    saved = read_checkpoint(path)
    assert ('ema_state_dict' in saved) is (epoch == 2)
    arch = Config.fromfile(trained.parent / 'config.py').model.backbone.arch
    cfg = Config.fromfile(str(repo / 'configs/retinanet/rest_lite_fpn_1x.py'))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.arch = arch
    init_cfg = dict(type='Pretrained', checkpoint=str(path), **prefix)
    cfg.model.backbone.init_cfg = init_cfg
    cfg.model.neck.in_channels = [16, 24, 32]
    model = MODELS.build(cfg.model)
    model.init_weights()
    state = saved['state_dict']
    for key, tensor in model.backbone.state_dict().items():
        if not key.startswith(('norm1.', 'norm2.', 'norm3.')):
            assert torch.equal(tensor, state[f'backbone.{key}']), key
    if epoch == 2:  # the averaged weights, not those of the last step
        raw = saved['ema_state_dict']['module.backbone.stem.conv1.weight']
        assert not torch.equal(raw, state['backbone.stem.conv1.weight'])


@pytest.mark.slow
@pytest.mark.parametrize('tta', [[], ['--tta']], ids=str)
def test_a_published_file_is_tested_as_it_is(
    first_epoch, class_folders, call, metrics, tta
):
    """The trained weights in published form give the accuracy of the own file."""
    work, expected = first_epoch
    state = read_checkpoint(work / 'epoch_1.pth')['state_dict']
    published = {
        key.replace('backbone.', '').replace('head.fc.', 'head.'): tensor
        for key, tensor in state.items()
    }
    torch.save(dict(model=published), class_folders / 'published.pth')
    work = class_folders / f'tested{"".join(tta)}'
    output = call(
        'test.py', 'config.py', 'published.pth', '--work-dir', work, *tta,
        cwd=class_folders,
    )  # fmt: skip
    found = metrics(work)
    top1, top5 = found['accuracy/top1'], found['accuracy/top5']
    assert accuracies(output) == pytest.approx((top1, top5), abs=1e-3)
    assert 0 <= top1 <= top5 <= 100 and top5 > 0
    if not tta:
        assert (top1, top5) == pytest.approx(expected, abs=1e-3)
