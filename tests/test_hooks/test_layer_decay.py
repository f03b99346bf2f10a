"""Parameter groups: no decay on norms, biases per option, a rate for each layer."""

import pytest
import rest_variants
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmrest import ResT, ResTV2

TINY = dict(rest_variants.TINY, depths=[1, 2, 1, 1])
LR, DECAY, RATE = 0.1, 0.05, 0.5


def build(model, wrapper='OptimWrapper', **paramwise):
    cfg = dict(
        type=wrapper,
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=paramwise,
    )
    if 'layer_decay_rate' in paramwise:
        cfg['constructor'] = 'LayerDecayOptimWrapperConstructor'
    return build_optim_wrapper(model, ConfigDict(cfg)).optimizer


def groups(model, optimizer):
    """The group of each trained parameter by the parameter's name."""
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(g['params'][0])]: g for g in optimizer.param_groups}


def in_norms(model):
    norms = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
    return {
        f'{prefix}.{name}'
        for prefix, module in model.named_modules()
        if isinstance(module, norms)
        for name, _ in module.named_parameters(recurse=False)
    }


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(4, 4)


@pytest.mark.parametrize(
    'options', [{}, dict(norm_cfg=dict(type='GN', num_groups=4))], ids=['BN', 'GN']
)
def test_decay_of_norms_and_biases(options):
    """What configs/_base_/schedules/schedule_1x.py asks of MMEngine."""
    model = ResT(TINY, **options)
    found = groups(model, build(model, norm_decay_mult=0.0, bias_decay_mult=0.002))
    norms = in_norms(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert 4 < len(norms) < len(found)
    for name, group in found.items():
        bias = name.endswith('.bias')
        expected = 0.0 if name in norms else DECAY * 0.002 if bias else DECAY
        assert group['weight_decay'] == pytest.approx(expected), name
        assert group['lr'] == LR


def check_depth(model, depths, first, entries, last):
    """Entries belong to the block before them, norms of outputs to the last layer."""
    depth = model.get_layer_depth
    num_layers = sum(depths) + 2
    assert depth(first) == (0, num_layers)
    layer = 0
    for stage, (count, entry) in enumerate(zip(depths, [first, *entries]), 1):
        assert depth(entry)[0] == layer
        for block in range(count):
            layer += 1
            assert depth(f'stage{stage}.{block}.attn.q.weight')[0] == layer
    for name in last:
        assert depth(name) == (num_layers - 1, num_layers)
    every = {depth(name)[0] for name, _ in model.named_parameters()}
    assert every == set(range(num_layers))


def test_depth_follows_the_forward_pass():
    entries = [f'patch_embed_{n}.conv.weight' for n in (2, 3, 4)]
    last = ['norm1.weight', 'norm2.bias', 'norm3.weight', 'norm.weight']
    check_depth(ResT(TINY), TINY['depths'], 'stem.conv1.weight', entries, last)


def test_depth_of_the_second_generation():
    arch = dict(TINY, num_heads=[1, 2, 4, 8], embed_dims=[8, 16, 32, 64])
    entries = [f'patch_{n}.proj.weight' for n in (2, 3, 4)]
    last = [f'norm_{n}.weight' for n in (1, 2, 3, 4)]
    check_depth(ResTV2(arch), TINY['depths'], 'stem.proj.0.weight', entries, last)


@pytest.mark.parametrize('kind, entry', [(ResT, 'patch_embed_'), (ResTV2, 'patch_')])
def test_rate_of_each_stage(kind, entry):
    """As published for UPerNet with v2: an entry belongs to the stage before it."""
    model = Detector(kind(TINY))
    found = groups(model, build(model, layer_decay_rate=0.9, decay_type='stage_wise'))
    layers = {'stem': 0, **{f'stage{i}': i for i in (1, 2, 3, 4)}}
    layers.update({f'{entry}{i}': i - 1 for i in (2, 3, 4)})
    for name, group in found.items():
        layer = layers.get(name.split('.')[1], 5)
        assert group['lr'] == pytest.approx(LR * 0.9 ** (5 - layer)), name


def test_depth_below_a_prefix():
    model = ResT(TINY)
    depth = model.get_layer_depth
    assert depth('backbone.stage1.0.norm1.weight', 'backbone.') == (1, 7)
    assert depth('backbone.stem.conv1.weight', 'backbone.') == (0, 7)
    assert depth('neck.stage1.0.weight', 'backbone.') == (6, 7)
    assert depth('stem.conv1.weight', 'backbone.') == (6, 7)


@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), (3,), (0, 1, 2, 3)])
def test_stages_that_are_not_built_do_not_count(out_indices):
    model = ResT(TINY, out_indices=out_indices)
    num_layers = sum(TINY['depths'][: out_indices[-1] + 1]) + 2
    found = {model.get_layer_depth(name) for name, _ in model.named_parameters()}
    assert found == {(i, num_layers) for i in range(num_layers)}


