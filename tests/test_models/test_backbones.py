"""What both generations promise: sizes, names, freezing, checkpointing, errors."""

import copy
import inspect
import math

import pytest
import rest_variants
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from torch import nn
from torch.autograd import forward_ad
from weights_rule import fill, image

from mmrest import ResT, ResTV2

TINY = dict(rest_variants.TINY, depths=[1, 2, 1, 1])
PARAMETERS = {
    ResT: dict(lite=9996196, small=13167604, base=29559396, large=50908500),
    ResTV2: dict(tiny=29667120, small=40438320, base=55197552, large=85509312),
}
ARCHS = [(kind, arch) for kind, counts in PARAMETERS.items() for arch in counts]
# of the outputs, which ImageNet files do not hold
NEW_NORMS = {ResT: ('norm1.', 'norm2.', 'norm3.'), ResTV2: ('norm_',)}
ENTRIES = {ResT: 'patch_embed_', ResTV2: 'patch_'}
BOTH = pytest.mark.parametrize('kind', PARAMETERS)


def tiny(kind, **options):
    model = kind(TINY, **options)
    fill(model.state_dict())
    return model


def backward(outs):
    sum((out.float() * image(out.shape, 9)).sum() for out in outs).backward()


@pytest.mark.parametrize('kind, arch', ARCHS)
def test_names_shapes_and_counts_are_the_published_ones(kind, arch, published_shapes):
    with torch.device('meta'):
        model = kind(arch)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[kind][arch]
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    new = {key for key in found if key.startswith(NEW_NORMS[kind])}
    assert len(new) == (6 if kind is ResT else 8)
    # of the classifier alone
    left_out = ('head.',) if kind is ResT else ('head.', 'norm.')
    published = published_shapes[f'{kind.__name__.lower()}_{arch}']
    expected = {k: v for k, v in published.items() if not k.startswith(left_out)}
    assert {key: found[key] for key in found if key not in new} == expected


@BOTH
@pytest.mark.parametrize('scope', [None, 'mmdet', 'mmseg', 'mmpretrain'])
def test_builds_from_every_scope(kind, scope):
    registry = MODELS
    if scope is not None:
        module = pytest.importorskip(f'{scope}.registry', reason=f'needs {scope}')
        registry = module.MODELS
    cfg = dict(type=kind.__name__, arch=TINY, out_indices=[1, 3])
    assert type(registry.build(cfg)) is kind


@BOTH
@settings(max_examples=15)
@given(height=st.integers(1, 150), width=st.integers(1, 150))
def test_any_size_in_evaluation(kind, height, width):
    model = tiny(kind).eval()
    with torch.no_grad():
        outs = model(image((1, 3, height, width)))
    for i, (out, dim) in enumerate(zip(outs, TINY['embed_dims'])):
        stride = 4 * 2**i
        size = (math.ceil(height / stride), math.ceil(width / stride))
        assert out.shape == (1, dim, *size)
        assert out.isfinite().all()


@BOTH
@pytest.mark.parametrize('size', [(1, 1), (1, 40), (31, 33), (32, 32), (65, 7)])
@pytest.mark.parametrize('attn_impl', ['auto', 'tiled', 'dense'])
def test_any_size_in_training(kind, size, attn_impl):
    model = tiny(kind, attn_impl=attn_impl).train()
    backward(model(image((2, 3, *size)).requires_grad_()))
    assert all(p.grad.isfinite().all() for p in model.parameters())


@BOTH
@pytest.mark.parametrize('device, batch', [('cpu', 0), ('meta', 1)])
def test_shapes_of_no_image_and_of_no_values(kind, device, batch):
    with torch.device(device):
        model = kind(TINY).eval()
    outs = model(torch.zeros(batch, 3, 50, 64, device=device))
    assert [tuple(out.shape[1:]) for out in outs] == [
        (8, 13, 16), (16, 7, 8), (24, 4, 4), (32, 2, 2)
    ]  # fmt: skip
    assert all(len(out) == batch for out in outs)


