r"""ResT's head-interaction attention, forward and backward, tile by tile.

With :math:`P = softmax(W s q k^T)` (rows: queries, columns: keys; W mixes the
heads), the paper normalises each head's N x M map P to zero mean and unit
variance before it meets v. Every row of P sums to 1, so

* the mean of a map is exactly 1/M, whatever its content;
* the bias of the 1x1 convolution is constant along a row and cancels in the
  softmax, so its gradient is 0;
* with the centred map C = P - 1/M, the variance is ``sum(C^2) / (N M)`` and
  ``out = r C v`` where ``r = rsqrt(variance + eps)``.

Only r needs the whole map, and only through one running sum for each head. So a
tile of query rows is computed, used and forgotten, and r scales the sum at the
end. The backward pass makes each tile anew. With G the gradient of out,

* ``dv = r C^T G``;
* ``dC = r G v^T + c C`` where ``c = -r^2 sum(G out) / (N M)``: the second term
  is what flows through the variance, since ``sum(G C v) = sum(G out) / r`` and
  ``dr/dC = -r^3 C / (N M)``;
* ``dA = softmax_backward(P, dC)``. It maps any constant along a row to 0, so the
  centred map may stand for P where it multiplies c, or P for the centred map;
* ``dS = W^T dA``, ``dW = dA S^T``, ``dq = s dS k``, ``dk = s dS^T q``.

Dropout, which comes after the normalisation, replaces C by the masked and
rescaled map in ``C v`` and masks ``G v^T`` alike. A tile's mask is drawn from a
generator seeded for this tile, and so is the same in both passes.

Tiles are computed in float32 (float64 for float64 inputs). For half-precision
inputs the matrix products alone run in the inputs' type. In float16 they hold what
the published operations hold there: the normalised map ``r C`` where it meets G, and
``G v^T`` before r, which is about 300 at a thousand keys, multiplies it.

The operator ``mmrest::head_interaction_attention`` has a shape function, so that
torch.compile and torch.export keep it as one node, and an autograd formula, which
is an operator too.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

# Bytes of one tile's scores. Four tiles of this size (scores, probabilities and
# their gradients) are alive at once, so on a CPU they should stay within the
# last-level cache; a GPU wants work enough to fill it.
CPU_TILE_BYTES = 4 * 2**20
GPU_TILE_BYTES = 128 * 2**20
# Below this many rows a matrix product loses more speed than the cache gives.
MIN_ROWS = 64

# ---------------------------------------------------------------- tiles


class Tile(NamedTuple):
    """The part of a batch of score maps that is computed at once."""

    images: int
    rows: int


class _Span(NamedTuple):
    """One tile: images b0..b1, query rows n0..n1, and its number."""

    images: slice
    rows: slice
    number: int


def tile_bytes(device: torch.device, gpu_bytes: int = GPU_TILE_BYTES) -> int:
    """Bytes that the scores of one tile may take.

    The environment variable ``MMREST_TILE_BYTES`` overrides the default (4 MiB
    on a CPU, ``gpu_bytes`` elsewhere, which is 128 MiB by default).

    Raises:
        ValueError: If ``MMREST_TILE_BYTES`` is not a positive integer.
    """
    override = os.environ.get('MMREST_TILE_BYTES')
    if override is None:
        return CPU_TILE_BYTES if device.type == 'cpu' else gpu_bytes
    if not override.isdecimal() or int(override) == 0:
        raise ValueError(
            'MMREST_TILE_BYTES must be a positive integer (bytes of one tile of '
            f'attention scores), found {override!r}'
        )
    return int(override)


def choose_tile(
    q: Tensor,
    num_keys: int,
    tile_rows: Optional[int] = None,
    gpu_bytes: int = GPU_TILE_BYTES,
) -> Tile:
    """Choose the tile for queries of shape (B, h, N, d) and ``num_keys`` keys.

    Whole images are taken together while they fit into :func:`tile_bytes`;
    otherwise one image is cut into equal tiles of at least ``MIN_ROWS`` rows.

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        num_keys (int): Number of keys M.
        tile_rows (int, optional): Query rows of a tile, instead of the number
            that follows from the memory budget.
        gpu_bytes (int): The memory budget on a GPU, see :func:`tile_bytes`.

    Raises:
        ValueError: If ``tile_rows`` is not positive.
    """
    batch, heads, num_queries, _ = q.shape
    if tile_rows is not None:
        if tile_rows < 1:
            raise ValueError(f'tile_rows must be at least 1, found {tile_rows}')
        return Tile(images=1, rows=tile_rows)
    row_bytes = max(1, heads * num_keys * max(4, q.element_size()))
    rows = max(MIN_ROWS, tile_bytes(q.device, gpu_bytes) // row_bytes)
    if rows >= num_queries:
        images = max(1, min(batch, rows // max(1, num_queries)))
        return Tile(images=images, rows=max(1, num_queries))
    num_tiles = -(-num_queries // rows)
    return Tile(images=1, rows=-(-num_queries // num_tiles))


def _spans(batch: int, num_queries: int, tile: Tile) -> Iterator[_Span]:
    number = 0
    for b in range(0, batch, tile.images):
        for n in range(0, num_queries, tile.rows):
            images = slice(b, min(b + tile.images, batch))
            yield _Span(images, slice(n, min(n + tile.rows, num_queries)), number)
            number += 1


class _Workspace:
    """Buffers of one tile, taken once and used for every tile of a pass."""

    def __init__(self, q: Tensor, num_keys: int, tile: Tile, count: int) -> None:
        self.num_keys = num_keys
        size = tile.images * q.shape[1] * tile.rows * num_keys
        self.buffers = torch.empty(
            count, size, dtype=_accumulation_dtype(q.dtype), device=q.device
        )

    def tile(self, number: int, images: int, heads: int, rows: int) -> Tensor:
        """Buffer ``number`` as a contiguous (images, heads, rows, M) tensor."""
        size = images * heads * rows * self.num_keys
        return self.buffers[number, :size].view(images, heads, rows, self.num_keys)


# ---------------------------------------------------------------- arithmetic


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` for 4D tensors; half-precision products are widened."""
    a, b, flat = a.flatten(0, 1), b.flatten(0, 1), out.flatten(0, 1)
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=flat)
    else:
        flat.copy_(torch.bmm(a, b))
    return out


