"""ResTV2 against what the published implementation computed in float64.

As in ``test_rest_golden.py``, whose bounds these are.
"""

import numpy as np
import pytest
import torch
from torch import nn
from weights_rule import fill, image

from mmrest import ResTV2

# of the published code's own distance in float32
FLOAT32_FACTOR = 2.5
# of the logits, which the file does not hold: its float32 twin against it
LOGITS_DISTANCE = 8.0e-6


@pytest.fixture(scope='module')
def golden(data_dir):
    return np.load(data_dir / 'golden_backbone_v2_64.npz')


def build(dtype, **options):
    model = ResTV2('tiny', **options).eval()
    fill(model.state_dict())  # in float32, as the weights of the arrays
    return model.to(dtype)


def relative_error(found, expected):
    expected = torch.as_tensor(expected)
    return float((found.double() - expected).abs().max() / expected.abs().max())


def bound(golden, name, dtype):
    if dtype == torch.float64:
        return 1e-11
    distance = golden.get(f'{name}/published_float32_distance', LOGITS_DISTANCE)
    return FLOAT32_FACTOR * float(distance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('attn_impl', ['dense', 'auto'])
def test_stages_and_gradients(golden, attn_impl, dtype):
    model = build(dtype, attn_impl=attn_impl)
    x = image((2, 3, 64, 96), 0).to(dtype).requires_grad_()
    outs = model(x)
    for stage, out in enumerate(outs, start=1):
        name = f'restv2_tiny/stage{stage}'
        assert out.shape == golden[name].shape
        limit = bound(golden, name, dtype)
        assert relative_error(out.detach(), golden[name]) <= limit, name

    sum(
        (out * image(out.shape, 100 + i).to(dtype)).sum() for i, out in enumerate(outs)
    ).backward()
    limit = 1e-9 if dtype == torch.float64 else 2e-4
    assert relative_error(x.grad, golden['restv2_tiny/grad/input']) <= limit
    norms = {
        name: float(golden[f'restv2_tiny/grad_norm/{name}'])
        for name, _ in model.named_parameters()
    }
    # the gradients of some biases are exactly 0: what stands there is rounding
    largest = max(norms.values())
    rel, floor = (1e-7, 1e-3) if dtype == torch.float64 else (5e-4, 1e-2 * largest)
    for name, parameter in model.named_parameters():
        found = float(parameter.grad.norm())
        assert abs(found - norms[name]) <= rel * max(norms[name], floor), name


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_logits(golden, published_shapes, dtype):
    head = nn.Linear(768, 1000)
    model = build(torch.float32, out_indices=(3,), out_norm='final')
    classifier = {**model.state_dict(), 'head.weight': head.weight.data}
    classifier['head.bias'] = head.bias.data
    shapes = {key: tuple(tensor.shape) for key, tensor in classifier.items()}
    assert shapes == published_shapes['restv2_tiny']
    fill(classifier)
    model, head = model.to(dtype), head.to(dtype)
    with torch.no_grad():
        (features,) = model(image((1, 3, 224, 224), 1).to(dtype))
        logits = head(features.mean((2, 3)))
    name = 'restv2_tiny/logits'
    assert relative_error(logits, golden[name]) <= bound(golden, name, dtype)
