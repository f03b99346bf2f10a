r"""ResT's head-interaction attention with everything between its products fused.

The matrix products are PyTorch's. What lies between them is memory-bound, so it is
one Triton kernel in each direction. A program owns a few query rows with the score
rows of all h heads, which is all that mixing, softmax and statistics need. As in
:mod:`mmrest.ops.tiled`, whose derivation holds here, a tile of query rows exists at
a time, and no map is stored.

Forward, for a tile: ``S = s q k^T``, then the kernel replaces S by
``C = M p - 1``, where ``p = softmax(W S)``, and writes what the softmax needs again
and the sum of C^2, for each row and head. Then ``out = (r / M) C v``.
The entries of C are of order 1 where the attention is flat, so that half precision
resolves them; those of ``p - 1/M`` would not be.

Backward, for a tile: S again, ``T = G v^T``, then the kernel replaces S by C and T
by dS, and writes its share of dW. With ``c = -r^2 sum(G out) / (N M)``,

* ``dA = p (r T + c p - delta)``, where ``delta = sum_m p (r T + c p)`` of the row;
* ``dS = W^T dA`` and ``dW = dA S^T``;
* ``dv = (r / M) C^T G``, ``dq = s dS k``, ``dk = s dS^T q``.

The row's delta also follows from G and out without a look at the map. Here it is
summed over the same T and p that it is taken from, which are in the cache: half
precision rounds T, and r, up to 316, would multiply the difference wherever the
attention is concentrated on a few keys.

r multiplies nothing that half precision stores: only numbers in registers, and
``C v`` and ``C^T G`` after a factor of ``1 / sqrt(M)``, which keeps both no larger
than the results.

Every sum has a fixed order: results are the same in every run.

What bounds the time: in bfloat16, each entry of a map moves 8 bytes forward (S
written and read, C written and read; the kernel's second reading of S is from the
cache) and 18 backward (S and T written and read, C and dS written, C read once and
dS twice). ResT-Base at 800 x 1333 with two images has 387 million entries in stages
2 to 4: 10.1 GB, or 3.4 ms at 3 TB/s. The seven products are 520 GFLOP, 0.7 ms at
750 TFLOP/s, and a kernel's 30 to 70 instructions an entry fit beside its loads. A
form that keeps the tile on the chip as well would need the sums of all heads there,
h N d floats for N rows: 16 rows at a time in stage 4, which then reads all keys and
values from the L2 cache so often (9 GB forward alone) that nothing is won. Mixing
the queries instead of the scores, ``W S = [W_ij q_j] [k_j]^T``, avoids that at h
times the operations of ``q k^T``, and rounds the queries once more.
"""

import math
from types import SimpleNamespace
from typing import Any, Optional, no_type_check

import torch
from torch import Tensor

from .tiled import Tile, _spans, choose_tile

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without it
    HAS_TRITON = False
    tl = SimpleNamespace(constexpr=None)
else:
    HAS_TRITON = True

MIN_TRITON = (3, 4)
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# With more, the kernels want more registers than a thread has.
MAX_HEADS = 8
# Query rows of a program of the row kernels, which is as many warps: one row each.
ROWS = 4
# By itself, the assembler spills a register or two of some kernels, so that one more
# block fits on a multiprocessor.
PTX_OPTIONS = '--register-usage-level 3'
# Rows of the score tiles start at multiples of this many entries, so that loads are
# 16 bytes wide and the products find aligned operands.
ROW_ALIGNMENT = 16


