"""The stems, positions and attentions that the paper compares."""

import copy
import math

import pytest
import torch
from mmengine.registry import MODELS
from rest_variants import OTHERS, TINY, VARIANTS, tiny
from torch import nn
from weights_rule import fill, image

from mmrest import ResT, models
from mmrest.models.rest import EMSA
from mmrest.models.rest_ablations import MSA, ReducedMSA, UnnormalisedEMSA, emsa
from mmrest.ops import head_interaction_attention

SIZES = [(1, 1), (1, 40), (33, 65)]


def expected_sizes(height, width):
    sides = [(math.ceil(height / s), math.ceil(width / s)) for s in (4, 8, 16, 32)]
    return [(1, dim, *size) for dim, size in zip(TINY['embed_dims'], sides)]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('variant', OTHERS)
def test_any_size_forward_and_backward(variant, size):
    model = tiny(variant).eval()
    x = image((1, 3, *size)).requires_grad_()
    outs = model(x)
    assert [tuple(out.shape) for out in outs] == expected_sizes(*size)
    assert all(out.isfinite().all() for out in outs)
    sum((out * image(out.shape, 9)).sum() for out in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('variant', OTHERS)
def test_variants_differ_from_the_published_model(variant):
    x = image((1, 3, 64, 64))
    with torch.no_grad():
        found, published = (tiny(name).eval()(x)[3] for name in (variant, 'published'))
    assert not torch.allclose(found, published, atol=1e-2)


@pytest.mark.parametrize('variant', ['published', *OTHERS])
def test_reads_its_own_checkpoint_and_refuses_those_of_others(variant, tmp_path):
    source = tiny(variant)
    path = tmp_path / 'rest.pth'
    torch.save(source.state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    for name, options in VARIANTS.items():
        model = ResT(TINY, **options, init_cfg=init_cfg)
        if name == variant:
            model.init_weights()
            for key, tensor in model.state_dict().items():
                assert torch.equal(tensor, source.state_dict()[key]), key
            continue
        before = copy.deepcopy(model.state_dict())
        differing = set(before) ^ set(source.state_dict())
        differing = {key for key in differing if 'num_batches' not in key}
        with pytest.raises(ValueError, match='nothing was loaded') as error:
            model.init_weights()
        assert any(key in str(error.value) for key in differing), name


@pytest.mark.parametrize(
    'argument, name', [('stem_cfg', 'rest'), ('pos_cfg', 'pa'), ('attn_cfg', 'emsa')]
)
def test_a_name_and_a_dict_are_the_same(argument, name):
    plain, x = tiny('published').eval(), image((1, 3, 40, 40))
    for cfg in (name, dict(type=name)):
        model = ResT(TINY, **{argument: cfg}).eval()
        assert list(model.state_dict()) == list(plain.state_dict())
        fill(model.state_dict())
        assert torch.equal(model(x)[3], plain(x)[3])


def attend(cls, sr_ratio=1, **options):
    module = cls(dim=12, num_heads=3, sr_ratio=sr_ratio, **options).double().eval()
    fill(module.state_dict())
    return module


def test_equations_of_the_attentions():
    """With the same projections, each is the formula that its docstring gives."""
    x = image((2, 35, 12)).double()
    q, k, v = (image((2, 3, 35, 4), seed).double() for seed in (1, 2, 3))
    scores = q @ k.transpose(-2, -1) / 2
    plain = scores.softmax(-1) @ v
    for cls in (MSA, ReducedMSA):
        torch.testing.assert_close(attend(cls).attend(q, k, v), plain)
    torch.testing.assert_close(attend(MSA)(x, (5, 7)), attend(ReducedMSA)(x, (5, 7)))

    unnormalised = attend(UnnormalisedEMSA)
    weight, bias = unnormalised.mix_conv.weight[..., 0, 0], unnormalised.mix_conv.bias
    mixed = torch.einsum('ij,bjnm->binm', weight, scores) + bias[:, None, None]
    maps = mixed.softmax(-1)
    torch.testing.assert_close(unnormalised.attend(q, k, v), maps @ v)

    # the norm of a map: mean 1 / M, and the standard deviation of its entries
    std = (maps.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = ((maps - 1 / 35) / std) @ v
    found = head_interaction_attention(q, k, v, weight, bias)
    torch.testing.assert_close(found, expected)
    emsa = attend(EMSA)
    emsa.transform_conv.load_state_dict(unnormalised.mix_conv.state_dict())
    torch.testing.assert_close(emsa.attend(q, k, v), expected)


def windows(x, kernel, stride, padding=0, value=0.0):
    """The entries of each window, (B, C, kernel ** 2, windows)."""
    x = nn.functional.pad(x, [padding] * 4, value=value)
    found = nn.functional.unfold(x, kernel, stride=stride)
    return found.unflatten(1, (x.shape[1], -1))


def test_equations_of_the_stems():
    x = image((2, 3, 9, 14)).double()
    patch, resnet = (
        tiny(name, pos_cfg='none').double().eval().stem
        for name in ('stem_patch', 'stem_resnet')
    )
    # zeros to the right and below make 3 x 4 patches
    patches = windows(nn.functional.pad(x, (0, 2, 0, 3)), 4, 4).flatten(1, 2)
    tokens = patches.mT @ patch.proj.weight.flatten(1).mT + patch.proj.bias
    centred = tokens - tokens.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = centred / deviation * patch.norm.weight + patch.norm.bias
    torch.testing.assert_close(patch(x).flatten(2).mT, expected)

    x = resnet.norm(nn.functional.conv2d(x, resnet.conv.weight, stride=2, padding=3))
    expected = windows(x.relu(), 3, 2, 1, -math.inf).amax(2).unflatten(2, (3, 4))
    torch.testing.assert_close(resnet(image((2, 3, 9, 14)).double()), expected)


@pytest.mark.parametrize('sr_ratio', [2, 4])
def test_pooling_has_the_windows_of_the_convolution(sr_ratio):
    x = image((2, 12, 9, 14)).double()
    options = (sr_ratio + 1, sr_ratio, sr_ratio // 2)
    highest = windows(x, *options, -math.inf).amax(2)
    count = windows(torch.ones_like(x), *options).sum(2)
    for reduction, expected in (
        ('max', highest),
        ('avg', windows(x, *options).sum(2) / count),
    ):
        found = attend(emsa, sr_ratio, reduction=reduction).sr(x)
        torch.testing.assert_close(found.flatten(2), expected)


@pytest.mark.parametrize('heads', [1, 2])
@pytest.mark.parametrize('cls', [EMSA, ReducedMSA, UnnormalisedEMSA])
def test_maps_have_dropout_in_training_only(cls, heads):
    module, x = cls(dim=8, num_heads=heads, attn_drop=0.5), image((1, 35, 8))
    assert not torch.equal(module(x, (5, 7)), module(x, (5, 7)))
    module.eval()
    assert torch.equal(module(x, (5, 7)), module(x, (5, 7)))


@pytest.mark.parametrize('size', [(1, 1), (5, 7), (8, 8), (9, 16)])
@pytest.mark.parametrize('sr_ratio', [2, 4, 8])
def test_reductions_give_the_same_grid(sr_ratio, size):
    x = image((2, size[0] * size[1], 12)).double()
    count = math.ceil(size[0] / sr_ratio) * math.ceil(size[1] / sr_ratio)
    for reduction in ('conv', 'avg', 'max'):
        module = attend(emsa, sr_ratio, reduction=reduction)
        assert module.reduce(x, size).shape == (2, count, 12)
    # a pooling of a constant map is that constant, also at the border
    for reduction in ('avg', 'max'):
        module = attend(emsa, sr_ratio, reduction=reduction)
        pooled = module.sr(torch.full((1, 12, *size), 3.0).double())
        assert torch.equal(pooled, torch.full_like(pooled, 3.0))


def test_learnable_embedding():
    model = ResT(TINY, pos_cfg=dict(type='le', image_size=(64, 96)))
    grids = [tuple(model.stem.pos.pos_embed.shape[2:])]
    entries = [getattr(model, f'patch_embed_{k}') for k in (2, 3, 4)]
    grids += [tuple(entry.pos.pos_embed.shape[2:]) for entry in entries]
    assert grids == [(16, 24), (8, 12), (4, 6), (2, 3)]
    pos = model.stem.pos
    assert 0.01 < float(pos.pos_embed.std()) < 0.03
    x = image((2, 8, 16, 24))
    assert torch.equal(pos(x), x + pos.pos_embed)
    # of a constant embedding every size sees that constant
    nn.init.constant_(pos.pos_embed, 0.5)
    for size in ((1, 1), (7, 30), (32, 48)):
        x = image((2, 8, *size))
        torch.testing.assert_close(pos(x), x + 0.5)
    nn.init.normal_(pos.pos_embed)
    x = image((2, 8, 7, 30))
    resized = nn.functional.interpolate(pos.pos_embed, size=(7, 30), mode='bicubic')
    torch.testing.assert_close(pos(x), x + resized)


@pytest.mark.parametrize('through', ['init_cfg', 'load_state_dict', 'mmengine'])
def test_learnable_embedding_of_another_grid_is_interpolated(tmp_path, through):
    from mmengine.runner import load_checkpoint

    def build(size, **options):
        return ResT(TINY, pos_cfg=dict(type='le', image_size=size), **options)

    source, path = build(64), str(tmp_path / 'rest.pth')
    torch.save(dict(state_dict=source.state_dict()), path)
    if through == 'init_cfg':
        model = build(96, init_cfg=dict(type='Pretrained', checkpoint=path))
        model.init_weights()
    else:
        model = build(96)
        if through == 'mmengine':
            load_checkpoint(model, path, strict=True)
        else:
            model.load_state_dict(source.state_dict())
    expected = nn.functional.interpolate(
        source.stem.pos.pos_embed, size=(24, 24), mode='bicubic', align_corners=False
    )
    torch.testing.assert_close(model.stem.pos.pos_embed, expected)
    assert torch.equal(model.stem.conv1.weight, source.stem.conv1.weight)
    assert source.stem.pos.pos_embed.shape[-1] == 16, 'the source is unchanged'


@pytest.mark.parametrize('size', [64, 96])
def test_learnable_embedding_is_loaded_in_its_own_precision(size):
    source, model = (
        ResT(TINY, pos_cfg=dict(type='le', image_size=s)).double() for s in (64, size)
    )
    position = image(source.stem.pos.pos_embed.shape).double() / 3
    source.stem.pos.pos_embed.data.copy_(position)
    model.load_state_dict(source.state_dict())
    found = model.stem.pos.pos_embed
    expected = nn.functional.interpolate(
        position, size=found.shape[2:], mode='bicubic', align_corners=False
    )
    torch.testing.assert_close(found.detach(), expected, rtol=1e-14, atol=1e-14)


def test_positions_registered_elsewhere():
    """From MMEngine's registry, another package's, and by class."""

    class Gate(nn.Module):
        def __init__(self, channels, power=1):
            super().__init__()
            self.gate = nn.Parameter(torch.full((channels, 1, 1), 7.0))

        def forward(self, x):
            return x * self.gate

    model = ResT(TINY, pos_cfg=dict(type=Gate, power=2))
    assert model.patch_embed_4.pos.gate.shape == (32, 1, 1)
    model.init_weights()
    assert (model.stem.pos.gate == 7).all()
    context = ResT(TINY, pos_cfg=dict(type='ContextBlock', ratio=0.5))
    # as ContextBlock draws it: the last convolution starts at zero, the block as x
    context.init_weights()
    assert not context.stem.pos.channel_add_conv[-1].weight.any()
    x = image((1, 8, 5, 5))
    assert torch.equal(context.stem.pos(x), x)

    with MODELS.switch_scope_and_registry('mmengine') as models:
        models.register_module('VariantsTestGate', module=Gate)
    assert isinstance(ResT(TINY, pos_cfg='VariantsTestGate').stem.pos, Gate)


def test_position_of_another_package():
    pytest.importorskip('mmdet.models', reason='needs mmdet')
    cfg = dict(type='mmdet.DropBlock', drop_prob=0.1, block_size=3)
    model = ResT(TINY, pos_cfg=cfg).eval()
    assert type(model.stem.pos).__module__.startswith('mmdet.')
    assert len(model(image((1, 3, 33, 65)))) == 4


def test_attention_and_stem_of_ones_own():
    @MODELS.register_module()
    class VariantsTestMean(nn.Module):
        def __init__(self, dim, num_heads, **kwargs):
            super().__init__()
            self.v = nn.Linear(dim, dim)

        def forward(self, x, size):
            return self.v(x).mean(1, keepdim=True).expand_as(x)

    model = ResT(TINY, attn_cfg='VariantsTestMean')
    assert isinstance(model.stage4[0].attn, VariantsTestMean)
    assert len(model(image((2, 3, 40, 40)))) == 4


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(stem_cfg='swin'), "stem_cfg.*'rest', 'resnet', 'patch'.*found 'swin'"),
        (dict(pos_cfg='sine'), "pos_cfg.*'pa', 'gl', 'le', 'none'.*MODELS.*'sine'"),
        (
            dict(attn_cfg=dict(type='linear')),
            "attn_cfg.*'emsa_without_both', 'msa', 'emsa_without_norm', 'emsa'.*linear",
        ),
        (dict(stem_cfg=None), "stem_cfg.*'patch', or a dict.*'type'.*found None"),
        (dict(attn_cfg=dict(reduction='avg')), "dict with such a 'type'.*reduction"),
        (
            dict(attn_cfg=dict(type='emsa', reduction='min')),
            "reduction.*'conv', 'avg', 'max'.*'min'",
        ),
        (dict(attn_cfg=dict(type='emsa', heads=3)), "attn_cfg: 'emsa'.*heads"),
        (dict(stem_cfg=dict(type='rest', kernel=3)), "stem_cfg: 'rest'.*kernel"),
        (dict(pos_cfg='ContextBlock'), "pos_cfg: 'ContextBlock'.*ratio"),
        (dict(pos_cfg=dict(type='le', image_size=0)), 'image_size.*found 0'),
        (dict(attn_cfg='emsa_without_norm', attn_impl='tiled'), 'no tiled'),
    ],
)
def test_bad_variants(options, message):
    with pytest.raises(ValueError, match=message):
        ResT(TINY, **options)


def test_registries_of_the_first_releases():
    with pytest.warns(DeprecationWarning, match="'mine' or as 'rest_pos_mine'"):
        registry = models.POSITIONS

    @registry.register_module('variants_test_twice', force=True)
    class Twice(nn.Module):
        def __init__(self, dim):
            super().__init__()

        def forward(self, x):
            return 2 * x

    assert isinstance(ResT(TINY, pos_cfg='variants_test_twice').stem.pos, Twice)