@BOTH
def test_ratio_of_each_mlp(kind):
    model = kind({**TINY, 'mlp_ratios': [4, 1.5, 0.3, 2]})
    widths = [model.stage(i)[0].mlp.fc1.out_features for i in range(4)]
    assert widths == [32, 24, 7, 64]


def test_no_bias_and_other_channels():
    model = ResT(TINY, in_channels=5, qkv_bias=False)
    names = dict(model.named_parameters())
    assert not any(name.endswith(('q.bias', 'kv.bias')) for name in names)
    assert len(model(torch.rand(2, 5, 40, 40))) == 4


@pytest.mark.parametrize(
    'kind, options', [(ResT, {}), (ResTV2, {}), (ResTV2, dict(out_norm='final'))]
)
@pytest.mark.parametrize('out_indices', [(0,), (1,), (3,), (0, 2), (1, 2, 3)])
def test_only_what_the_outputs_need_is_built(kind, options, out_indices):
    model = tiny(kind, out_indices=out_indices, **options)
    start = 'norm' if kind is ResT else 'norm_'
    norms = {f'{start}{i + 1}' for i in out_indices}
    if 3 in out_indices and (kind is ResT or options):  # the classifier's
        norms = norms - {f'{start}4'} | {'norm'}
    names = {name for name, _ in model.named_children()}
    assert {name for name in names if name.startswith('norm')} == norms
    outs = model(image((2, 3, 64, 64)))
    dims = [TINY['embed_dims'][i] for i in out_indices]
    assert [out.shape[1] for out in outs] == dims
    backward(outs)
    assert all(p.grad is not None for p in model.parameters())


@BOTH
def test_branch_passes_the_plain_map_on_and_chain_does_not(kind):
    x = image((1, 3, 64, 64))
    plain = tiny(kind, out_indices=(3,)).eval()(x)[0]
    torch.testing.assert_close(tiny(kind, out_norm='branch').eval()(x)[3], plain)
    if kind is ResT:
        chain = tiny(kind, out_norm='chain').eval()(x)[3]
        assert not torch.allclose(chain, plain, atol=1e-2)


@BOTH
@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(kind, frozen_stages):
    model = tiny(kind, frozen_stages=frozen_stages)
    prefixes = ('stem.',) if frozen_stages >= 0 else ()
    for k in range(1, frozen_stages + 1):
        prefixes += (f'stage{k}.', f'{ENTRIES[kind]}{k}.')
    parameters = dict(model.named_parameters())
    frozen = {name for name in parameters if name.startswith(prefixes)}
    assert {n for n, p in parameters.items() if not p.requires_grad} == frozen
    # in __init__ as in train(), and after a change of mode
    for mode in (True, False, True):
        assert model.train(mode) is model
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                live = mode and not f'{name}.'.startswith(prefixes)
                assert module.training == live, name
    before = copy.deepcopy(model.state_dict())
    backward(model(image((2, 3, 64, 64))))
    for name, parameter in parameters.items():
        assert (parameter.grad is None) == (name in frozen), name
    for name, tensor in model.state_dict().items():
        if name.startswith(prefixes):
            assert torch.equal(tensor, before[name]), name


@BOTH
def test_more_frozen_stages_than_are_built(kind):
    model = tiny(kind, out_indices=(0,), frozen_stages=4).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    norm = model.out_norm_names[0]
    assert trained == {f'{norm}.weight', f'{norm}.bias'}


