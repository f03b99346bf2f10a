"""Mixed precision: the words of ``--amp``, data types, and what stays in float32."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.amp import autocast
from mmengine.structures import PixelData
from torch import nn

from mmrest import launch
from mmrest.optim.amp import (
    AmpError,
    BFloat16OptimWrapper,
    choose_dtype,
    keep_in_float32,
    train_with_amp,
)
from mmrest.optim.amp import (
    test_with_amp as make_tests_half,
)

ARCH = dict(
    embed_dims=[8, 16, 32, 64],
    num_heads=[1, 2, 4, 8],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
)


@pytest.mark.parametrize(
    ('words', 'dtype'),
    [
        ('c.py', None),
        ('--amp c.py', 'auto'),
        ('c.py --amp', 'auto'),
        ('c.py --amp --work-dir w', 'auto'),
        ('--amp bfloat16 c.py', 'bfloat16'),
        ('--work-dir w --amp float16 c.py', 'float16'),
        ('c.py --amp=float16', 'float16'),
        ('c.py --amp bfloat16 --cfg-options a.b=1', 'bfloat16'),
        ('--cfg-options a.b=1 --amp c.py', 'auto'),
    ],
)
def test_it_may_stand_anywhere(words, dtype):
    parser = launch.ArgumentParser()
    launch.add_config_arguments(parser)
    launch.add_run_arguments(parser)
    args = parser.parse_args(words.split())
    assert (args.config, args.amp) == ('c.py', dtype)


def test_unknown_data_type(capsys):
    parser = launch.ArgumentParser()
    launch.add_run_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(['--amp=int8'])
    assert 'bfloat16' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('device', 'capability', 'requested', 'chosen'),
    [
        ('cpu', None, 'auto', 'bfloat16'),
        ('cpu', None, 'bfloat16', 'bfloat16'),
        ('cpu', None, 'float16', None),
        ('cuda', (8, 6), 'auto', 'bfloat16'),
        ('cuda', (9, 0), 'float16', 'float16'),
        ('cuda', (7, 5), 'auto', 'float16'),
        ('cuda', (7, 5), 'bfloat16', None),
        ('mps', None, 'auto', None),
    ],
)
def test_choice(monkeypatch, device, capability, requested, chosen):
    monkeypatch.setattr('mmrest.optim.amp.get_device', lambda: device)
    monkeypatch.setattr('torch.cuda.get_device_capability', lambda: capability)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda: 'an old GPU')
    if chosen:
        assert choose_dtype(requested) == chosen
    else:
        with pytest.raises(AmpError, match='--amp'):
            choose_dtype(requested)


@pytest.mark.parametrize('kind', ['OptimWrapper', 'AmpOptimWrapper', None])
def test_optim_wrapper_of_a_config(monkeypatch, kind):
    optimizer = dict(type='SGD', lr=0.1)
    wrapper = dict(optimizer=optimizer, accumulative_counts=2)
    if kind:
        wrapper['type'] = kind
    if kind == 'AmpOptimWrapper':
        wrapper['loss_scale'] = 512.0
    cfg = Config(dict(optim_wrapper=wrapper))
    monkeypatch.setattr('mmrest.optim.amp.choose_dtype', lambda requested: requested)
    train_with_amp(cfg, 'float16')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    expected = 512.0 if kind == 'AmpOptimWrapper' else 'dynamic'
    assert cfg.optim_wrapper.loss_scale == expected
    train_with_amp(cfg, 'bfloat16')
    assert cfg.optim_wrapper == dict(
        type='mmrest.optim.amp.BFloat16OptimWrapper',
        optimizer=optimizer,
        accumulative_counts=2,
    )


@pytest.mark.parametrize('fields', [dict(), dict(optim_wrapper=dict(type='Mine'))])
def test_other_optim_wrapper_is_refused(fields):
    with pytest.raises(AmpError, match='without --amp'):
        train_with_amp(Config(fields), 'auto')


@pytest.mark.parametrize('device, refused', [('cpu', True), ('cuda', False)])
def test_a_config_with_amp_of_its_own(monkeypatch, device, refused):
    monkeypatch.setattr('mmrest.optim.amp.get_device', lambda: device)
    fields = dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    cfg = Config(dict(optim_wrapper=fields))
    if refused:
        with pytest.raises(AmpError, match='device is cpu. Give --amp bfloat16'):
            train_with_amp(cfg, None)
    else:
        train_with_amp(cfg, None)
        assert cfg.optim_wrapper == fields


def test_bfloat16_step():
    """Computed in bfloat16; the parameters stay in float32."""
    model, seen = nn.Linear(3, 2), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = BFloat16OptimWrapper(optimizer=optimizer, accumulative_counts=2)
    before = model.weight.detach().clone()
    for _ in range(2):
        with wrapper.optim_context(model):
            loss = model(torch.ones(4, 3)).float().square().mean()
        wrapper.update_params(loss)
    assert seen == [torch.bfloat16] * 2
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)


def test_coordinates_and_losses_stay_in_float32(config):
    """bfloat16 tells apart every fourth pixel above 512."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(config).model).eval()
    keep_in_float32(model)
    count = sum(len(m._forward_hooks) for m in model.modules())
    keep_in_float32(model)
    assert sum(len(m._forward_hooks) for m in model.modules()) == count > 0
    features = [torch.rand(1, 16, 24 // 2**i, 32 // 2**i) for i in range(5)]
    rois = torch.tensor([[0, 517.3, 200.1, 700.7, 301.9]])
    with autocast(dtype=torch.bfloat16):
        half = [feature.bfloat16() for feature in features]
        inner = model.rpn_head.rpn_conv(half[0])
        scores, deltas = model.rpn_head(half)
        pooled = model.roi_head.bbox_roi_extractor(half[:4], rois)
        fc = model.roi_head.bbox_head(pooled)
    assert inner.dtype == torch.bfloat16
    for tensor in (*scores, *deltas, *fc, pooled):
        assert tensor.dtype == torch.float32
    whole = [feature.float() for feature in half]
    expected = model.roi_head.bbox_roi_extractor(whole[:4], rois)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)
    # autocast is as before
    assert not torch.is_autocast_enabled('cpu')


def segmentor():
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=(32, 32), ori_shape=(32, 32)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, 32, 32)))
    return (
        'upernet_rest_lite',
        'mmseg',
        sample,
        dict(
            backbone=dict(init_cfg=None),
            decode_head=dict(in_channels=ARCH['embed_dims'], channels=16),
            auxiliary_head=dict(in_channels=32, channels=16),
            data_preprocessor=dict(size=(32, 32)),
        ),
    )


