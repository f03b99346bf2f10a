"""What is attached to the call of a layer acts, in training and in evaluation."""

import pytest
import torch
from mmengine.registry import MODELS
from rest_variants import TINY
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from weights_rule import fill, image

# the last block has several heads, so every kind of layer
BLOCK = 'stage4.0'
LAYERS = {
    'attn.q': nn.Linear,
    'attn.kv': nn.Linear,
    'attn.transform_conv': nn.Conv2d,
    'attn.proj': nn.Linear,
    'mlp.fc1': nn.Linear,
    'mlp.act': nn.GELU,
    'mlp.fc2': nn.Linear,
    'mlp.drop': nn.Dropout,
}
WEIGHTED = [name for name, kind in LAYERS.items() if kind in (nn.Linear, nn.Conv2d)]
MODES = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])


def build(training, **options):
    model = MODELS.build(dict(type='ResT', arch=TINY, out_indices=(3,), **options))
    fill(model.state_dict())
    return model.train(training)


def layer_of(model, name):
    return model.get_submodule(f'{BLOCK}.{name}')


def put(model, name, layer):
    parent, _, attribute = f'{BLOCK}.{name}'.rpartition('.')
    setattr(model.get_submodule(parent), attribute, layer)


@MODES
@pytest.mark.parametrize('name', LAYERS)
def test_hooks_fire(name, training):
    model, calls = build(training), []
    layer = layer_of(model, name)
    layer.register_forward_pre_hook(lambda *args: calls.append('pre'))
    layer.register_forward_hook(lambda *args: calls.append('post'))
    model(image((2, 3, 40, 40)))
    times = 2 if name == 'mlp.drop' else 1
    assert calls == ['pre', 'post'] * times


@MODES
@pytest.mark.parametrize('name', WEIGHTED)
def test_backward_hooks_fire(name, training):
    model, calls = build(training), []
    layer_of(model, name).register_full_backward_hook(lambda *args: calls.append(1))
    model(image((2, 3, 40, 40)))[0].sum().backward()
    assert calls == [1]


@MODES
def test_global_hooks_see_every_layer(training):
    model, seen = build(training), set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *args: seen.add(module)
    )
    try:
        model(image((2, 3, 40, 40)))
    finally:
        handle.remove()
    assert {layer_of(model, name) for name in LAYERS} <= seen


class Doubled(nn.Module):
    """An adapter around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


class DoubledWeight(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2 * weight


def replace(model, name):
    put(model, name, Doubled(layer_of(model, name)))


def replace_by_subclass(model, name):
    layer = layer_of(model, name)
    kind = type(layer)
    layer.__class__ = type(
        f'Doubled{kind.__name__}',
        (kind,),
        {'forward': lambda s, x: 2 * kind.forward(s, x)},
    )


def replace_forward(model, name):
    layer = layer_of(model, name)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def parametrise(model, name):
    parametrize.register_parametrization(
        layer_of(model, name), 'weight', DoubledWeight()
    )


@MODES
@pytest.mark.parametrize(
    'change', [replace, replace_by_subclass, replace_forward, parametrise]
)
@pytest.mark.parametrize('name', WEIGHTED)
def test_changed_layers_act(name, change, training):
    """Each doubles what the layer gives, or its weight (the parametrisation)."""
    x = image((2, 3, 40, 40))
    expected, model = build(training), build(training)
    layer = layer_of(expected, name)
    with torch.no_grad():
        layer.weight.mul_(2)
        if change is not parametrise:
            layer.bias.mul_(2)
    change(model, name)
    wanted, found = expected(x)[0], model(x)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found.sum().backward()


@pytest.mark.parametrize('name', WEIGHTED)
@pytest.mark.parametrize('attach', ['prune', 'weight_norm'])
def test_weights_that_are_built_at_the_call_are_current(name, attach):
    """They live through several steps, and evaluation does not use a stale weight."""
    model, x = build(True), image((2, 3, 40, 40))
    layer = layer_of(model, name)
    if attach == 'prune':
        prune.l1_unstructured(layer, 'weight', 0.3)
    else:
        weight_norm(layer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
    if attach == 'prune':
        model.eval()
        before = model(x)[0]
        layer.weight_mask.zero_()
        assert not torch.equal(model(x)[0], before)


@MODES
def test_flop_counters_count_every_product(training):
    def count(attn_impl):
        model = build(training, attn_impl=attn_impl)
        with FlopCounterMode(display=False) as counter:
            model(image((1, 3, 64, 64)))
        return counter.get_flop_counts()

    auto, dense = count('auto'), count('dense')
    for layer in ('stage4', 'stage3', 'stage1.0.mlp', 'stage1.0.attn.q'):
        assert auto[f'ResT.{layer}'] == dense[f'ResT.{layer}'], layer


def test_function_modes_see_layers_and_a_default_device_changes_nothing():
    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(getattr(function, '__name__', ''))
            return function(*args, **(kwargs or {}))

    model, names = build(False), []
    with Recorder():
        model(image((1, 3, 40, 40)))
    assert names.count('linear') == 4 * 5 and 'gelu' in names
    x = image((1, 3, 40, 40))
    plain = model(x)[0]
    with torch.device('cpu'):
        assert torch.equal(model(x)[0], plain)


def test_low_rank_adapters_train():
    pytest.importorskip('mmpretrain.models', reason='needs mmpretrain')
    from mmengine.registry import DefaultScope

    targets = [dict(type=f'.*{t}') for t in ('attn.q', 'attn.kv', 'mlp.fc1', 'mlp.fc2')]
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        from mmpretrain.registry import MODELS as models

        model = models.build(
            dict(
                type='LoRAModel',
                module=dict(type='ResT', arch=TINY),
                alpha=4,
                rank=2,
                targets=targets,
            )
        )
    sum(out.sum() for out in model(image((2, 3, 40, 40)))).backward()
    adapters = {n: p for n, p in model.named_parameters() if 'lora' in n}
    assert len(adapters) == 4 * 4 * 2
    assert all(p.grad is not None for p in adapters.values())


def test_dynamic_quantisation():
    model = build(False)
    quantised = torch.ao.quantization.quantize_dynamic(
        model, {nn.Linear}, dtype=torch.qint8
    )
    with torch.no_grad():
        found, expected = (m(image((1, 3, 64, 64)))[0] for m in (quantised, model))
    assert (found - expected).norm() < 0.5 * expected.norm()
    assert not torch.equal(found, expected)


@MODES
def test_plain_layers_are_not_called(monkeypatch, training):
    """The fast path is taken where nobody watches, and gives the same."""
    model, x = build(training), image((2, 3, 64, 64))
    expected = build(training, attn_impl='dense')
    expected.stage4[0].mlp.fc1.register_forward_hook(lambda *args: None)
    wanted = expected(x)[0]
    layers = [layer_of(model, name) for name in ('attn.transform_conv', 'mlp.fc1')]
    called = []
    call = nn.Module._call_impl

    def note(self, *args, **kwargs):
        called.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, '_call_impl', note)
    found = model(x)[0]
    assert model.stage4[0].attn.q in called
    assert not any(layer in called for layer in layers)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
