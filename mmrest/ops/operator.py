"""The tiled attention as one operator that PyTorch's compilers see whole.

``mmrest::head_interaction_attention`` has a shape function, so torch.compile and
torch.export keep it as one node, and an autograd formula, which is an operator
too. It cannot be differentiated twice; the dense form can.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from .tiled import tiled_backward, tiled_forward
from .tiling import choose_tile


def _without_autocast(q: Tensor) -> torch.autocast:
    return torch.autocast(q.device.type, enabled=False)


@torch.library.custom_op('mmrest::head_interaction_attention', mutates_args=())
def head_interaction_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: float,
    eps: float,
    dropout_p: float,
    seed: Optional[Tensor],
    tile_rows: Optional[int],
) -> tuple[Tensor, Tensor]:
    tile = choose_tile(q, k.shape[2], tile_rows)
    with _without_autocast(q):
        return tiled_forward(q, k, v, weight, scale, eps, tile, dropout_p, _value(seed))


@torch.library.custom_op('mmrest::head_interaction_attention_backward', mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    out: Tensor,
    rstd: Tensor,
    scale: float,
    dropout_p: float,
    seed: Optional[Tensor],
    tile_rows: Optional[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tile = choose_tile(q, k.shape[2], tile_rows)
    with _without_autocast(q):
        return tiled_backward(
            grad, q, k, v, weight, out, rstd, scale, tile, dropout_p, _value(seed)
        )


def _value(seed: Optional[Tensor]) -> int:
    return 0 if seed is None else int(seed)


@head_interaction_attention_op.register_fake
def _(q, k, v, weight, bias, scale, eps, dropout_p, seed, tile_rows):
    batch, heads, num_queries, dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, 1, 1, dtype=dtype)


@_backward_op.register_fake
def _(grad, q, k, v, weight, out, rstd, scale, dropout_p, seed, tile_rows):
    batch, heads, num_queries, dim = q.shape
    grad_q = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    return (
        grad_q,
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, weight, bias, scale, _, dropout_p, seed, tile_rows = inputs
    out, rstd = output
    ctx.save_for_backward(q, k, v, weight, bias, out, rstd, seed)
    ctx.scale, ctx.dropout_p, ctx.tile_rows = scale, dropout_p, tile_rows
    ctx.mark_non_differentiable(rstd)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Optional[Tensor], ...]:
    q, k, v, weight, bias, out, rstd, seed = ctx.saved_tensors
    grads = _backward_op(
        grad, q, k, v, weight, out, rstd,
        ctx.scale, ctx.dropout_p, seed, ctx.tile_rows,
    )  # fmt: skip
    # exactly 0, and not None: the parameter takes part in the computation, so
    # DistributedDataParallel must not find it unused
    grad_bias = None if bias is None else torch.zeros_like(bias)
    return (*grads, grad_bias, None, None, None, None, None)


def _refuse_second_order(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        'the tiled attention has no second-order gradients; build the model with '
        "attn_impl='dense' to differentiate twice"
    )


head_interaction_attention_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_refuse_second_order)
