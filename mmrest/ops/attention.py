"""The attention functions of ResT, each with a choice of implementation."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import dense_attention, dense_head_interaction_attention
from .export import is_exporting
from .operator import head_interaction_attention_op

ATTN_IMPLS = ('auto', 'tiled', 'dense')


def check_attn_impl(attn_impl: str) -> str:
    """Return ``attn_impl`` if it names an implementation.

    Raises:
        ValueError: If it does not.
    """
    if attn_impl not in ATTN_IMPLS:
        raise ValueError(
            f'attn_impl must be one of {", ".join(map(repr, ATTN_IMPLS))}, '
            f'found {attn_impl!r}'
        )
    return attn_impl


def head_interaction_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    scale: Optional[float] = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    attn_impl: str = 'auto',
    tile_rows: Optional[int] = None,
) -> Tensor:
    """Attention whose heads interact and whose maps are normalised.

    ``InstanceNorm(softmax(Conv1x1(scale * q k^T))) v``: the 1x1 convolution
    mixes the score maps of the heads, and the instance norm, without affine
    parameters or running statistics, gives each head's N x M map zero mean and
    unit variance, in training and evaluation alike (section 3.1 of the paper).

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        k (Tensor): Keys, of shape (B, h, M, d).
        v (Tensor): Values, of shape (B, h, M, d).
        weight (Tensor): Weight of the convolution, (h, h) or (h, h, 1, 1).
        bias (Tensor, optional): Its bias, of shape (h,). It cancels in the
            softmax: neither the result nor any other gradient depends on it,
            and its own gradient is 0.
        scale (float, optional): Factor on the scores. Default: ``d ** -0.5``.
        eps (float): Added to the variance of a map. Default: 1e-5.
        dropout_p (float): Dropout on the normalised map; the caller passes 0 in
            evaluation. Default: 0.
        attn_impl (str): ``'dense'`` stores every map and is the definition;
            ``'tiled'`` gives the same in memory that grows with N, not N x M
            (first-order gradients only, and no ``torch.func.grad``); ``'auto'`` is
            ``'tiled'``, except while a model is exported to TorchScript or ONNX.
            Default: ``'auto'``.
        tile_rows (int, optional): Query rows of a tile. Default: chosen from the
            sizes and from ``MMREST_TILE_BYTES``, see :mod:`mmrest.ops.tiling`.

    Returns:
        Tensor: Of shape (B, h, N, d).

    Raises:
        ValueError: If a shape, type or option does not fit.
    """
    check_attn_impl(attn_impl)
    _check_inputs(q, k, v, weight, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if attn_impl == 'dense' or (attn_impl == 'auto' and is_exporting()):
        return dense_head_interaction_attention(
            q, k, v, weight, bias, scale, eps, dropout_p
        )
    heads = q.shape[1]
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(2**62, (), dtype=torch.int64, device='cpu')
    out, _ = head_interaction_attention_op(
        q, k, v, weight.reshape(heads, heads), bias,
        scale, eps, dropout_p, seed, tile_rows,
    )  # fmt: skip
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Optional[float] = None,
    dropout_p: float = 0.0,
    attn_impl: str = 'auto',
) -> Tensor:
    """Plain attention, what EMSA with a single head is.

    Arguments as in :func:`head_interaction_attention`. Every ``attn_impl`` but
    ``'dense'`` is PyTorch's fused attention.
    """
    check_attn_impl(attn_impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if attn_impl == 'dense':
        return dense_attention(q, k, v, scale, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Optional[Tensor]
) -> None:
    heads = q.shape[1] if q.dim() == 4 else 0
    fits = (
        q.dim() == k.dim() == v.dim() == 4
        and k.shape == v.shape
        and q.shape[:2] == k.shape[:2]
        and q.shape[-1] == k.shape[-1]
        and weight.shape in ((heads, heads), (heads, heads, 1, 1))
        and (bias is None or bias.shape == (heads,))
    )
    if not fits:
        raise ValueError(
            'q must have shape (B, h, N, d), k and v (B, h, M, d), weight (h, h) or '
            f'(h, h, 1, 1) and bias (h,); found q {tuple(q.shape)}, '
            f'k {tuple(k.shape)}, v {tuple(v.shape)}, weight {tuple(weight.shape)}, '
            f'bias {None if bias is None else tuple(bias.shape)}'
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f'q, k and v must have one dtype, found {q.dtype}, {k.dtype} and {v.dtype}'
        )
