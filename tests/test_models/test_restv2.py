"""What ResTV2 promises: sizes, names, freezing, modes, errors."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from torch import nn
from weights_rule import fill, image

from mmrest import ResTV2
from mmrest.models.restv2 import PixelShuffle
from mmrest.optim.layer_decay import LayerDecayOptimWrapperConstructor
from mmrest.strategies.fsdp import rest_block_wrap_policy

TINY = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    depths=[1, 2, 1, 1],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratios=2,
)
SIZES = [(2, 3, 40, 64), (2, 3, 64, 40), (3, 3, 45, 83)]
PARAMETERS = dict(tiny=29667120, small=40438320, base=55197552, large=85509312)
OUT_NORMS = ('norm_1.', 'norm_2.', 'norm_3.', 'norm_4.')


def tiny(**options):
    model = ResTV2(TINY, **options)
    fill(model.state_dict())
    return model


def backward(outs):
    sum((out.float() * image(out.shape, 9)).sum() for out in outs).backward()


@pytest.mark.parametrize('arch', PARAMETERS)
def test_names_shapes_and_counts_are_the_published_ones(arch, published_shapes):
    with torch.device('meta'):
        model = ResTV2(arch)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = dict(published_shapes[f'restv2_{arch}'])
    for key in ('head.weight', 'head.bias', 'norm.weight', 'norm.bias'):
        del expected[key]
    new = {key for key in found if key.startswith(OUT_NORMS)}
    assert len(new) == 8
    assert {key: found[key] for key in found if key not in new} == expected


@pytest.mark.parametrize('scope', [None, 'mmdet', 'mmseg', 'mmpretrain'])
def test_builds_from_every_scope(scope):
    registry = MODELS
    if scope is not None:
        module = pytest.importorskip(f'{scope}.registry', reason=f'needs {scope}')
        registry = module.MODELS
    assert type(registry.build(dict(type='ResTV2', arch=TINY))) is ResTV2


@settings(max_examples=30, deadline=None)
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
@pytest.mark.parametrize('attn_impl', ['auto', 'tiled', 'dense'])
def test_any_size_in_training(size, attn_impl):
    model = tiny(attn_impl=attn_impl).train()
    backward(model(image((2, 3, *size)).requires_grad_()))
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_empty_batch():
    outs = tiny().eval()(torch.zeros(0, 3, 64, 64))
    assert [tuple(out.shape) for out in outs] == [
        (0, 8, 16, 16), (0, 16, 8, 8), (0, 24, 4, 4), (0, 32, 2, 2)
    ]  # fmt: skip


@pytest.mark.parametrize('size', [(64, 96), (45, 83)])
def test_fused_attention_is_the_dense_one(size):
    results = []
    for attn_impl in ('dense', 'auto'):
        model = tiny(attn_impl=attn_impl).double().eval()
        x = image((1, 3, *size)).double().requires_grad_()
        outs = model(x)
        sum((out * image(out.shape, 9)).sum() for out in outs).backward()
        results.append([*outs, x.grad])
    for dense, fused in zip(*results):
        scale = float(dense.detach().abs().max())
        assert float((dense - fused).detach().abs().max()) < 1e-10 * scale


@pytest.mark.parametrize('ratio', [2, 4])
def test_values_are_upsampled_by_pixel_shuffle_and_cropped(ratio):
    """In the published order of channels, before what lies beyond the map is cut."""
    attn = tiny().stage2[0].attn if ratio == 4 else tiny().stage3[0].attn
    attn.up_norm = nn.Identity()
    dim, (rows, columns) = attn.q.in_features, (3, 5)
    v = image((2, rows * columns, dim))
    grid = v.transpose(1, 2).reshape(2, dim, rows, columns)
    whole = nn.functional.pixel_shuffle(attn.up[0](grid), ratio)
    size = (rows * ratio - 1, columns * ratio - (ratio - 1))
    expected = whole[..., : size[0], : size[1]].flatten(2).transpose(1, 2)
    torch.testing.assert_close(attn.upsample(v, (rows, columns), size), expected)


@pytest.mark.parametrize('ratio', [1, 2, 4])
@pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last]
)
def test_pixel_shuffle_of_other_devices(ratio, memory_format):
    x = image((2, 3 * ratio**2, 4, 5)).to(memory_format=memory_format)
    found = PixelShuffle(ratio).copy_once(x)
    assert torch.equal(found, nn.functional.pixel_shuffle(x, ratio))
    if ratio > 1:  # else it is x itself
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('mode', [dict(), dict(norm_eval=True), dict(with_cp=True)])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('norm', ['BN', 'GN', 'SyncBN'])
def test_gradients_of_one_image(norm, training, mode):
    """PyTorch 2.13 has a fault in BatchNorm's backward pass of a single image."""
    if norm == 'SyncBN' and training and not mode.get('norm_eval'):
        pytest.skip('takes a GPU')
    norm_cfg = dict(type=norm, **(dict(num_groups=2) if norm == 'GN' else {}))
    model = tiny(norm_cfg=norm_cfg, **mode).double().train(training)
    x = image((1, 3, 37, 50)).double().requires_grad_()
    weights = [image(out.shape, i).double() for i, out in enumerate(model(x))]

    def loss(x):
        return sum((out * w).sum() for out, w in zip(model(x), weights))

    loss(x).backward()
    step = 1e-6 * image(x.shape, 7).double()
    with torch.no_grad():
        slope = (loss(x + step) - loss(x - step)) / 2
        expected = (x.grad * step).sum()
    assert float(abs(slope - expected)) <= 1e-5 * float(abs(slope)) + 1e-12

    weight = model.stem.proj[0].weight
    step = 1e-6 * image(weight.shape, 8).double()
    with torch.no_grad():
        expected = (weight.grad * step).sum()
        weight += step
        above = loss(x)
        weight -= 2 * step
        slope = (above - loss(x)) / 2
    assert float(abs(slope - expected)) <= 1e-5 * float(abs(slope)) + 1e-12