@pytest.mark.parametrize('place', ['alone', 'detector', 'wrapped'])
def test_rate_of_each_layer(place):
    backbone = ResT(TINY)
    model = backbone if place == 'alone' else Detector(backbone)
    wrapped = nn.DataParallel(model) if place == 'wrapped' else model
    found = groups(model, build(wrapped, layer_decay_rate=RATE, norm_decay_mult=0.0))
    assert found.keys() == dict(model.named_parameters()).keys()
    norms = in_norms(model)
    for name, group in found.items():
        inner = name[len('backbone.') :] if place != 'alone' else name
        layer, num_layers = backbone.get_layer_depth(inner)
        if name.startswith('head.'):
            layer = num_layers - 1
        scale = RATE ** (num_layers - 1 - layer)
        assert group['lr'] == pytest.approx(LR * scale), name
        assert group['lr_scale'] == scale
        assert (group['layer_id'], group['param_name']) == (layer, name)
        assert group.get('weight_decay') == (0.0 if name in norms else DECAY)
    out_norm = 'norm1.weight' if place == 'alone' else 'backbone.norm1.weight'
    assert found[out_norm]['lr'] == LR


def test_options_of_the_default_constructor_stay():
    """Those that set a learning rate are multiplied, those of the decay are kept."""
    model = Detector(ResT(TINY, frozen_stages=1))
    model.copy = model.head  # the same parameters again
    options = dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.1,
        bias_lr_mult=2.0,
        bypass_duplicate=True,
        custom_keys={'backbone.stage3': dict(lr_mult=10.0, decay_mult=3.0)},
    )
    found = groups(model, build(model, layer_decay_rate=RATE, **options))
    plain = groups(model, build(model, **options))
    assert found.keys() == plain.keys()  # the head once, nothing frozen
    frozen = ('backbone.stem', 'backbone.stage1')
    assert not any(name.startswith(frozen) for name in found)
    for name, group in found.items():
        assert group['lr'] == pytest.approx(plain[name]['lr'] * group['lr_scale'])
        assert group['weight_decay'] == plain[name]['weight_decay']
    key = 'backbone.stage3.0.attn.q.bias'
    assert found[key]['lr'] == pytest.approx(LR * 10 * RATE**2)
    assert found['head.bias']['lr'] == pytest.approx(LR * 2)


@pytest.mark.parametrize('rate', [None, 0, -0.5, 1.5, float('nan'), '0.9', True])
def test_bad_rate_is_named(rate):
    with pytest.raises(ValueError, match=f'above 0 and at most 1, found {rate!r}'):
        build(ResT(TINY), layer_decay_rate=rate)


def test_rate_of_one_changes_nothing():
    found = build(ResT(TINY), layer_decay_rate=1)
    assert {group['lr'] for group in found.param_groups} == {LR}


def test_optimizer_without_a_rate():
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW'),
        paramwise_cfg=dict(layer_decay_rate=0.9),
    )
    with pytest.raises(ValueError, match='give the optimizer an lr'):
        build_optim_wrapper(ResT(TINY), ConfigDict(cfg))


def test_backbone_without_layers_is_refused():
    with pytest.raises(ValueError, match='Detector has no part with get_layer_depth'):
        build(Detector(nn.Conv2d(3, 4, 1)), layer_decay_rate=0.9)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_found_from_the_scope_of_each_toolbox(scope):
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        optimizer = build(Detector(ResT(TINY)), layer_decay_rate=0.9)
    assert {group['layer_id'] for group in optimizer.param_groups} == set(range(7))


def test_mmpretrain_agrees():
    """Its own constructor and classifier, with our ``get_layer_depth``."""
    from mmpretrain.models import ImageClassifier

    # its parts are found from this scope alone, whatever another test left behind
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = ImageClassifier(
            backbone=dict(type='ResT', arch=TINY, out_indices=(3,)),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=32),
        )
    options = dict(layer_decay_rate=RATE, norm_decay_mult=0.0)
    ours = groups(model, build(model, **options))
    cfg = dict(
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        constructor='LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=options,
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs = groups(model, build_optim_wrapper(model, ConfigDict(cfg)).optimizer)
    assert ours.keys() == theirs.keys() and 'head.fc.weight' in ours
    for name, group in ours.items():
        for key in ('lr', 'weight_decay', 'layer_id', 'lr_scale', 'param_name'):
            assert group[key] == theirs[name][key], (name, key)


def test_inside_a_detector_of_mmdet(repo):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(repo / 'configs/retinanet/rest_lite_fpn_1x.py')
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    found = groups(model, build(model, layer_decay_rate=0.9))
    assert found['bbox_head.retina_cls.weight']['lr'] == LR
    assert found['neck.lateral_convs.0.conv.weight']['lr'] == LR
    # the stem below ten layers: eight blocks and the output norms
    assert found['backbone.stem.conv1.weight']['lr'] == pytest.approx(LR * 0.9**9)
