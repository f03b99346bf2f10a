"""Inputs for the attention functions, and how results are compared."""

from collections.abc import Sequence
from typing import Callable, NamedTuple

import torch
from torch import Tensor

from mmrest.ops import head_interaction_attention

# largest relative difference from the dense form that a dtype allows
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Shape(NamedTuple):
    """Sizes of one call."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Leaves q, k, v, weight and bias, and the gradient of the output."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype)

    b, h, n, m, d = shape
    inputs = {
        # as the projections of EMSA leave them: B, N, h, d seen as B, h, N, d
        'q': draw(b, n, h, d).transpose(1, 2),
        'k': draw(b, m, h, d).transpose(1, 2),
        'v': draw(b, m, h, d).transpose(1, 2),
        'weight': draw(h, h, 1, 1) / h**0.5,
        'bias': draw(h),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def run(
    inputs: dict[str, Tensor],
    grad: Tensor,
    wanted: Sequence[str] = ('q', 'k', 'v', 'weight', 'bias'),
    function: Callable[..., Tensor] = head_interaction_attention,
    **options: object,
) -> dict[str, Tensor]:
    """The output and the wanted gradients."""
    out = function(**inputs, **options)
    grads = torch.autograd.grad(out, [inputs[name] for name in wanted], grad)
    return {'out': out.detach(), **dict(zip(wanted, grads))}


def relative_error(found: Tensor, expected: Tensor, floor: float) -> float:
    """Largest difference over the largest expected magnitude, or over ``floor``.

    Where a gradient is exactly zero in theory, what stands there is rounding.
    """
    if expected.numel() == 0:
        return 0.0
    scale = max(float(expected.abs().max()), floor)
    return float((found.double() - expected.double()).abs().max()) / scale


def assert_same(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerance: float,
    floor: float = 1.0,
) -> None:
    """Compare outputs and gradients; the bias's own gradient is exactly 0.

    ``floor`` is the size of the inputs, which :func:`make_inputs` draws around 1.
    """
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        if name == 'bias':
            assert not tensor.any(), 'the bias cancels: its gradient is 0'
            continue
        error = relative_error(tensor, expected[name], floor)
        assert error <= tolerance, f'{name}: relative error {error:.1e}'
