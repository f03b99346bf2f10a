"""A BatchNorm that is folded into its convolution, against the layers."""

import pytest
import torch
from torch import nn

from mmrest.ops import conv_norm


def make(dtype=torch.float64, norm=None, **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, **options)
    norm = nn.BatchNorm2d(8) if norm is None else norm
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    layers = nn.ModuleList([conv, norm]).to(dtype).eval()
    return torch.randn(2, 4, 9, 7, dtype=dtype), *layers


@pytest.fixture
def called(monkeypatch):
    """The layers that are called."""
    layers, call = [], nn.Module._call_impl

    def note(self, *args, **kwargs):
        layers.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, '_call_impl', note)
    return layers


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'bias': False},
        {'stride': 2, 'padding': 1},
        {'padding': 'same', 'dilation': (2, 1)},
        {'groups': 4},
    ],
    ids=str,
)
@pytest.mark.parametrize('order', [torch.contiguous_format, torch.channels_last])
def test_equals_the_layers(options, order, called):
    x, conv, norm = make(**options)
    x = x.contiguous(memory_format=order)
    with torch.no_grad():
        found = conv_norm(x, conv, norm)
        assert not called
        torch.testing.assert_close(found, norm(conv(x)))


def test_autocast_is_as_exact_as_the_layers():
    x, conv, norm = make(torch.float32)
    with torch.no_grad():
        exact = norm(conv(x))
        with torch.autocast('cpu', torch.bfloat16):
            found, usual = conv_norm(x, conv, norm), norm(conv(x))
    assert found.dtype == usual.dtype == torch.bfloat16
    bound = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (usual - exact).abs().max() + bound


def test_statistics_may_change_between_calls():
    x, conv, norm = make()
    with torch.no_grad():
        before = conv_norm(x, conv, norm)
        norm.running_mean.add_(1)
        conv.weight.mul_(2)
        found = conv_norm(x, conv, norm)
        torch.testing.assert_close(found, norm(conv(x)))
    assert not torch.allclose(found, before)


LAYERS_THAT_ARE_CALLED = {
    'statistics of the batch': make,
    'no weight': lambda: make(norm=nn.BatchNorm2d(8, affine=False)),
    'no statistics': lambda: make(norm=nn.BatchNorm2d(8, track_running_stats=False)),
    'another norm': lambda: make(norm=nn.GroupNorm(2, 8)),
    'a subclass': lambda: make(norm=type('Norm', (nn.BatchNorm2d,), {})(8)),
    'padding by reflection': lambda: make(padding=1, padding_mode='reflect'),
}


@pytest.mark.parametrize('case', LAYERS_THAT_ARE_CALLED)
def test_other_layers_are_called(case, called):
    x, conv, norm = LAYERS_THAT_ARE_CALLED[case]()
    if case == 'statistics of the batch':
        norm.train()
    with torch.no_grad():
        found = conv_norm(x, conv, norm)
        assert called == [conv, norm]
        torch.testing.assert_close(found, norm(conv(x)))


@pytest.mark.parametrize('hooked', [0, 1], ids=['convolution', 'norm'])
def test_hooks_act(hooked):
    x, *layers = make()
    with torch.no_grad():
        expected = (
            layers[1](2 * layers[0](x)) if hooked == 0 else 2 * conv_norm(x, *layers)
        )
        layers[hooked].register_forward_hook(lambda module, args, result: 2 * result)
        torch.testing.assert_close(conv_norm(x, *layers), expected)


def test_layers_are_called_for_gradients(called):
    x, conv, norm = make()
    conv_norm(x, conv, norm).sum().backward()
    assert called == [conv, norm]
    assert all(p.grad is not None for p in (*conv.parameters(), *norm.parameters()))


def test_types_that_differ_are_left_to_the_layers(called):
    x, conv, norm = make(torch.float32)
    conv.bfloat16()
    with torch.no_grad():
        found = conv_norm(x.bfloat16(), conv, norm)
    assert called == [conv, norm] and found.dtype == torch.bfloat16
