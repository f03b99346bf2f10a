"""ResT's attention: its definition, and the choice of an implementation.

======================  ============================================================
``dense``               the paper's equations, operation by operation, with all maps
                        stored: the reference for the tests of the others
``tiled``               a tile of rows at a time, without storing the maps, see
                        :mod:`mmrest.ops.tiled`
``triton``              tiles with fused kernels for CUDA, see
                        :mod:`mmrest.ops.triton_head_interaction`
``amx``                 blocks of rows in C++, in bfloat16 for CPUs with AMX, see
                        :mod:`mmrest.ops.amx_head_interaction`
======================  ============================================================
"""

import warnings
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import amx_head_interaction, triton_head_interaction
from .amx_head_interaction import amx_head_interaction_attention
from .fast_path import is_exporting, is_transformed
from .tiled import tiled_head_interaction_attention, to_parts
from .triton_head_interaction import triton_head_interaction_attention

ATTN_IMPLS = ('auto', 'tiled', 'triton', 'amx', 'dense')

# For each: what says why it does not apply, and the implementation
KERNELS = {
    'triton': (triton_head_interaction.why_not, triton_head_interaction_attention),
    'amx': (amx_head_interaction.why_not, amx_head_interaction_attention),
}

# Smaller parts cost more than another thread saves.
MIN_PART_ROWS = 256


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
    """Compute ``InstanceNorm(softmax(Conv1x1(scale * q k^T))) v``.

    The 1x1 convolution mixes the score maps of the heads. The instance norm, without
    affine parameters or running statistics, gives each head's N x M map zero mean and
    unit variance, also in evaluation (section 3.1 of the paper).

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        k (Tensor): Keys, of shape (B, h, M, d).
        v (Tensor): Values, of shape (B, h, M, d).
        weight (Tensor): Weight of the convolution, (h, h) or (h, h, 1, 1).
        bias (Tensor, optional): Its bias, of shape (h,). It cancels in the
            softmax, so its gradient is 0 and nothing else depends on it.
        scale (float, optional): Factor on the scores. Default: ``d ** -0.5``.
        eps (float): Added to the variance of a map. Default: 1e-5.
        dropout_p (float): Dropout on the normalised map; pass 0 in evaluation.
            Default: 0.
        attn_impl (str): ``'dense'`` is the definition and stores all maps.
            ``'tiled'`` gives the same in memory that grows with N instead of N x M. It
            has first-order gradients only, and does not support ``torch.func.grad``.
            ``'triton'`` is ``'tiled'`` with fused kernels for CUDA, and ``'amx'`` is
            ``'tiled'`` as a C++ operator in bfloat16 for CPUs with AMX, which is
            compiled on first use. Where they do not apply, they warn and fall back to
            ``'tiled'``. ``'auto'``
            is ``'tiled'``, or ``'dense'`` during export to TorchScript or ONNX and
            under the transforms of ``torch.func``. Default: ``'auto'``.
        tile_rows (int, optional): Query rows of a tile. Default: chosen from the
            sizes and from ``MMREST_TILE_BYTES``, see
            :func:`mmrest.ops.tiled.choose_tile`.

    Returns:
        Tensor: Of shape (B, h, N, d).

    Raises:
        ValueError: If a shape, type or option does not fit.
        RuntimeError: If ``attn_impl`` is ``'tiled'``, ``'triton'`` or ``'amx'`` during
            export to TorchScript or ONNX.
    """
    check_attn_impl(attn_impl)
    _check_inputs(q, k, v, weight, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = q.shape[1]
    if attn_impl in ('tiled', *KERNELS) and is_exporting():
        raise RuntimeError(
            f'attn_impl={attn_impl!r} is an operator of mmrest, which TorchScript and '
            "ONNX do not know. Build the model with attn_impl='auto' or 'dense' to "
            'export it.'
        )
    if attn_impl == 'dense' or (
        attn_impl == 'auto' and (is_exporting() or is_transformed())
    ):
        kernel = weight.reshape(heads, heads, 1, 1)
        return dense_head_interaction_attention(
            q, k, v, lambda maps: F.conv2d(maps, kernel, bias), scale, eps, dropout_p
        )
    matrix = weight.reshape(heads, heads)
    if attn_impl in KERNELS:
        why_not, compute = KERNELS[attn_impl]
        reason = why_not(q, k, v, dropout_p)
        if reason is None:
            return compute(q, k, v, matrix, scale, eps, bias, tile_rows)
        _warn_of_tiled(attn_impl, reason)
    return tiled_head_interaction_attention(
        q, k, v, matrix, bias, scale, eps, dropout_p, tile_rows
    )


def _warn_of_tiled(attn_impl: str, reason: str) -> None:
    warnings.warn(
        f"attn_impl={attn_impl!r} cannot be used here: {reason}. 'tiled' is used.",
        UserWarning,
        stacklevel=3,
    )


# compilers call it once, when they trace; they cannot trace a warning itself
_warn_of_tiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Optional[float] = None,
    dropout_p: float = 0.0,
    attn_impl: str = 'auto',
) -> Tensor:
    """Compute plain attention, ``softmax(scale * q k^T) v``.

    Arguments as in :func:`head_interaction_attention`. Every ``attn_impl`` but
    ``'dense'`` uses PyTorch's fused attention. That has no forward derivatives on
    CPUs, so ``'auto'`` is ``'dense'`` under the transforms of ``torch.func``.
    """
    check_attn_impl(attn_impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if attn_impl == 'dense' or (attn_impl == 'auto' and is_transformed()):
        return dense_attention(q, k, v, scale, dropout_p)
    batch, parts = q.shape[0], _row_parts(q)
    if parts > 1:
        # B, h, N, d -> B * parts, h, N / parts, d, without a copy
        q = to_parts(q, parts)
        k, v = (t[:, None].expand(-1, parts, -1, -1, -1).flatten(0, 1) for t in (k, v))
    x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    if parts > 1:
        # B * parts, h, N / parts, d -> B, h, N, d
        x = x.unflatten(0, (batch, parts)).transpose(1, 2).flatten(2, 3)
    return x


def _row_parts(q: Tensor) -> int:
    """Return into how many parts to split the rows, to use all threads.

    On CPUs, the backward pass of PyTorch's attention has one thread per image and head.
    Rows are independent, so that parts of them can be passed as images.
    """
    if (
        q.device.type != 'cpu'
        or not (torch.is_grad_enabled() and q.requires_grad)
        or torch.compiler.is_compiling()
        or is_exporting()
        or is_transformed()
    ):
        return 1
    needed = -(-torch.get_num_threads() // max(1, q.shape[0] * q.shape[1]))
    if needed == 1:
        return 1
    rows = q.shape[2]
    fitting = (n for n in range(needed, 4 * needed + 1) if rows % n == 0)
    parts = next(fitting, 1)
    return parts if rows >= MIN_PART_ROWS * parts else 1


def dense_head_interaction_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Callable[[Tensor], Tensor],
    scale: float,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    """``Dropout(InstanceNorm(mix(scale * q k^T).softmax)) v``, equation 4 of the paper.

    Args:
        mix (callable): The 1x1 convolution over the heads, from maps of shape
            (B, h, N, M) to maps of the same shape.

    The other arguments and the result are those of :func:`head_interaction_attention`.
    """
    # B, h, N, M
    attn = mix((q @ k.transpose(-2, -1)) * scale)
    attn = attn.softmax(dim=-1)
    # torch.instance_norm, unlike its nn.functional twin, takes 1x1 maps
    attn = torch.instance_norm(
        attn, None, None, None, None, True, 0.0, eps, torch.backends.cudnn.enabled
    )
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    # B, h, N, d
    return attn.to(v.dtype) @ v


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """``Dropout(softmax(scale * q k^T)) v``, the attention of one head."""
    attn = (q @ k.transpose(-2, -1)) * scale
    attn = attn.softmax(dim=-1)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    return attn.to(v.dtype) @ v


def check_attn_impl(attn_impl: str) -> str:
    """Return ``attn_impl``, or raise a ``ValueError`` if there is none of this name."""
    if attn_impl not in ATTN_IMPLS:
        raise ValueError(
            f'attn_impl must be one of {", ".join(map(repr, ATTN_IMPLS))}, '
            f'found {attn_impl!r}'
        )
    return attn_impl


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