def _mix_heads(weight: Tensor, maps: Tensor, out: Tensor) -> Tensor:
    """The 1x1 convolution: ``out[:, i] = sum_j weight[i, j] maps[:, j]``."""
    images, heads = maps.shape[:2]
    if images == 1:
        torch.mm(weight, maps.view(heads, -1), out=out.view(heads, -1))
    else:
        torch.bmm(
            weight.expand(images, heads, heads), maps.flatten(2), out=out.flatten(2)
        )
    return out


def _probabilities(
    q: Tensor, k: Tensor, weight: Tensor, scores: Tensor, out: Tensor
) -> Tensor:
    """``out = softmax(weight @ scores)`` with ``scores = q k^T``; q is scaled."""
    _bmm(q, k.transpose(-2, -1), out=scores)
    _mix_heads(weight, scores, out=out)
    return torch.softmax(out, dim=-1, out=out)


def _dropout_mask(like: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(device=like.device).manual_seed(seed)
    keep = torch.empty_like(like).bernoulli_(1.0 - p, generator=generator)
    return keep.div_(1.0 - p)


def _accumulate(total: Tensor, images: slice, maps: Tensor, tokens: Tensor) -> None:
    """``total[images] += maps^T @ tokens``."""
    target = total[images].flatten(0, 1)
    maps = maps.flatten(0, 1).transpose(-2, -1)
    tokens = tokens.flatten(0, 1)
    if tokens.dtype == target.dtype:
        target.baddbmm_(maps, tokens)
    else:
        target += torch.bmm(maps.to(tokens.dtype), tokens)


def tiled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    scale: float,
    eps: float,
    tile: Tile,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the attention without storing its maps.

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        k (Tensor): Keys, of shape (B, h, M, d).
        v (Tensor): Values, of shape (B, h, M, d).
        weight (Tensor): What each head takes from each score map, (h, h).
        scale (float): Factor on the scores.
        eps (float): Added to the variance of a map.
        tile (Tile): Images and query rows that are computed at once.
        dropout_p (float): Share of the normalised map that is zeroed.
        seed (int): Seed of the dropout masks.

    Returns:
        tuple[Tensor, Tensor]: The output, of shape (B, h, N, d) in the memory
        order (B, N, h, d), and r, of shape (B, h, 1, 1).
    """
    batch, heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    dtype = _accumulation_dtype(q.dtype)
    weight = weight.to(dtype)
    out = q.new_empty(batch, num_queries, heads, dim, dtype=dtype).transpose(1, 2)
    square_sum = q.new_zeros(batch, heads, dtype=dtype)
    work = _Workspace(q, num_keys, tile, count=2)

    for images, rows, number in _spans(batch, num_queries, tile):
        q_tile = q[images, :, rows] * scale
        shape = q_tile.shape[:3]
        # images, h, rows, M
        scores, attn = work.tile(0, *shape), work.tile(1, *shape)
        _probabilities(q_tile, k[images], weight, scores, out=attn)
        attn.sub_(1.0 / num_keys)
        square_sum[images] += torch.linalg.vector_norm(attn.flatten(2), dim=-1).square()
        if dropout_p > 0.0:
            attn.mul_(_dropout_mask(attn, dropout_p, seed + number))
        # images, h, rows, d
        product = torch.bmm(
            attn.flatten(0, 1).to(v.dtype), v[images].flatten(0, 1)
        ).unflatten(0, shape[:2])
        out[images, :, rows] = product

    variance = square_sum / max(1, num_queries * num_keys)
    rstd = (variance + eps).rsqrt()[..., None, None]
    return out.mul_(rstd).to(q.dtype), rstd


def tiled_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    out: Tensor,
    rstd: Tensor,
    scale: float,
    tile: Tile,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and weight, from tiles that are computed again.

    Args:
        grad (Tensor): Gradient of the output, of shape (B, h, N, d).
        out (Tensor): The output of :func:`tiled_forward`.
        rstd (Tensor): Its r.

    The other arguments are those of :func:`tiled_forward`.
    """
    batch, heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    dtype = _accumulation_dtype(q.dtype)
    is_narrow = q.dtype == torch.float16
    mix = weight.to(dtype)
    unmix = mix.t().contiguous()
    grad_q = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    grad_k = q.new_zeros(batch, heads, num_keys, dim, dtype=dtype)
    grad_v = q.new_zeros(batch, heads, num_keys, dim, dtype=dtype)
    grad_weight = q.new_zeros(heads, heads, dtype=dtype)
    # what flows into each entry of the centred map through the variance
    grad_dot_out = (grad.to(dtype) * out.to(dtype)).sum(dim=(2, 3), keepdim=True)
    through_variance = -(rstd.square()) * grad_dot_out / max(1, num_queries * num_keys)
    work = _Workspace(q, num_keys, tile, count=4)

    for images, rows, number in _spans(batch, num_queries, tile):
        q_tile = q[images, :, rows] * scale
        r_tile = rstd[images]
        # r must not meet G in float16, see above; elsewhere that saves two passes
        grad_tile = grad[images, :, rows].to(v.dtype if is_narrow else dtype)
        if not is_narrow:
            grad_tile = (grad_tile * r_tile).to(v.dtype)
        shape = q_tile.shape[:3]
        k_tile, v_tile = k[images], v[images]
        # images, h, rows, M
        scores, attn, centred, grad_attn = (work.tile(i, *shape) for i in range(4))
        _probabilities(q_tile, k_tile, mix, scores, out=attn)
        _bmm(grad_tile, v_tile.transpose(-2, -1), out=grad_attn)

        torch.sub(attn, 1.0 / num_keys, out=centred)
        if is_narrow:
            grad_attn.mul_(r_tile)
            centred.mul_(r_tile)
        if dropout_p > 0.0:
            mask = _dropout_mask(attn, dropout_p, seed + number)
            grad_attn.mul_(mask)
            centred.mul_(mask)
        _accumulate(grad_v, images, centred, grad_tile)

        torch.addcmul(grad_attn, attn, through_variance[images], out=grad_attn)
        # the gradient of the mixed scores overwrites that of the probabilities
        torch.ops.aten._softmax_backward_data.out(
            grad_attn, attn, -1, dtype, grad_input=grad_attn
        )
        grad_weight += torch.einsum(
            'bix,bjx->ij', grad_attn.flatten(2), scores.flatten(2)
        )
        # scores have served: their buffer takes their gradient
        grad_scores = _mix_heads(unmix, grad_attn, out=scores).to(q.dtype)
        grad_q[images, :, rows] = grad_scores @ (k_tile * scale)
        _accumulate(grad_k, images, grad_scores, q_tile)

    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_weight.to(weight.dtype)


# ---------------------------------------------------------------- the operator


def tiled_head_interaction_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: float,
    eps: float,
    dropout_p: float = 0.0,
    tile_rows: Optional[int] = None,
) -> Tensor:
    """The attention as an operator that autograd and compilers know.

    Arguments and result as in :func:`mmrest.ops.head_interaction_attention`, with
    ``weight`` of shape (h, h). It can be differentiated once.
    """
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(2**62, (), dtype=torch.int64, device='cpu')
    out, _ = _forward_op(q, k, v, weight, bias, scale, eps, dropout_p, seed, tile_rows)
    return out


@torch.library.custom_op('mmrest::head_interaction_attention', mutates_args=())
def _forward_op(
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
    with torch.autocast(q.device.type, enabled=False):
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
    with torch.autocast(q.device.type, enabled=False):
        return tiled_backward(
            grad, q, k, v, weight, out, rstd, scale, tile, dropout_p, _value(seed)
        )


def _value(seed: Optional[Tensor]) -> int:
    return 0 if seed is None else int(seed)


@_forward_op.register_fake
def _(q, k, v, weight, bias, scale, eps, dropout_p, seed, tile_rows):  # noqa: ANN001
    batch, heads, num_queries, dim = q.shape
    dtype = _accumulation_dtype(q.dtype)
    out = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, 1, 1, dtype=dtype)


@_backward_op.register_fake
def _(grad, q, k, v, weight, out, rstd, scale, dropout_p, seed, tile_rows):  # noqa: ANN001
    batch, heads, num_queries, dim = q.shape
    grad_q = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    return grad_q, *(t.new_empty(t.shape) for t in (k, v, weight))


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


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_refuse_second_order)