@pytest.mark.parametrize('out_norm', ['branch', 'final'])
@pytest.mark.parametrize('out_indices', [(0,), (3,), (0, 2), (1, 2, 3)])
def test_only_what_the_outputs_need_is_built(out_indices, out_norm):
    model = tiny(out_indices=out_indices, out_norm=out_norm)
    names = {f'norm_{i + 1}' for i in out_indices}
    if out_norm == 'final' and 3 in out_indices:
        names = names - {'norm_4'} | {'norm'}
    children = {name for name, _ in model.named_children()}
    assert {name for name in children if name.startswith('norm')} == names
    outs = model(image((2, 3, 64, 64)))
    assert [out.shape[1] for out in outs] == [
        TINY['embed_dims'][i] for i in out_indices
    ]
    backward(outs)
    assert all(p.grad is not None for p in model.parameters())


def test_output_norms_are_a_branch():
    x = image((1, 3, 64, 64))
    torch.testing.assert_close(tiny(out_indices=(3,)).eval()(x)[0], tiny().eval()(x)[3])


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    model = tiny(frozen_stages=frozen_stages)
    prefixes = ('stem.',) if frozen_stages >= 0 else ()
    for k in range(1, frozen_stages + 1):
        prefixes += (f'stage{k}.', f'patch_{k}.')
    names = {name for name, _ in model.named_parameters()}
    frozen = {name for name in names if name.startswith(prefixes)}
    for mode in (True, False, True):
        assert model.train(mode) is model
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.training == (mode and frozen_stages < 0)
    before = copy.deepcopy(model.state_dict())
    backward(model(image((2, 3, 64, 64))))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    for name, tensor in model.state_dict().items():
        if name.startswith(prefixes):
            assert torch.equal(tensor, before[name]), name


def test_norm_eval():
    model = tiny(norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2 and not any(norm.training for norm in norms)
    assert model.stage1.training


@pytest.mark.parametrize('frozen_stages', [-1, 1])
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.3])
def test_checkpointing_changes_nothing(frozen_stages, drop_path_rate):
    results = []
    for with_cp in (False, True):
        model = tiny(
            with_cp=with_cp,
            frozen_stages=frozen_stages,
            drop_path_rate=drop_path_rate,
        ).train()
        torch.manual_seed(0)
        outs = model(image((2, 3, 50, 64)))
        backward(outs)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        # buffers: a batch counts once in the running statistics of the norms
        results.append([*outs, *grads, *model.buffers()])
    assert len(results[0]) == len(results[1])
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


def test_no_attention_map_is_stored():
    """The largest tensor kept for the backward pass is the hidden layer's input."""
    model, sizes = tiny().train(), []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    size = (256, 256)  # stage 1: 4096 queries, 64 keys
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outs = model(image((1, 3, *size)))
    assert outs[0].requires_grad
    assert max(sizes) < 4096 * 64


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('attn_impl', ['auto', 'dense'])
def test_mixed_precision(attn_impl, dtype):
    model = tiny(attn_impl=attn_impl).train()
    with torch.autocast('cpu', dtype=dtype):
        outs = model(image((2, 3, 40, 64)))
        backward(outs)
    assert all(out.isfinite().all() for out in outs)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True])
def test_compiles_without_a_break(training):
    torch._dynamo.reset()
    model = tiny().train(training)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = image((2, 3, 45, 64))
    for found, expected in zip(compiled(x), reference(x)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.export.Dim, 'AUTO'), reason='torch before 2.6')
