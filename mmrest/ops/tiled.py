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

import math
import os
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

# Bytes of one tile's scores. Four tiles of this size (scores, probabilities and
# their gradients) are alive at once, so on a CPU they should stay within the
# last-level cache; a GPU wants work enough to fill it.
CPU_TILE_BYTES = 4 * 2**20
GPU_TILE_BYTES = 128 * 2**20
# Below this many rows a matrix product loses more speed than the cache gives.
MIN_ROWS = 64
# A tile is not cut into parts for threads that would have less than this to do.
MIN_PART_ROWS = 32
MIN_PART_BYTES = 2**19

# On a GPU, products with longer sums are cut into one for each row: cuBLAS gives such a
# sum to one multiprocessor, and took 12 ms for 9 million entries on an H200. With only
# a few keys in a row, the products would take more memory than the maps.
LONG_SUM = 2**20
MIN_ROW_KEYS = 64

# ---------------------------------------------------------------- tiles


class Tile(NamedTuple):
    """What of a batch of score maps is computed at once.

    On a CPU the rows of a large image are laid out in one part for each thread, as if
    parts were images: (parts, h, rows / parts, M) instead of (1, h, rows, M). Threads
    divide the first dimension among them, so that each takes all steps of its part.
    Otherwise a core waits for what another has just written: on some machines a tile
    takes half as long again.
    """

    images: int
    rows: int
    parts: int = 1


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
    dropout_p: float = 0.0,
) -> Tile:
    """Choose the tile for queries of shape (B, h, N, d) and ``num_keys`` keys.

    Whole images are taken together while they fit into :func:`tile_bytes`;
    otherwise one image is cut into equal tiles, as few as fit. A tile may always have
    ``MIN_ROWS`` rows.

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        num_keys (int): Number of keys M.
        tile_rows (int, optional): Query rows of a tile, instead of the number
            that follows from the memory budget.
        gpu_bytes (int): The memory budget on a GPU, see :func:`tile_bytes`.
        dropout_p (float): With dropout a tile has one part, so that its mask does
            not depend on the number of threads.

    Raises:
        ValueError: If ``tile_rows`` is not positive.
    """
    batch, heads, num_queries, _ = q.shape
    row_bytes = max(1, heads * num_keys * max(4, q.element_size()))
    if tile_rows is None:
        rows = max(MIN_ROWS, tile_bytes(q.device, gpu_bytes) // row_bytes)
        images = max(1, min(batch, rows // max(1, num_queries)))
        num_tiles = max(1, -(-num_queries // rows))
        rows = max(1, -(-num_queries // num_tiles))
    elif tile_rows < 1:
        raise ValueError(f'tile_rows must be at least 1, found {tile_rows}')
    else:
        images, rows = 1, tile_rows
    parts = torch.get_num_threads() if q.device.type == 'cpu' else 1
    if (
        images > 1
        or dropout_p > 0.0
        or rows < MIN_PART_ROWS * parts
        or rows * row_bytes < MIN_PART_BYTES * parts
    ):
        parts = 1
    return Tile(images=images, rows=-(-rows // parts) * parts, parts=parts)


def image_slices(batch: int, tile: Tile) -> Iterator[slice]:
    """The images of each tile."""
    for start in range(0, batch, tile.images):
        yield slice(start, min(start + tile.images, batch))


def row_slices(num_queries: int, tile: Tile) -> Iterator[tuple[slice, int]]:
    """The query rows of each tile of an image, and the parts they are laid out in.

    Rows at the end of an image that do not fill as many parts are a tile of their own.
    """
    start = 0
    while start < num_queries:
        length = min(tile.rows, num_queries - start)
        parts = tile.parts if length >= tile.parts else 1
        length -= length % parts
        yield slice(start, start + length), parts
        start += length


def to_parts(x: Tensor, parts: int) -> Tensor:
    """(images, h, rows, d) -> (images * parts, h, rows / parts, d).

    It is a view of a single image, and of tokens in the order (images, rows, h, d).
    """
    if parts == 1:
        return x
    return x.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)


def _for_each_part(x: Tensor, parts: int) -> Tensor:
    """(images, h, M, d) -> (images * parts, h, M, d), a copy for each part."""
    return x.repeat_interleave(parts, dim=0) if parts > 1 else x


def _sum_parts(x: Tensor, parts: int) -> Tensor:
    """(images * parts, ...) -> (images, ...)."""
    return x.unflatten(0, (-1, parts)).sum(1) if parts > 1 else x


class _Workspace:
    """Buffers of one tile, taken once and used for every tile of a pass."""

    def __init__(self, q: Tensor, num_keys: int, tile: Tile, count: int) -> None:
        self.num_keys = num_keys
        size = tile.images * q.shape[1] * tile.rows * num_keys
        dtype = _accumulation_dtype(q.dtype)
        self.buffers = [q.new_empty(size, dtype=dtype) for _ in range(count)]

    def tile(self, number: int, q_tile: Tensor) -> Tensor:
        """Buffer ``number`` as the maps of ``q_tile``, (images, h, rows, M)."""
        shape = (*q_tile.shape[:3], self.num_keys)
        return self.buffers[number][: math.prod(shape)].view(shape)


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


def _products_of_heads(a: Tensor, b: Tensor) -> Tensor:
    """``sum(a[:, i] * b[:, j])`` for each pair of heads, (h, h)."""
    rows, keys = a.shape[2:]
    if a.is_cuda and rows * keys >= LONG_SUM and keys >= MIN_ROW_KEYS:
        return _products_of_heads_by_rows(a, b)
    return torch.bmm(a.flatten(2), b.flatten(2).transpose(-2, -1)).sum(0)


def _products_of_heads_by_rows(a: Tensor, b: Tensor) -> Tensor:
    # images, h, rows, M -> rows, h, M and rows, M, h
    pairs = ((x.transpose(0, 1), y.permute(1, 2, 0)) for x, y in zip(a, b))
    return torch.stack([torch.bmm(*pair).sum(0) for pair in pairs]).sum(0)


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


def _accumulate(total: Tensor, maps: Tensor, tokens: Tensor) -> None:
    """``total += maps^T @ tokens``, or the first parts of ``total``."""
    target = total[: len(maps)].flatten(0, 1)
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

    for images in image_slices(batch, tile):
        k_parts, v_parts = (_for_each_part(x[images], tile.parts) for x in (k, v))
        for rows, parts in row_slices(num_queries, tile):
            # images * parts, h, rows / parts, d
            q_tile = to_parts(q[images, :, rows] * scale, parts)
            k_tile, v_tile = k_parts[: len(q_tile)], v_parts[: len(q_tile)]
            # images * parts, h, rows / parts, M
            scores, attn = (work.tile(i, q_tile) for i in range(2))
            _probabilities(q_tile, k_tile, weight, scores, out=attn)
            attn.sub_(1.0 / num_keys)
            squares = torch.linalg.vector_norm(attn.flatten(2), dim=-1).square()
            square_sum[images] += _sum_parts(squares, parts)
            if dropout_p > 0.0:
                number = images.start * num_queries + rows.start
                attn.mul_(_dropout_mask(attn, dropout_p, seed + number))
            product = torch.bmm(attn.flatten(0, 1).to(v.dtype), v_tile.flatten(0, 1))
            to_parts(out[images, :, rows], parts).copy_(product.view(q_tile.shape))

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
    grad_q = empty_output(q)
    grad_k, grad_v = (q.new_empty(batch, heads, num_keys, dim) for _ in range(2))
    grad_weight = q.new_zeros(heads, heads, dtype=dtype)
    # what flows into each entry of the centred map through the variance
    grad_dot_out = (grad.to(dtype) * out.to(dtype)).sum(dim=(2, 3), keepdim=True)
    through_variance = -(rstd.square()) * grad_dot_out / max(1, num_queries * num_keys)
    work = _Workspace(q, num_keys, tile, count=4)

    for images in image_slices(batch, tile):
        k_parts, v_parts = (_for_each_part(x[images], tile.parts) for x in (k, v))
        k_sum, v_sum = (k.new_zeros(k_parts.shape, dtype=dtype) for _ in range(2))
        for rows, parts in row_slices(num_queries, tile):
            # images * parts, h, rows / parts, d
            q_tile = to_parts(q[images, :, rows] * scale, parts)
            k_tile, v_tile = k_parts[: len(q_tile)], v_parts[: len(q_tile)]
            # r must not meet G in float16, see above; elsewhere that saves two passes
            grad_tile = grad[images, :, rows].to(v.dtype if is_narrow else dtype)
            if not is_narrow:
                grad_tile = (grad_tile * rstd[images]).to(v.dtype)
            grad_tile = to_parts(grad_tile, parts)
            # images * parts, h, rows / parts, M
            scores, attn, centred, grad_attn = (work.tile(i, q_tile) for i in range(4))
            _probabilities(q_tile, k_tile, mix, scores, out=attn)
            _bmm(grad_tile, v_tile.transpose(-2, -1), out=grad_attn)

            torch.sub(attn, 1.0 / num_keys, out=centred)
            if is_narrow:
                grad_attn.mul_(rstd[images])
                centred.mul_(rstd[images])
            if dropout_p > 0.0:
                number = images.start * num_queries + rows.start
                mask = _dropout_mask(attn, dropout_p, seed + number)
                grad_attn.mul_(mask)
                centred.mul_(mask)
            _accumulate(v_sum, centred, grad_tile)

            torch.addcmul(grad_attn, attn, through_variance[images], out=grad_attn)
            # the gradient of the mixed scores overwrites that of the probabilities
            torch.ops.aten._softmax_backward_data.out(
                grad_attn, attn, -1, dtype, grad_input=grad_attn
            )
            grad_weight += _products_of_heads(grad_attn, scores)
            # scores have served: their buffer takes their gradient
            grad_scores = _mix_heads(unmix, grad_attn, out=scores).to(q.dtype)
            product = torch.baddbmm(
                q.new_empty(1, 1, 1), grad_scores.flatten(0, 1), k_tile.flatten(0, 1),
                beta=0.0, alpha=scale,
            )  # fmt: skip
            to_parts(grad_q[images, :, rows], parts).copy_(product.view(q_tile.shape))
            _accumulate(k_sum, grad_scores, q_tile)
        grad_k[images] = _sum_parts(k_sum, tile.parts)
        grad_v[images] = _sum_parts(v_sum, tile.parts)

    return grad_q, grad_k, grad_v, grad_weight.to(weight.dtype)


# ---------------------------------------------------------------- operators
#
# What the operators of all implementations have in common, and that of this one.


def empty_output(q: Tensor) -> Tensor:
    """An output for queries (B, h, N, d), in the memory order (B, N, h, d)."""
    batch, heads, num_queries, dim = q.shape
    return q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple:
    """Gradients with the sizes and strides of those that a backward pass returns."""
    return empty_output(q), *(t.new_empty(t.shape) for t in (k, v, weight))


def zero_gradient(bias: Optional[Tensor]) -> Optional[Tensor]:
    """The gradient of the bias, which cancels in the softmax.

    It is 0, and not None: the parameter takes part in the computation, so
    DistributedDataParallel must not find it unused.
    """
    return None if bias is None else torch.zeros_like(bias)


def refuse_second_order(attention: str) -> Callable[..., None]:
    """Return the derivative of a backward pass: an error."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f'{attention} has no second-order gradients; build the model with '
            "attn_impl='dense' to differentiate twice"
        )

    return refuse


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
    tile = choose_tile(q, k.shape[2], tile_rows, dropout_p=dropout_p)
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
    tile = choose_tile(q, k.shape[2], tile_rows, dropout_p=dropout_p)
    with torch.autocast(q.device.type, enabled=False):
        return tiled_backward(
            grad, q, k, v, weight, out, rstd, scale, tile, dropout_p, _value(seed)
        )


def _value(seed: Optional[Tensor]) -> int:
    return 0 if seed is None else int(seed)


@_forward_op.register_fake
def _(q, k, v, weight, bias, scale, eps, dropout_p, seed, tile_rows):  # noqa: ANN001
    dtype = _accumulation_dtype(q.dtype)
    return empty_output(q), q.new_empty(*q.shape[:2], 1, 1, dtype=dtype)


@_backward_op.register_fake
def _(grad, q, k, v, weight, out, rstd, scale, dropout_p, seed, tile_rows):  # noqa: ANN001
    return empty_gradients(q, k, v, weight)


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
    return (*grads, zero_gradient(bias), None, None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(refuse_second_order('the tiled attention'))
