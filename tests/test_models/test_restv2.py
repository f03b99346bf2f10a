"""What ResTV2 has of its own: the upsampled values, its layers and their depths."""

import pytest
import rest_variants
import torch
from torch import nn
from weights_rule import fill, image

from mmrest import ResTV2
from mmrest.models.restv2 import PixelShuffle
from mmrest.optim.layer_decay import LayerDecayOptimWrapperConstructor
from mmrest.strategies.fsdp import rest_block_wrap_policy

TINY = dict(rest_variants.TINY, depths=[1, 2, 1, 1])


def tiny(**options):
    model = ResTV2(TINY, **options)
    fill(model.state_dict())
    return model


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
        sum(out.float().sum() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


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