def test_torch_export_with_dynamic_sizes():
    """Of maps that the reductions divide, and of others."""
    dynamic = torch.export.Dim.AUTO
    model = tiny().eval()
    program = torch.export.export(
        model,
        (image(SIZES[0]),),
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
    )
    for size in SIZES:
        for found, expected in zip(program.module()(image(size)), model(image(size))):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_torchscript_at_several_sizes():
    model = tiny().eval()
    traced = torch.jit.trace(model, image(SIZES[0]))
    for size in SIZES:
        for found, expected in zip(traced(image(size)), model(image(size))):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_legacy_onnx_keeps_sizes_dynamic(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs onnxruntime')
    model, path = tiny().eval(), str(tmp_path / 'rest.onnx')
    torch.onnx.export(
        model,
        (image(SIZES[0]),),
        path,
        dynamo=False,
        opset_version=17,
        input_names=['image'],
        output_names=list('abcd'),
        dynamic_axes={name: {0: 'n', 2: 'h', 3: 'w'} for name in ('image', *'abcd')},
    )
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for size in SIZES:
        found = session.run(None, {'image': image(size).numpy()})
        for out, expected in zip(found, model(image(size))):
            assert out.shape == expected.shape
            error = (torch.as_tensor(out) - expected).abs().max()
            assert error < 1e-3 * expected.abs().max()


@pytest.mark.slow
def test_inductor_at_several_sizes():
    torch._dynamo.reset()
    model = tiny(out_indices=(0, 1)).eval()
    reference = copy.deepcopy(model)
    model.compile()
    with torch.no_grad():
        for size in SIZES:
            x = image(size)
            for found, expected in zip(model(x), reference(x)):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last]
)
def test_memory_format_of_the_image_does_not_matter(memory_format):
    model, x = tiny().eval(), image((2, 3, 40, 56))
    for found, expected in zip(model(x.to(memory_format=memory_format)), model(x)):
        assert torch.equal(found, expected)
        assert found.is_contiguous()


def test_layers_are_called():
    """A hook on any layer with parameters sees a call."""
    model, seen = tiny().eval(), set()
    layers = {n: m for n, m in model.named_modules() if not list(m.children())}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(image((1, 3, 64, 64)))
    assert seen == set(layers)


def test_layer_depths_and_units():
    model = ResTV2(TINY)
    assert model.get_layer_depth('stem.proj.0.weight') == (0, 7)
    assert model.get_layer_depth('backbone.patch_2.norm.bias', 'backbone.') == (1, 7)
    assert model.get_layer_depth('stage2.1.attn.up.0.weight') == (3, 7)
    assert model.get_layer_depth('norm_1.weight') == (6, 7)
    units = [m for m in model.modules() if rest_block_wrap_policy(m, False, 0)]
    assert len(units) == sum(TINY['depths'])
    wrapper = LayerDecayOptimWrapperConstructor(
        dict(optimizer=dict(type='AdamW', lr=1.0)), dict(layer_decay_rate=0.5)
    )(model)
    rates = {g['param_name']: g['lr'] for g in wrapper.optimizer.param_groups}
    assert rates['stem.proj.0.weight'] == 0.5**6
    assert rates['norm_4.weight'] == 1.0
    with pytest.raises(ValueError, match="decay_type .* 'stage_wise', found 'depth'"):
        LayerDecayOptimWrapperConstructor(
            dict(optimizer=dict(type='AdamW', lr=1.0)),
            dict(layer_decay_rate=0.5, decay_type='depth'),
        )


def test_drop_path_rises_linearly():
    with torch.device('meta'):
        model = ResTV2('tiny', drop_path_rate=0.1)
    rates = [
        getattr(block.drop_path, 'drop_prob', 0.0)
        for i in range(4)
        for block in model.stage(i)
    ]
    assert rates == pytest.approx([0.1 * j / 10 for j in range(11)])


def test_drawn_weights():
    model = ResTV2({**TINY, 'embed_dims': [64, 64, 48, 64]})
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert 0.015 < float(module.weight.detach().std()) < 0.025
            assert not module.bias.any()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all() and not module.bias.any()
            if isinstance(module, nn.LayerNorm):
                assert module.eps == 1e-6


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(arch='lite'),
            "one of 'tiny', 'small', 'base', 'large' or a dict.*'lite'",
        ),
        (dict(arch={**TINY, 'depth': 3}), 'unknown: depth'),
        (dict(arch={**TINY, 'num_heads': [1, 2, 5, 4]}), 'stage 3.*24.*heads 5'),
        (dict(arch={**TINY, 'sr_ratios': [8, 3, 2, 1]}), 'stage 2.*1 or even.*3'),
        (dict(out_indices=(0, 4)), r'out_indices.*found \(0, 4\)'),
        (dict(frozen_stages=5), 'frozen_stages.*found 5'),
        (dict(norm_cfg=dict(eps=1)), 'norm_cfg'),
        (dict(out_norm='chain'), "'branch' or 'final', found 'chain'"),
        (dict(attn_impl='flash'), "attn_impl must be one of.*'flash'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ResTV2(**options)


@pytest.mark.parametrize('shape', [(3, 64, 64), (1, 4, 64, 64), (64,)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r'ResTV2 takes.*\(B, 3, H, W\), found \('):
        tiny()(torch.zeros(shape))