@pytest.mark.parametrize('kind, count', [(ResT, 5), (ResTV2, 2)])
def test_norm_eval(kind, count):
    model = tiny(kind, norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == count and not any(norm.training for norm in norms)
    assert model.stage1.training


@pytest.mark.parametrize('frozen_stages', [-1, 1])
@pytest.mark.parametrize(
    'kind, rates',
    [
        (ResT, {}),
        (ResT, dict(drop_path_rate=0.3, drop_rate=0.1)),
        (ResTV2, {}),
        (ResTV2, dict(drop_path_rate=0.3)),
    ],
)
def test_checkpointing_changes_nothing(kind, frozen_stages, rates):
    results = []
    for with_cp in (False, True):
        options = dict(with_cp=with_cp, frozen_stages=frozen_stages, **rates)
        model = tiny(kind, **options).train()
        torch.manual_seed(0)
        outs = model(image((2, 3, 50, 64)))
        backward(outs)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        # buffers: a batch counts once in the running statistics of the norms
        results.append([*outs, *grads, *model.buffers()])
    assert len(results[0]) == len(results[1])
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize('attn_impl', ['dense', 'tiled'])
def test_drop_rates_act_in_training_only(attn_impl):
    rates = dict(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2)
    model = tiny(ResT, attn_impl=attn_impl, **rates)
    x = image((2, 3, 64, 64))
    plain = tiny(ResT, attn_impl=attn_impl).eval()
    assert torch.equal(model.eval()(x)[3], plain(x)[3])
    model.train()
    assert not torch.equal(model(x)[3], model(x)[3])


def test_each_drop_rate_reaches_its_layers():
    for block in tiny(ResT, drop_rate=0.1, attn_drop_rate=0.2).stage2:
        assert block.attn.proj_drop.p == block.mlp.drop.p == 0.1
        assert block.attn.attn_drop == 0.2


@pytest.mark.parametrize('kind, arch', [(ResT, 'small'), (ResTV2, 'tiny')])
def test_drop_path_rises_linearly(kind, arch):
    with torch.device('meta'):
        model = kind(arch, drop_path_rate=0.1)
    rates = [
        getattr(block.drop_path, 'drop_prob', 0.0)
        for i in range(4)
        for block in model.stage(i)
    ]
    last = len(rates) - 1
    assert last == (11 if kind is ResT else 10)
    assert rates == pytest.approx([0.1 * j / last for j in range(last + 1)])


@BOTH
def test_drawn_weights(kind):
    model = kind({**TINY, 'embed_dims': [64, 64, 48, 64]})
    model.init_weights()
    for kind_of_layer in (nn.Linear, nn.Conv2d):
        layers = [m for m in model.modules() if isinstance(m, kind_of_layer)]
        weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
        assert 0.0195 < float(weights.std()) < 0.0205
        assert abs(float(weights.mean())) < 0.001
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert 0.015 < float(module.weight.detach().std()) < 0.025
            assert not module.bias.any()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all() and not module.bias.any()
            if isinstance(module, nn.LayerNorm):
                assert module.eps == (1e-5 if kind is ResT else 1e-6)


@BOTH
@pytest.mark.parametrize('option', ['affine', 'bias'])
def test_norms_without_parameters_are_drawn(kind, option):
    if option not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip(f'BatchNorm2d of torch {torch.__version__} has no {option}')
    model = tiny(kind, norm_cfg={'type': 'BN', option: False})
    model.init_weights()
    assert all(out.isfinite().all() for out in model(image((2, 3, 40, 56))))


@BOTH
@pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last]
)
def test_memory_format_of_the_image_does_not_matter(kind, memory_format):
    model, x = tiny(kind).eval(), image((2, 3, 40, 56))
    for found, expected in zip(model(x.to(memory_format=memory_format)), model(x)):
        assert torch.equal(found, expected)
        # mmcv's RoIAlign on a CPU reads maps of any other format wrongly
        assert found.is_contiguous()


