"""What ResT promises: sizes, names, freezing, checkpointing, errors."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from torch import nn
from weights_rule import fill, image

from mmrest import ResT

TINY = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    depths=[1, 2, 1, 1],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratios=2,
)
ARCHS = ('lite', 'small', 'base', 'large')
PARAMETERS = dict(lite=9996196, small=13167604, base=29559396, large=50908500)


def tiny(**options):
    model = ResT(TINY, **options)
    fill(model.state_dict())
    return model


def frozen_names(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize('arch', ARCHS)
def test_names_shapes_and_counts_are_the_published_ones(arch, published_shapes):
    model = ResT(arch)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = dict(published_shapes[f'rest_{arch}'])
    del expected['head.weight'], expected['head.bias']
    new = {key for key in found if key.startswith(('norm1.', 'norm2.', 'norm3.'))}
    assert len(new) == 6
    assert {key: found[key] for key in found if key not in new} == expected


@pytest.mark.parametrize('scope', [None, 'mmdet', 'mmseg', 'mmpretrain'])
def test_builds_from_every_scope(scope):
    registry = MODELS
    if scope is not None:
        module = pytest.importorskip(f'{scope}.registry', reason=f'needs {scope}')
        registry = module.MODELS
    model = registry.build(dict(type='ResT', arch='lite', out_indices=[1, 3]))
    assert type(model) is ResT


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150))
def test_any_size_in_evaluation(height, width):
    model = tiny().eval()
    with torch.no_grad():
        outs = model(image((1, 3, height, width)))
    for i, (out, dim) in enumerate(zip(outs, TINY['embed_dims'])):
        stride = 4 * 2**i
        size = (math.ceil(height / stride), math.ceil(width / stride))
        assert out.shape == (1, dim, *size)
        assert out.isfinite().all()


@pytest.mark.parametrize('size', [(1, 1), (1, 40), (31, 33), (32, 32), (65, 7)])
@pytest.mark.parametrize('attn_impl', ['dense', 'tiled'])
def test_any_size_in_training(size, attn_impl):
    model = tiny(attn_impl=attn_impl).train()
    x = image((2, 3, *size)).requires_grad_()
    sum(out.sum() for out in model(x)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_empty_batch():
    outs = tiny().eval()(torch.zeros(0, 3, 64, 64))
    assert [tuple(out.shape) for out in outs] == [
        (0, 8, 16, 16), (0, 16, 8, 8), (0, 24, 4, 4), (0, 32, 2, 2)
    ]  # fmt: skip


def test_no_bias_and_other_channels():
    model = ResT(TINY, in_channels=5, qkv_bias=False)
    names = dict(model.named_parameters())
    assert not any(name.endswith(('q.bias', 'kv.bias')) for name in names)
    assert len(model(torch.rand(2, 5, 40, 40))) == 4


@pytest.mark.parametrize('out_indices', [(0,), (1,), (3,), (0, 2), (1, 2, 3)])
def test_only_what_the_outputs_need_is_built(out_indices):
    model = tiny(out_indices=out_indices)
    outs = model(image((2, 3, 64, 64)))
    assert [out.shape[1] for out in outs] == [
        TINY['embed_dims'][i] for i in out_indices
    ]
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_chain_passes_the_normalised_map_on_and_branch_does_not():
    x = image((1, 3, 64, 64))
    plain = tiny(out_indices=(3,)).eval()(x)[0]
    branch = tiny(out_norm='branch').eval()(x)[3]
    chain = tiny(out_norm='chain').eval()(x)[3]
    torch.testing.assert_close(branch, plain)
    assert not torch.allclose(chain, plain, atol=1e-2)


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    model = tiny(frozen_stages=frozen_stages)
    prefixes = ['stem.'] if frozen_stages >= 0 else []
    for k in range(1, frozen_stages + 1):
        prefixes += [f'stage{k}.', f'patch_embed_{k}.']
    expected = {
        name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))
    }
    assert frozen_names(model) == expected
    # in __init__ as in train(), and after a change of mode
    for mode in (True, False, True):
        assert model.train(mode) is model
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                frozen = f'{name}.'.startswith(tuple(prefixes)) if prefixes else False
                assert module.training == (mode and not frozen), name
    before = copy.deepcopy(model.state_dict())
    sum(out.square().sum() for out in model(image((2, 3, 64, 64)))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in expected), name
    for name, tensor in model.state_dict().items():
        if prefixes and name.startswith(tuple(prefixes)):
            assert torch.equal(tensor, before[name]), name


def test_norm_eval():
    model = tiny(norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 5
    assert not any(norm.training for norm in norms)
    assert model.stage1.training


@pytest.mark.parametrize('frozen_stages', [-1, 1])
@pytest.mark.parametrize('rates', [{}, dict(drop_path_rate=0.3, drop_rate=0.1)])
def test_checkpointing_changes_nothing(frozen_stages, rates):
    x = image((2, 3, 50, 64))
    results = []
    for with_cp in (False, True):
        model = tiny(with_cp=with_cp, frozen_stages=frozen_stages, **rates).train()
        torch.manual_seed(0)
        outs = model(x)
        sum((out * image(out.shape, 9)).sum() for out in outs).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        # buffers: a batch counts once in the running statistics of the norms
        results.append([*outs, *grads, *model.buffers()])
    assert len(results[0]) == len(results[1])
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize('attn_impl', ['dense', 'tiled'])
def test_drop_rates_act_in_training_only(attn_impl):
    model = tiny(
        drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2, attn_impl=attn_impl
    )
    x = image((2, 3, 64, 64))
    assert torch.equal(model.eval()(x)[3], tiny(attn_impl=attn_impl).eval()(x)[3])
    model.train()
    assert not torch.equal(model(x)[3], model(x)[3])


def test_drop_path_rises_linearly():
    model = ResT('small', drop_path_rate=0.1)
    rates = [
        getattr(block.drop_path, 'drop_prob', 0.0)
        for i in range(1, 5)
        for block in getattr(model, f'stage{i}')
    ]
    assert rates == pytest.approx([0.1 * j / 11 for j in range(12)])


def test_drawn_weights():
    torch.manual_seed(0)
    model = ResT('lite')
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert 0.015 < float(module.weight.std()) < 0.025
            assert not module.bias.any()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all() and not module.bias.any()


@pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last]
)
def test_memory_format_of_the_image_does_not_matter(memory_format):
    model, x = tiny().eval(), image((2, 3, 40, 56))
    for found, expected in zip(model(x.to(memory_format=memory_format)), model(x)):
        assert torch.equal(found, expected)
        # mmcv's RoIAlign on a CPU reads maps of any other format wrongly
        assert found.is_contiguous()


def test_conv_and_batch_norm_fuse():
    from mmcv.cnn.utils import fuse_conv_bn

    model, x = tiny().eval(), image((1, 3, 64, 64))
    with torch.no_grad():
        expected = model(x)
        fused = fuse_conv_bn(copy.deepcopy(model))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        for found, wanted in zip(fused(x), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(arch='huge'),
            "one of 'lite', 'small', 'base', 'large' or a dict.*'huge'",
        ),
        (dict(arch=3), 'a name or a dict, found 3'),
        (dict(arch={**TINY, 'depth': 3}), 'unknown: depth'),
        (
            dict(arch={k: TINY[k] for k in ('depths', 'num_heads')}),
            'embed_dims, sr_rat',
        ),
        (
            dict(arch={**TINY, 'depths': [1, 2, 3]}),
            r"'depths'.*4 positive.*\[1, 2, 3\]",
        ),
        (dict(arch={**TINY, 'depths': [1, 2, 3, 0]}), "'depths'"),
        (dict(arch={**TINY, 'depths': [1, 2, 3, 1.5]}), "'depths'"),
        (dict(arch={**TINY, 'mlp_ratios': [4, 4, 4, -4]}), "'mlp_ratios'.*numbers"),
        (dict(arch={**TINY, 'num_heads': [1, 2, 5, 4]}), 'stage 3.*24.*heads 5'),
        (dict(arch={**TINY, 'embed_dims': [7, 16, 24, 32]}), 'must be even'),
        (dict(arch={**TINY, 'sr_ratios': [8, 3, 2, 1]}), 'stage 2.*1 or even.*3'),
        (dict(out_indices=()), r'out_indices.*found \(\)'),
        (dict(out_indices=(0, 4)), r'out_indices.*found \(0, 4\)'),
        (dict(out_indices=(-1,)), 'out_indices'),
        (dict(out_indices=(2, 1)), 'ascending'),
        (dict(out_indices=(1, 1)), 'ascending'),
        (dict(out_indices=3), 'out_indices.*found 3'),
        (dict(frozen_stages=5), 'frozen_stages.*found 5'),
        (dict(frozen_stages=-2), 'frozen_stages.*found -2'),
        (dict(frozen_stages=None), 'frozen_stages.*found None'),
        (dict(norm_cfg=None), r"norm_cfg must be a dict with a 'type'.*found None"),
        (dict(pretrained=3), 'pretrained must be the path.*found 3'),
        (dict(pretrained='a.pth', init_cfg=dict(type='x')), 'both given'),
        (dict(out_norm='both'), "'chain' or 'branch', found 'both'"),
        (dict(attn_impl='flash'), "attn_impl must be one of.*'flash'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ResT(**options)


@pytest.mark.parametrize('shape', [(3, 64, 64), (1, 4, 64, 64), (64,)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\), found \('):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    'wrapper, prefix, listed',
    [
        (None, '', False),
        ('model', 'module.', True),
        ('state_dict', 'backbone.', False),
        ('state_dict_ema', 'backbone.bottom_up.', True),
    ],
)
def test_init_cfg_reads_published_forms(tmp_path, wrapper, prefix, listed):
    source = tiny(out_indices=(3,)).state_dict()
    tensors = {f'{prefix}{key}': tensor for key, tensor in source.items()}
    tensors[f'{prefix}head.weight'] = torch.zeros(10, 32)
    path = tmp_path / 'rest.pth'
    torch.save(tensors if wrapper is None else {wrapper: tensors}, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = ResT(TINY, init_cfg=[init_cfg] if listed else init_cfg)
    model.init_weights()
    found = model.state_dict()
    assert all(torch.equal(found[key], source[key]) for key in source)


def test_init_cfg_refuses_another_arch(tmp_path):
    path = tmp_path / 'rest.pth'
    torch.save(ResT({**TINY, 'depths': [1, 1, 1, 1]}).state_dict(), path)
    model = ResT(TINY, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.raises(ValueError, match=r'stage2\.1'):
        model.init_weights()


def test_pretrained_is_an_init_cfg(tmp_path):
    """mmseg hands its own ``pretrained`` on to the backbone."""
    path = str(tmp_path / 'rest.pth')
    source = tiny(out_indices=(3,)).state_dict()
    torch.save(source, path)
    with pytest.warns(DeprecationWarning, match='init_cfg=dict'):
        model = ResT(TINY, pretrained=path)
    model.init_weights()
    assert torch.equal(model.stem.conv1.weight, source['stem.conv1.weight'])


@pytest.mark.parametrize('norm', ['train', 'norm_eval', 'eval', 'frozen'])
@pytest.mark.parametrize('attn_impl', ['dense', 'auto'])
@pytest.mark.parametrize('size', [(64, 96), (45, 83)])
def test_gradients_of_one_image(size, attn_impl, norm):
    """Against finite differences: PyTorch 2.13 computes BatchNorm's wrongly on CPUs.

    It does for one image where the gradient comes in a layout in which the image's
    stride is not H * W * C.
    """
    model = tiny(
        attn_impl=attn_impl,
        out_indices=(0, 1),
        norm_eval=norm == 'norm_eval',
        frozen_stages=0 if norm == 'frozen' else -1,
    )
    model = model.double().train(norm != 'eval')
    x = image((1, 3, *size)).double().requires_grad_()
    weights = [image(out.shape, 9).double() for out in model(x)]

    def loss(x):
        return sum((out * w).sum() for out, w in zip(model(x), weights))

    direction = image(x.shape, 5).double()
    leaves = [x, model.patch_embed_2.conv.weight]
    grad_x, grad_weight = torch.autograd.grad(loss(x), leaves)
    step = 1e-5
    with torch.no_grad():
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        found = (grad_x * direction).sum()
        assert abs(found - slope) <= 1e-5 * max(abs(slope), 1.0)
        weight, direction = leaves[1], image(grad_weight.shape, 6).double()
        losses = []
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * step)
            losses.append(loss(x))
            weight.sub_(direction, alpha=sign * step)
        slope = (losses[0] - losses[1]) / (2 * step)
        found = (grad_weight * direction).sum()
        assert abs(found - slope) <= 1e-5 * max(abs(slope), 1.0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('attn_impl', ['auto', 'dense'])
@pytest.mark.parametrize('memory_format', ['contiguous_format', 'channels_last'])
def test_gradients_have_the_strides_of_their_parameters(
    attn_impl, dtype, memory_format
):
    """DistributedDataParallel copies others, and warns of it."""
    model = tiny(attn_impl=attn_impl).to(dtype)
    model.to(memory_format=getattr(torch, memory_format))
    sum(out.sum() for out in model(image((2, 3, 64, 64)).to(dtype))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_meta_device():
    with torch.device('meta'):
        model = ResT(TINY)
    outs = model(torch.empty(1, 3, 50, 64, device='meta'))
    assert [tuple(out.shape) for out in outs] == [
        (1, 8, 13, 16), (1, 16, 7, 8), (1, 24, 4, 4), (1, 32, 2, 2)
    ]  # fmt: skip


def test_cam_tools_find_no_extra_tokens():
    assert ResT.num_extra_tokens == 0
