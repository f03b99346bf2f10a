"""The MLP of a Transformer block, without storing its hidden layer.

The hidden layer is four times as wide as the tokens. It is computed for a chunk of
tokens at a time, small enough for the cache of a CPU, and again in the backward pass.
Training thus takes seven matrix products instead of six, and stores only the input.
"""

from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fast_path import is_plain, is_watched

# Bytes of a chunk's hidden layer
CPU_CHUNK_BYTES = 4 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20
# Each backward chunk is added to the gradients of all weights, so it must not be small
MIN_BACKWARD_ROWS = 1024


def gelu_mlp(
    x: Tensor, fc1: nn.Linear, act: nn.GELU, drop: nn.Dropout, fc2: nn.Linear
) -> Tensor:
    """Compute ``drop(fc2(drop(act(fc1(x)))))`` on tokens of shape (B, N, C).

    It is computed in chunks if the GELU is the exact one, dropout is off, and nothing
    depends on calls of the layers, see :mod:`mmrest.ops.fast_path`.
    """
    if _may_be_chunked(x, fc1, act, drop, fc2):
        inputs: tuple[Tensor, ...] = (x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if torch.is_autocast_enabled(x.device.type):
            # once, where autograd records it, and not in each chunk
            dtype = torch.get_autocast_dtype(x.device.type)
            inputs = tuple(
                t if t.dtype == torch.float64 else t.to(dtype) for t in inputs
            )
        return _ChunkedMlp.apply(*inputs)
    return drop(fc2(drop(act(fc1(x)))))


def _may_be_chunked(
    x: Tensor, fc1: nn.Linear, act: nn.GELU, drop: nn.Dropout, fc2: nn.Linear
) -> bool:
    return (
        not is_watched(x)
        and is_plain(fc1, nn.Linear)
        and is_plain(act, nn.GELU)
        and is_plain(drop, nn.Dropout)
        and is_plain(fc2, nn.Linear)
        and act.approximate == 'none'
        and not (drop.training and drop.p > 0.0)
        and fc1.bias is not None
        and fc2.bias is not None
    )


def _chunk_rows(x: Tensor, weight1: Tensor) -> int:
    budget = CPU_CHUNK_BYTES if x.device.type == 'cpu' else GPU_CHUNK_BYTES
    return max(1, budget // (weight1.shape[0] * x.element_size()))


class _ChunkedMlp(torch.autograd.Function):
    """``linear(gelu(linear(x)))``, of which only ``x`` and the weights are saved."""

    # PyTorch's other form, with setup_context, inspects the signature in every call
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        tokens = x.flatten(0, -2)
        # no view is returned: it could not be changed in place
        out = x.new_empty(*x.shape[:-1], weight2.shape[0])
        rows = out.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            for chunk in _chunks(len(tokens), _chunk_rows(x, weight1)):
                act = F.gelu(F.linear(tokens[chunk], weight1, bias1))
                torch.addmm(bias2, act, weight2.t(), out=rows[chunk])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight1, bias1, weight2 = ctx.saved_tensors
        want_x, want_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
        rows = max(_chunk_rows(x, weight1), MIN_BACKWARD_ROWS)
        tokens, grad = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = x.new_empty(tokens.shape) if want_x else None
        grad_weights: Optional[tuple[Tensor, ...]] = None
        with torch.autocast(x.device.type, enabled=False):
            for chunk in _chunks(len(tokens), rows):
                hidden = F.linear(tokens[chunk], weight1, bias1)
                grad_act = grad[chunk] @ weight2
                grad_hidden = torch.ops.aten.gelu_backward(grad_act, hidden)
                if grad_x is not None:
                    grad_x[chunk] = grad_hidden @ weight1
                if want_weights:
                    parts = (
                        grad_hidden.t() @ tokens[chunk],
                        grad_hidden.sum(0),
                        grad[chunk].t() @ F.gelu(hidden),
                        grad[chunk].sum(0),
                    )
                    grad_weights = _add(grad_weights, parts)
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        if grad_weights is None:
            return grad_x, None, None, None, None
        return (grad_x, *(w.to(x.dtype) for w in grad_weights))


def _chunks(length: int, rows: int) -> Iterator[slice]:
    """Yield slices of ``rows`` rows that cover ``length``, at least one."""
    for start in range(0, max(1, length), rows):
        yield slice(start, start + rows)


def _add(
    total: Optional[tuple[Tensor, ...]], parts: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Add in float32 or better."""
    wide = tuple(p if p.dtype == torch.float64 else p.float() for p in parts)
    return wide if total is None else tuple(t + w for t, w in zip(total, wide))