def why_not(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Optional[str]:
    """Why these kernels cannot compute the attention; None if they can.

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        k (Tensor): Keys, of shape (B, h, M, d).
        v (Tensor): Values, of shape (B, h, M, d).
        dropout_p (float): Dropout on the normalised map. Default: 0.
    """
    problem = _device_problem(q.device.type, q.device.index)
    if problem is not None:
        return problem
    if q.dtype not in DTYPES:
        names = ', '.join(str(dtype).split('.')[-1] for dtype in DTYPES)
        return f'it supports {names}, found {str(q.dtype).split(".")[-1]}'
    if q.shape[1] > MAX_HEADS:
        return f'it supports up to {MAX_HEADS} heads, found {q.shape[1]}'
    if k.shape[2] == 0:
        return 'it needs at least one key'
    if dropout_p > 0.0:
        return f'it has no dropout, found dropout_p={dropout_p}'
    return None


def is_available() -> bool:
    """Whether the kernels can run on the current device."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return _device_problem(device, None) is None


def _device_problem(device: str, index: Optional[int]) -> Optional[str]:
    """Why the kernels cannot run on a device; None if they can."""
    if not HAS_TRITON:
        return 'Triton is not installed'
    if tuple(map(int, triton.__version__.split('.')[:2])) < MIN_TRITON:
        wanted = '.'.join(map(str, MIN_TRITON))
        return f'it needs Triton {wanted} or newer, found {triton.__version__}'
    # TRITON_INTERPRET=1 leaves no compiled functions: tests on a CPU
    if device == 'cpu' and not isinstance(forward_kernel, triton.JITFunction):
        return None
    if device != 'cuda' or torch.version.hip is not None:
        return f'it needs tensors on an NVIDIA GPU, found {device}'
    if not torch.cuda.is_available():
        return None  # fake tensors, of a device that is elsewhere
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        wanted, found = ('.'.join(map(str, c)) for c in (MIN_CAPABILITY, capability))
        return f'it needs compute capability {wanted} or newer, found {found}'
    return None


# A constant to compilers. torch.compiler.assume_constant_result sets the same mark, but
# imports the compiler, which changes the environment of the process.
_device_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_head_interaction_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    scale: float,
    eps: float,
    bias: Optional[Tensor] = None,
    tile_rows: Optional[int] = None,
) -> Tensor:
    """``InstanceNorm(softmax(Conv1x1(scale * q k^T))) v``, by Triton kernels.

    The caller asks :func:`why_not` first. There are no second-order gradients.

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        k (Tensor): Keys, of shape (B, h, M, d).
        v (Tensor): Values, of shape (B, h, M, d).
        weight (Tensor): What each head takes from each score map, (h, h).
        scale (float): Factor on the scores.
        eps (float): Added to the variance of a map.
        bias (Tensor, optional): Bias of the convolution. It cancels in the softmax,
            and its gradient is 0.
        tile_rows (int, optional): Query rows of a tile. Default: as for ``'tiled'``.

    Returns:
        Tensor: Of shape (B, h, N, d), in the memory order (B, N, h, d).
    """
    return _attention_op(q, k, v, weight, bias, scale, eps, tile_rows)[0]


# ---------------------------------------------------------------------------------
# Kernels
#
# Tensors of a block have shape (ROWS, KEYS), and a tuple holds one for each head.
# A warp has one row, a thread LANE neighbouring keys of it. Loops over heads are
# unrolled. Logarithms and exponentials have base 2: `weight` is W log2(e). Columns
# of a tile beyond the last key hold finite numbers, which no product reads.
# ---------------------------------------------------------------------------------


def _jit(function: Any) -> Any:
    if not HAS_TRITON:
        return function
    # sizes that differ between images must not compile a kernel again
    sizes = ('rows', 'num_keys', 'num_queries')
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function, do_not_specialize=[name for name in names if name in sizes]
    )


@_jit
@no_type_check
def _mix(weight, maps, i: tl.constexpr, HEADS: tl.constexpr):
    """``sum_j weight[i, j] maps[j]``."""
    total = tl.load(weight + i * HEADS) * maps[0]
    for j in tl.static_range(1, HEADS):
        total += tl.load(weight + i * HEADS + j) * maps[j]
    return total


@_jit
@no_type_check
def _load_maps(maps_at, step, block, mask, HEADS: tl.constexpr):
    """The blocks of all heads, in float32; 0 outside the mask."""
    maps = ()
    for j in tl.static_range(HEADS):
        values = tl.load(maps_at + j * step + block, mask=mask, other=0.0)
        maps = maps + (values.to(tl.float32),)
    return maps


@_jit
@no_type_check
def _fold(block, LANE: tl.constexpr):
    """Sums of the LANE neighbours that one thread holds, (ROWS, 32)."""
    return tl.sum(tl.reshape(block, (block.shape[0], 32, LANE)), axis=2)


@_jit
@no_type_check
def forward_kernel(
    scores,
    weight,
    statistics,
    rows,
    num_keys,
    row_stride,
    num_queries,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    LANE: tl.constexpr,
):
    """Replace S by C; write each row's statistics, of shape (3, HEADS).

    The maximum of W S, the inverse of the softmax's denominator, and what the row
    adds to M times the variance of the map.
    """
    KEYS: tl.constexpr = 32 * LANE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(1).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, KEYS)
    block = tl.arange(0, ROWS)[:, None] * row_stride + column[None, :]
    step = rows.to(tl.int64) * row_stride
    scores += image * HEADS * step + tl.program_id(0).to(tl.int64) * ROWS * row_stride

    top = ()
    total = ()
    for _ in tl.static_range(HEADS):
        top = top + (tl.full((ROWS,), float('-inf'), tl.float32),)
        total = total + (tl.zeros((ROWS, KEYS), tl.float32),)
    for first in range(0, num_keys, KEYS):
        valid = column[None, :] < num_keys - first
        mask = inside[:, None] & (column[None, :] < row_stride - first)
        maps = _load_maps(scores + first, step, block, mask, HEADS)
        new_top = ()
        new_total = ()
        for i in tl.static_range(HEADS):
            x = _mix(weight, maps, i, HEADS)
            x = tl.where(valid, x, float('-inf'))
            highest = tl.maximum(top[i], tl.max(x, axis=1))
            rescaled = total[i] * tl.exp2(top[i] - highest)[:, None]
            new_total = new_total + (rescaled + tl.exp2(x - highest[:, None]),)
            new_top = new_top + (highest,)
        top = new_top
        total = new_total

    inverse = ()
    squares = ()
    for i in tl.static_range(HEADS):
        inverse = inverse + (1.0 / tl.sum(total[i], axis=1),)
        squares = squares + (tl.zeros((ROWS, 32), tl.float32),)
    # every thread has read what another may now overwrite
    tl.debug_barrier()
    for first in range(0, num_keys, KEYS):
        valid = column[None, :] < num_keys - first
        mask = inside[:, None] & (column[None, :] < row_stride - first)
        maps = _load_maps(scores + first, step, block, mask, HEADS)
        new_squares = ()
        for i in tl.static_range(HEADS):
            x = _mix(weight, maps, i, HEADS) - top[i][:, None]
            factor = inverse[i][:, None] * num_keys
            centred = tl.where(valid, tl.exp2(x) * factor - 1.0, 0.0)
            pointers = scores + first + i * step + block
            tl.store(pointers, centred.to(scores.dtype.element_ty), mask=mask)
            part = _fold(centred * centred, LANE)
            new_squares = new_squares + (squares[i] + part,)
        squares = new_squares
    # one store for all: each thread of a row writes one number
    index = tl.arange(0, 32)[None, :]
    value = tl.zeros((ROWS, 32), tl.float32)
    for i in tl.static_range(HEADS):
        variance = tl.sum(squares[i], 1) / num_queries / num_keys / num_keys
        value = tl.where(index == i, top[i][:, None], value)
        value = tl.where(index == HEADS + i, inverse[i][:, None], value)
        value = tl.where(index == 2 * HEADS + i, variance[:, None], value)
    out = statistics + (image * num_queries + row[:, None]) * (3 * HEADS) + index
    tl.store(out, value, mask=inside[:, None] & (index < 3 * HEADS))


@_jit
@no_type_check
def backward_kernel(
    scores,
    grads,
    weight,
    statistics,
    gain,
    grad_dot_out,
    grad_weight,
    rows,
    num_keys,
    row_stride,
    num_queries,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    LANE: tl.constexpr,
):
    """Replace S by C and T by dS; write what each query row adds to dW."""
    KEYS: tl.constexpr = 32 * LANE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(1).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, KEYS)
    block = tl.arange(0, ROWS)[:, None] * row_stride + column[None, :]
    step = rows.to(tl.int64) * row_stride
    place = image * HEADS * step + tl.program_id(0).to(tl.int64) * ROWS * row_stride
    scores += place
    grads += place
    own = statistics + (image * num_queries + row) * (3 * HEADS)

    top = ()
    inverse = ()
    r = ()
    c = ()
    grad_mean = ()
    square_sum = ()
    for i in tl.static_range(HEADS):
        top = top + (tl.load(own + i, mask=inside, other=0.0),)
        inverse = inverse + (tl.load(own + HEADS + i, mask=inside, other=0.0),)
        gain_i = tl.load(gain + image * HEADS + i)
        flow = tl.load(grad_dot_out + image * HEADS + i)
        # ln 2 makes up for the log2(e) in the weights that give dS
        r = r + (gain_i * tl.sqrt(num_keys.to(tl.float32)) * 0.6931471805599453,)
        c = c + (-gain_i * gain_i * flow / num_queries * 0.6931471805599453,)
        grad_mean = grad_mean + (tl.zeros((ROWS, 32), tl.float32),)
        square_sum = square_sum + (tl.zeros((ROWS, 32), tl.float32),)

    for first in range(0, num_keys, KEYS):
        valid = column[None, :] < num_keys - first
        mask = inside[:, None] & (column[None, :] < row_stride - first)
        maps = _load_maps(scores + first, step, block, mask, HEADS)
        new_mean = ()
        new_square = ()
        for i in tl.static_range(HEADS):
            x = _mix(weight, maps, i, HEADS) - top[i][:, None]
            p = tl.where(valid, tl.exp2(x), 0.0) * inverse[i][:, None]
            t = tl.load(grads + first + i * step + block, mask=mask, other=0.0)
            part = _fold(p * t.to(tl.float32), LANE)
            new_mean = new_mean + (grad_mean[i] + part,)
            new_square = new_square + (square_sum[i] + _fold(p * p, LANE),)
        grad_mean = new_mean
        square_sum = new_square

    delta = ()
    for i in tl.static_range(HEADS):
        mean = tl.sum(grad_mean[i], axis=1)
        delta = delta + (r[i] * mean + c[i] * tl.sum(square_sum[i], axis=1),)
    weight_sums = ()
    for _ in tl.static_range(HEADS * HEADS):
        weight_sums = weight_sums + (tl.zeros((ROWS, 32), tl.float32),)
    # every thread has read what another may now overwrite
    tl.debug_barrier()
    for first in range(0, num_keys, KEYS):
        valid = column[None, :] < num_keys - first
        mask = inside[:, None] & (column[None, :] < row_stride - first)
        maps = _load_maps(scores + first, step, block, mask, HEADS)
        grad_maps = ()
        for _ in tl.static_range(HEADS):
            grad_maps = grad_maps + (tl.zeros((ROWS, KEYS), tl.float32),)
        new_sums = ()
        for i in tl.static_range(HEADS):
            x = _mix(weight, maps, i, HEADS) - top[i][:, None]
            p = tl.where(valid, tl.exp2(x), 0.0) * inverse[i][:, None]
            t = tl.load(grads + first + i * step + block, mask=mask, other=0.0)
            grad = p * (r[i] * t.to(tl.float32) + c[i] * p - delta[i][:, None])
            centred = (p * num_keys - 1.0).to(scores.dtype.element_ty)
            tl.store(scores + first + i * step + block, centred, mask=mask)
            new_maps = ()
            for j in tl.static_range(HEADS):
                part = _fold(grad * maps[j], LANE)
                new_sums = new_sums + (weight_sums[i * HEADS + j] + part,)
                w = tl.load(weight + i * HEADS + j)
                new_maps = new_maps + (grad_maps[j] + w * grad,)
            grad_maps = new_maps
        weight_sums = new_sums
        for j in tl.static_range(HEADS):
            tl.store(
                grads + first + j * step + block,
                grad_maps[j].to(grads.dtype.element_ty),
                mask=mask,
            )

    # one store for 32 entries of dW, one a thread
    COUNT: tl.constexpr = HEADS * HEADS
    entry = tl.arange(0, 32)[None, :]
    share = grad_weight + (image * rows + row[:, None]) * COUNT
    for start in tl.static_range(0, COUNT, 32):
        sum_of = tl.zeros((ROWS, 32), tl.float32)
        for index in tl.static_range(32):
            if start + index < COUNT:
                value = tl.sum(weight_sums[start + index], axis=1)[:, None]
                sum_of = tl.where(entry == index, value, sum_of)
        # in units of ln 2, as r and c are
        mask = inside[:, None] & (start + entry < COUNT)
        tl.store(share + start + entry, sum_of * 1.4426950408889634, mask=mask)


@_jit
@no_type_check
def dot_kernel(
    a,
    b,
    sums,
    num_queries,
    a_image,
    a_head,
    a_row,
    b_image,
    b_head,
    b_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of ``a * b`` over blocks of rows of each head, in float32."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    mask = (row < num_queries) & (column < DIM)
    a = a + image * a_image + head * a_head + row * a_row + column
    b = b + image * b_image + head * b_head + row * b_row + column
    product = tl.load(a, mask=mask, other=0.0).to(tl.float32)
    product = product * tl.load(b, mask=mask, other=0.0).to(tl.float32)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + program, tl.sum(tl.sum(product, axis=1), axis=0))


def choose_lane(heads: int, itemsize: int) -> int:
    """Neighbouring keys that a thread loads at once.

    16 bytes, or half of that where 8 scores and 8 gradients a key fill the registers.
    """
    return min(16 // itemsize, 8 if heads <= 4 else 4)


# ---------------------------------------------------------------------------------
# Forward and backward
# ---------------------------------------------------------------------------------


class _Work:
    """Score tiles with aligned rows, taken once and used for every tile of a pass."""

    def __init__(self, q: Tensor, num_keys: int, tile: Tile, count: int) -> None:
        self.num_keys = num_keys
        self.row_stride = -(-num_keys // ROW_ALIGNMENT) * ROW_ALIGNMENT
        length = min(tile.images, q.shape[0]) * q.shape[1]
        length *= min(tile.rows, q.shape[2])
        self.rows = q.new_empty(count, length, self.row_stride)
        if self.row_stride > num_keys:
            self.rows[..., num_keys:].zero_()

    def tile(self, number: int, maps: int, rows: int) -> Tensor:
        """Buffer ``number`` as a tensor of shape (maps, rows, M)."""
        tile = self.rows[number, : maps * rows].view(maps, rows, self.row_stride)
        return tile[..., : self.num_keys]


def _multiply(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> Tensor:
    """``out = factor * a @ b``; the factor meets the sums before they are rounded."""
    return out.baddbmm_(a, b, beta=0.0, alpha=factor)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    scale: float,
    eps: float,
    tile_rows: Optional[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the statistics (B, N, 3, h), and r / sqrt(M) (B, h, 1, 1)."""
    batch, heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    out = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    statistics = q.new_empty(batch, num_queries, 3, heads, dtype=torch.float32)
    mix = weight.contiguous().float() * math.log2(math.e)
    tile = choose_tile(q, num_keys, tile_rows)
    work = _Work(q, num_keys, tile, count=1)

    for images, rows, _ in _spans(batch, num_queries, tile):
        q_tile = q[images, :, rows]
        count, _, length, _ = q_tile.shape
        k_tile, v_tile = k[images].flatten(0, 1), v[images].flatten(0, 1)
        maps = work.tile(0, count * heads, length)
        _multiply(q_tile.flatten(0, 1), k_tile.mT, out=maps, factor=scale)
        forward_kernel[(triton.cdiv(length, ROWS), count)](
            maps, mix, statistics[images, rows],
            length, num_keys, work.row_stride, num_queries,
            HEADS=heads, ROWS=ROWS, LANE=choose_lane(heads, q.element_size()),
            num_warps=ROWS, ptx_options=PTX_OPTIONS,
        )  # fmt: skip
        product = q.new_empty(count * heads, length, dim)
        _multiply(maps, v_tile, out=product, factor=num_keys**-0.5)
        out[images, :, rows] = product.unflatten(0, (count, heads))

    gain = statistics[:, :, 2].sum(1).add_(eps * num_keys).rsqrt_()[..., None, None]
    return out.mul_(gain), statistics, gain


def _differentiate(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    out: Tensor,
    statistics: Tensor,
    gain: Tensor,
    scale: float,
    tile_rows: Optional[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and weight, from tiles that are computed again."""
    batch, heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    mix = weight.contiguous().float() * math.log2(math.e)
    grad_dot_out = _dot(grad, out)
    tile = choose_tile(q, num_keys, tile_rows)
    work = _Work(q, num_keys, tile, count=2)
    grad_q = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    # sums over several tiles are not rounded to half precision in between
    dtype = q.dtype if tile.rows >= num_queries else torch.float32
    grad_k = q.new_empty(batch, heads, num_keys, dim, dtype=dtype)
    grad_v = torch.empty_like(grad_k)
    shares = []

    for images, rows, _ in _spans(batch, num_queries, tile):
        q_tile = q[images, :, rows]
        count, _, length, _ = q_tile.shape
        k_tile, v_tile = k[images].flatten(0, 1), v[images].flatten(0, 1)
        q_tile, grad_tile = q_tile.flatten(0, 1), grad[images, :, rows].flatten(0, 1)
        maps, grad_maps = (work.tile(i, count * heads, length) for i in range(2))
        _multiply(q_tile, k_tile.mT, out=maps, factor=scale)
        _multiply(grad_tile, v_tile.mT, out=grad_maps)
        grid = (triton.cdiv(length, ROWS), count)
        share = q.new_empty(count * length, heads, heads, dtype=torch.float32)
        backward_kernel[grid](
            maps, grad_maps, mix, statistics[images, rows], gain[images],
            grad_dot_out[images], share,
            length, num_keys, work.row_stride, num_queries,
            HEADS=heads, ROWS=ROWS, LANE=choose_lane(heads, q.element_size()),
            num_warps=ROWS, ptx_options=PTX_OPTIONS,
        )  # fmt: skip
        shares.append(share.sum(0))
        product = q.new_empty(count * heads, length, dim)
        _multiply(grad_maps, k_tile, out=product, factor=scale)
        grad_q[images, :, rows] = product.unflatten(0, (count, heads))
        first = rows.start == 0
        _accumulate(grad_k[images], grad_maps, q_tile, scale, first)
        _accumulate(grad_v[images], maps, grad_tile, num_keys**-0.5, first)

    grad_v.mul_(gain)
    if len(shares) == 1:
        grad_weight = shares[0]
    else:
        grad_weight = torch.stack([torch.zeros_like(mix), *shares]).sum(0)
    return grad_q, grad_k.to(q.dtype), grad_v.to(q.dtype), grad_weight.to(weight.dtype)


def _accumulate(
    total: Tensor, maps: Tensor, tokens: Tensor, factor: float, first: bool
) -> None:
    """``total += factor * maps^T @ tokens``, or ``=`` for the first tile.

    ``total`` has shape (B, h, M, d). It is small and the sums are long: parts of the
    rows are products of their own, so that all of a GPU has work.
    """
    count, length, num_keys = maps.shape
    wanted = max(1, 256 // (count * -(-num_keys // 128)))
    wanted = min(wanted, max(1, length // 128))
    parts = math.gcd(length, 2 ** int(math.log2(wanted)))
    maps = maps.unflatten(1, (parts, -1)).flatten(0, 1)
    tokens = tokens.unflatten(1, (parts, -1)).flatten(0, 1)
    if parts == 1 and total.dtype == tokens.dtype:
        beta = 0.0 if first else 1.0
        total.flatten(0, 1).baddbmm_(maps.mT, tokens, beta=beta, alpha=factor)
        return
    product = tokens.new_empty(count * parts, num_keys, tokens.shape[-1])
    _multiply(maps.mT, tokens, out=product, factor=factor)
    product = product.unflatten(0, (*total.shape[:2], parts))
    product = product.sum(2, dtype=torch.float32)
    if first:
        total.copy_(product)
    else:
        total.add_(product)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum(a * b)`` of each head, of shape (B, h), in float32."""
    batch, heads, num_queries, dim = a.shape
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    columns = triton.next_power_of_2(dim)
    rows = max(1, 4096 // columns)
    blocks = triton.cdiv(num_queries, rows)
    sums = a.new_empty(batch, heads, blocks, dtype=torch.float32)
    if sums.numel():
        dot_kernel[(blocks, batch * heads)](
            a, b, sums, num_queries, *a.stride()[:3], *b.stride()[:3],
            HEADS=heads, DIM=dim, ROWS=rows, COLUMNS=columns,
        )  # fmt: skip
    return sums.sum(-1)


# ---------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------


class _On:
    """The tensor's device, for launches, and no autocast."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = torch.cuda.device_of(tensor)
        self.autocast = torch.autocast(tensor.device.type, enabled=False)

    def __enter__(self) -> None:
        self.device.__enter__()
        self.autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.autocast.__exit__(*error)
        self.device.__exit__(*error)


@torch.library.custom_op('mmrest::triton_head_interaction_attention', mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: float,
    eps: float,
    tile_rows: Optional[int],
) -> tuple[Tensor, Tensor, Tensor]:
    with _On(q):
        return _attend(q, k, v, weight, scale, eps, tile_rows)


@torch.library.custom_op(
    'mmrest::triton_head_interaction_attention_backward', mutates_args=()
)
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    out: Tensor,
    statistics: Tensor,
    gain: Tensor,
    scale: float,
    tile_rows: Optional[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _On(q):
        return _differentiate(
            grad, q, k, v, weight, out, statistics, gain, scale, tile_rows
        )


@_attention_op.register_fake
def _(q, k, v, weight, bias, scale, eps, tile_rows):
    batch, heads, num_queries, dim = q.shape
    out = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    statistics = q.new_empty(batch, num_queries, 3, heads, dtype=torch.float32)
    return out, statistics, q.new_empty(batch, heads, 1, 1, dtype=torch.float32)


@_backward_op.register_fake
def _(grad, q, k, v, weight, out, statistics, gain, scale, tile_rows):
    batch, heads, num_queries, dim = q.shape
    grad_q = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    return (
        grad_q,
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, weight, bias, scale, _, tile_rows = inputs
    out, statistics, gain = output
    ctx.save_for_backward(q, k, v, weight, bias, out, statistics, gain)
    ctx.scale, ctx.tile_rows = scale, tile_rows
    ctx.mark_non_differentiable(statistics, gain)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Optional[Tensor], ...]:
    q, k, v, weight, bias, out, statistics, gain = ctx.saved_tensors
    grads = _backward_op(
        grad, q, k, v, weight, out, statistics, gain, ctx.scale, ctx.tile_rows
    )
    # exactly 0, and not None: the parameter takes part in the computation, so
    # DistributedDataParallel must not find it unused
    grad_bias = None if bias is None else torch.zeros_like(bias)
    return (*grads, grad_bias, None, None, None)


def _refuse_second_order(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "attn_impl='triton' has no second-order gradients; build the model with "
        "attn_impl='dense' to differentiate twice"
    )


_attention_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_refuse_second_order)
