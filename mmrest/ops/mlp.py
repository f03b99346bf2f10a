"""The MLP of a Transformer block in less memory than its hidden layer.

The hidden layer is four times as wide as the tokens. Without gradients it exists
for a chunk of tokens at a time, small enough for the cache. With gradients only
its values before the GELU are kept; those after it are computed again.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .export import is_captured

CHUNK_BYTES = 4 * 2**20  # of the hidden layer, on a CPU


def gelu_mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear, drop: nn.Dropout) -> Tensor:
    """``drop(fc2(drop(gelu(fc1(x)))))`` on tokens of shape (B, N, C)."""
    dropping = drop.training and drop.p > 0.0
    # a compiler finds its own plan, and a recording should hold no loop
    if dropping or is_captured():
        return drop(fc2(drop(F.gelu(fc1(x)))))
    if torch.is_grad_enabled():
        return _GeluLinear.apply(fc1(x), fc2.weight, fc2.bias)
    if x.device.type != 'cpu':
        return fc2(F.gelu(fc1(x)))
    rows = max(1, CHUNK_BYTES // (fc1.out_features * x.element_size()))
    chunks = [fc2(F.gelu(fc1(chunk))) for chunk in x.flatten(0, 1).split(rows)]
    return torch.cat(chunks).view(*x.shape[:-1], -1)


class _GeluLinear(torch.autograd.Function):
    """``linear(gelu(hidden))`` that keeps ``hidden`` alone for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        hidden, weight, _ = inputs
        ctx.save_for_backward(hidden, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        hidden, weight = ctx.saved_tensors
        # under autocast the weight is wider than what it was multiplied with
        grad_act = grad @ weight.to(grad.dtype)
        grad_hidden = torch.ops.aten.gelu_backward(grad_act.to(hidden.dtype), hidden)
        if not any(ctx.needs_input_grad[1:]):
            return grad_hidden, None, None
        grad = grad.flatten(0, -2)
        act = F.gelu(hidden).flatten(0, -2).to(grad.dtype)
        grad_weight = (grad.t() @ act).to(weight.dtype)
        return grad_hidden, grad_weight, grad.sum(0).to(weight.dtype)