@BOTH
@pytest.mark.parametrize(
    'dtype, training, expected',
    [
        (torch.float32, True, torch.float32),
        (torch.float32, False, torch.bfloat16),
        (torch.float64, True, torch.float64),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_reductions_are_trained_in_float32_under_autocast(
    kind, dtype, training, expected
):
    """oneDNN's gradients of strided depthwise convolutions are slow in bfloat16."""
    model, found = tiny(kind).to(dtype), set()
    for name, module in model.named_modules():
        if name.endswith('.sr'):
            module.register_forward_hook(lambda m, args, out: found.add(out.dtype))
    with torch.set_grad_enabled(training), torch.autocast('cpu', torch.bfloat16):
        outs = model(image((2, 3, 64, 64)).to(dtype))
    assert found == {expected}
    if training:
        backward(outs)
        assert all(p.grad.dtype == dtype for p in model.parameters())


def test_conv_and_batch_norm_fuse():
    from mmcv.cnn.utils import fuse_conv_bn

    model, x = tiny(ResT).eval(), image((1, 3, 64, 64))
    with torch.no_grad():
        expected = model(x)
        fused = fuse_conv_bn(copy.deepcopy(model))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        for found, wanted in zip(fused(x), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


# what the generations have in common is checked by the same functions
BAD_ARGUMENTS = [
    (dict(arch=3), 'a name or a dict, found 3'),
    (dict(arch={**TINY, 'depth': 3}), 'unknown: depth'),
    (dict(arch={k: TINY[k] for k in ('depths', 'num_heads')}), 'embed_dims, sr_rat'),
    (dict(arch={**TINY, 'depths': [1, 2, 3]}), r"'depths'.*4 positive.*\[1, 2, 3\]"),
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
    (dict(norm_cfg=dict(eps=1)), 'norm_cfg'),
    (dict(pretrained=3), 'pretrained must be the path.*found 3'),
    (dict(pretrained='a.pth', init_cfg=dict(type='x')), 'both given'),
    (dict(attn_impl='flash'), "attn_impl must be one of.*'flash'"),
]


@BOTH
@pytest.mark.parametrize('options, message', BAD_ARGUMENTS)
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    'kind, options, message',
    [
        (ResT, dict(arch='huge'), "'lite', 'small', 'base', 'large' or a d.*'huge'"),
        (ResTV2, dict(arch='lite'), "'tiny', 'small', 'base', 'large' or.*'lite'"),
        (ResT, dict(out_norm='both'), "'chain' or 'branch', found 'both'"),
        (ResTV2, dict(out_norm='chain'), "'branch' or 'final', found 'chain'"),
    ],
)
def test_names_of_the_generation(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@BOTH
@pytest.mark.parametrize('shape', [(3, 64, 64), (1, 4, 64, 64), (64,)])
def test_bad_images(kind, shape):
    message = rf'{kind.__name__} takes.*\(B, 3, H, W\), found \('
    with pytest.raises(ValueError, match=message):
        tiny(kind)(torch.zeros(shape))


@BOTH
def test_pretrained_is_an_init_cfg(kind, tmp_path):
    """mmseg hands its own ``pretrained`` on to the backbone."""
    path = str(tmp_path / 'rest.pth')
    source = tiny(kind).state_dict()
    torch.save(source, path)
    with pytest.warns(DeprecationWarning, match='init_cfg=dict'):
        model = kind(TINY, pretrained=path)
    model.init_weights()
    name = 'stage3.0.mlp.fc1.weight'
    assert torch.equal(model.state_dict()[name], source[name])


GN = dict(norm_cfg=dict(type='GN', num_groups=2))
SYNC = dict(norm_cfg=dict(type='SyncBN'))


@pytest.mark.parametrize(
    'kind, training, options',
    [
        *(
            (ResT, training, dict(attn_impl=attn_impl, **norm))
            for attn_impl in ('dense', 'auto')
            for training, norm in (
                (True, {}),
                (True, dict(norm_eval=True)),
                (True, dict(frozen_stages=0)),
                (False, {}),
            )
        ),
        *(
            (ResTV2, training, {**norm, **mode})
            for norm in ({}, GN, SYNC)
            for training in (False, True)
            for mode in ({}, dict(norm_eval=True), dict(with_cp=True))
            # training with SyncBN takes a GPU
            if norm is not SYNC or not training or 'norm_eval' in mode
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize('size', [(64, 96), (37, 50)])
def test_gradients_of_one_image(kind, training, options, size):
    """Against finite differences: PyTorch 2.13 computes BatchNorm's wrongly on CPUs.

    It does for one image where the gradient comes in a layout in which the image's
    stride is not H * W * C.
    """
    model = tiny(kind, out_indices=(0, 1), **options).double().train(training)
    x = image((1, 3, *size)).double().requires_grad_()
    entry = model.patch_embed_2.conv if kind is ResT else model.patch_2.proj
    weights = [image(out.shape, 9).double() for out in model(x)]

    def loss():
        return sum((out * w).sum() for out, w in zip(model(x), weights))

    leaves = [x, entry.weight]
    if options.get('frozen_stages', -1) < 0 and kind is ResTV2:
        leaves.append(model.stem.proj[0].weight)
    for leaf, grad in zip(leaves, torch.autograd.grad(loss(), leaves)):
        step = 1e-6 * image(leaf.shape, 5).double()
        with torch.no_grad():
            leaf += step
            above = loss()
            leaf -= 2 * step
            slope = (above - loss()) / 2
            leaf += step
            found = (grad * step).sum()
        assert abs(found - slope) <= 1e-5 * abs(slope) + 1e-11


@BOTH
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('attn_impl', ['auto', 'dense'])
@pytest.mark.parametrize('memory_format', ['contiguous_format', 'channels_last'])
def test_gradients_have_the_strides_of_their_parameters(
    kind, attn_impl, dtype, memory_format
):
    """DistributedDataParallel copies others, and warns of it."""
    model = tiny(kind, attn_impl=attn_impl).to(dtype)
    model.to(memory_format=getattr(torch, memory_format))
    assigned = copy.deepcopy(model)
    assigned.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for each in (model, copy.deepcopy(model), assigned.train()):
        sum(out.sum() for out in each(image((2, 3, 64, 64)).to(dtype))).backward()
        for name, parameter in each.named_parameters():
            assert parameter.grad.stride() == parameter.stride(), name


@BOTH
def test_transforms_of_torch_func(kind):
    """As those of mmdet's backbones: gradients of each image, derivatives forward."""
    model = tiny(kind, out_indices=(1, 3)).double().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, step = image((2, 3, 32, 48)).double(), image((2, 3, 32, 48), 5).double()

    def loss(parameters, x):
        outs = torch.func.functional_call(model, parameters, (x,))
        return sum((out * image(out.shape, 9)).sum() for out in outs)

    expected = [torch.func.grad(loss)(parameters, one[None]) for one in x]
    of_images = torch.func.vmap(
        torch.func.grad(lambda p, one: loss(p, one[None])), in_dims=(None, 0)
    )(parameters, x)
    for name, found in of_images.items():
        wanted = torch.stack([grads[name] for grads in expected])
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)

    one = x[:1].requires_grad_()
    (slope,) = torch.autograd.grad(loss(parameters, one), one)
    along = (slope * step[:1]).sum()
    _, found = torch.func.jvp(lambda x: loss(parameters, x), (x[:1],), (step[:1],))
    torch.testing.assert_close(found, along)
    with forward_ad.dual_level():
        dual = loss(parameters, forward_ad.make_dual(x[:1], step[:1]))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)

    rows = torch.func.jacrev(lambda x: model(x)[1].mean((2, 3)))(x[:1])
    columns = torch.func.jvp(lambda x: model(x)[1].mean((2, 3)), (x[:1],), (step[:1],))
    torch.testing.assert_close((rows * step[:1]).sum((2, 3, 4, 5)), columns[1])


@BOTH
def test_parameters_can_be_swapped(kind, monkeypatch):
    """As PyTorch does it on request, and for subclasses of tensors."""
    monkeypatch.setattr('torch.__future__._swap_module_params_on_conversion', True)
    model = tiny(kind).double()
    backward(model(image((2, 3, 64, 64)).double()))


@BOTH
def test_cam_tools_find_no_extra_tokens(kind):
    assert kind.num_extra_tokens == 0