def classifier():
    from mmpretrain.structures import DataSample

    return (
        'classifier_rest_small',
        'mmpretrain',
        DataSample().set_gt_label(3),
        dict(
            head=dict(in_channels=64),
        ),
    )


@pytest.mark.parametrize('kind', [segmentor, classifier])
def test_other_toolboxes(repo, kind):
    name, scope, sample, changes = kind()
    cfg = Config.fromfile(repo / f'configs/_base_/models/{name}.py')
    cfg.merge_from_dict(dict(model=changes))
    cfg.model.backbone.arch = ARCH
    with DefaultScope.overwrite_default_scope(scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    data = dict(inputs=list(images), data_samples=[sample, sample])
    losses = model.train_step(data, BFloat16OptimWrapper(optimizer=optimizer))
    assert all(loss.isfinite().all() for loss in losses.values())
    assert losses['loss'].dtype == torch.float32
    make_tests_half(model.eval(), 'auto')
    data = dict(inputs=list(images), data_samples=[sample, sample])
    assert len(model.test_step(data)) == 2


def test_train_and_test(call, config, trained, tmp_path, metrics):
    options = ['--cfg-options', 'train_cfg.max_iters=2', 'val_cfg=None']
    options += ['val_dataloader=None', 'val_evaluator=None']
    output = call(
        'train.py', '--amp', config, '--work-dir', 'run', *options, cwd=tmp_path
    )
    assert 'BFloat16OptimWrapper' in output and (tmp_path / 'run/iter_2.pth').exists()

    checkpoint, found = trained[0] / 'iter_4.pth', {}
    for name, amp in (('float', []), ('half', ['--amp'])):
        options = ['--work-dir', name, '--out', f'{name}.json', *amp]
        call('test.py', *options, config, checkpoint, cwd=tmp_path)
        found[name] = json.loads((tmp_path / f'{name}.bbox.json').read_text())
    scores = [sorted(x['score'] for x in found[name]) for name in ('float', 'half')]
    assert scores[0] != scores[1]
    means = [sum(s) / len(s) for s in scores]
    assert means[1] == pytest.approx(means[0], rel=0.05, abs=1e-3)


def test_float16_without_gpu(call, config, tmp_path):
    output = call('train.py', config, '--amp', 'float16', cwd=tmp_path, fails=True)
    assert 'tools/train.py: --amp float16 needs a GPU' in output
