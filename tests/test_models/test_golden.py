"""Both generations against what the published code computed in float64.

In float32 any run is as far from those arrays as its own rounding takes it; the files
hold how far the published code's own float32 run is.
"""

import numpy as np
import pytest
import torch
from torch import nn
from weights_rule import fill, image

from mmrest import ResT, ResTV2

FILES = {ResT: 'golden_backbone64.npz', ResTV2: 'golden_backbone_v2_64.npz'}
# of the published code's own distance in float32
FLOAT32_FACTOR = 2.5
# of the logits, which the files do not hold: their float32 twin against them
LOGITS_DISTANCE = 8.0e-6
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)


@pytest.fixture
def golden(data_dir, kind):
    return np.load(data_dir / FILES[kind])


def build(kind, arch, dtype, **options):
    model = kind(arch, **options).eval()
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


@DTYPES
@pytest.mark.parametrize(
    'kind, arch, batch, attn_impl',
    [
        (ResT, 'lite', 2, 'dense'),
        (ResT, 'lite', 2, 'tiled'),
        (ResT, 'base', 1, 'dense'),
        (ResT, 'base', 1, 'tiled'),
        (ResTV2, 'tiny', 2, 'dense'),
        (ResTV2, 'tiny', 2, 'auto'),
    ],
)
def test_stages_and_gradients(golden, kind, arch, batch, attn_impl, dtype):
    model = build(kind, arch, dtype, attn_impl=attn_impl)
    start = f'{kind.__name__.lower()}_{arch}'
    x = image((batch, 3, 64, 96), 0).to(dtype).requires_grad_()
    outs = model(x)
    for stage, out in enumerate(outs, start=1):
        name = f'{start}/stage{stage}'
        assert out.shape == golden[name].shape
        limit = bound(golden, name, dtype)
        assert relative_error(out.detach(), golden[name]) <= limit, name

    sum(
        (out * image(out.shape, 100 + i).to(dtype)).sum() for i, out in enumerate(outs)
    ).backward()
    if f'{start}/grad/input' in golden:
        limit = 1e-9 if dtype == torch.float64 else 3e-4
        assert relative_error(x.grad, golden[f'{start}/grad/input']) <= limit
    norms = {
        name: float(golden[f'{start}/grad_norm/{name}'])
        for name, _ in model.named_parameters()
    }
    # the gradients of some biases are exactly 0: what stands there is rounding
    largest = max(norms.values())
    rel, floor = (1e-7, 1e-3) if dtype == torch.float64 else (5e-4, 1e-2 * largest)
    for name, parameter in model.named_parameters():
        found = float(parameter.grad.norm())
        assert abs(found - norms[name]) <= rel * max(norms[name], floor), name


@DTYPES
@pytest.mark.parametrize(
    'kind, arch, options',
    [(ResT, 'lite', {}), (ResTV2, 'tiny', dict(out_norm='final'))],
)
def test_logits(golden, published_shapes, kind, arch, options, dtype):
    model = build(kind, arch, torch.float32, out_indices=(3,), **options)
    head = nn.Linear(model.arch.embed_dims[-1], 1000)
    classifier = {**model.state_dict(), 'head.weight': head.weight.data}
    classifier['head.bias'] = head.bias.data
    shapes = {key: tuple(tensor.shape) for key, tensor in classifier.items()}
    start = f'{kind.__name__.lower()}_{arch}'
    assert shapes == published_shapes[start]
    fill(classifier)
    model, head = model.to(dtype), head.to(dtype)
    with torch.no_grad():
        (features,) = model(image((1, 3, 224, 224), 1).to(dtype))
        logits = head(features.mean((2, 3)))
    limit = bound(golden, f'{start}/logits', dtype)
    assert relative_error(logits, golden[f'{start}/logits']) <= limit
