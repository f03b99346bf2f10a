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

A small stage's kernels take less time than Python needs to start them one by one. So
one kernel copies q, k and v to where the products want them (heads apart, rows padded
with zeros), and one brings the results back, with their factors and sums of parts. In
eager mode the operator's registration is left out.

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

import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional, no_type_check

import torch
from torch import Tensor

from .tiled import Tile, choose_tile, image_slices, row_slices

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without it
    HAS_TRITON = False
    TRITON_VERSION: tuple[int, ...] = (0, 0)
    tl = SimpleNamespace(constexpr=None)
else:
    HAS_TRITON = True
    TRITON_VERSION = tuple(map(int, triton.__version__.split('.')[:2]))

MIN_TRITON = (3, 4)
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# With more, the kernels want more registers than a thread has.
MAX_HEADS = 8
# Query rows of a program of the row kernels, which is as many warps: one row each.
ROWS = 4
# By itself (level 5), the assembler spills a register or two of some kernels, so that
# one more block fits on a multiprocessor. That of Triton 3.8 does so at level 3, too.
PTX_OPTIONS = f'--register-usage-level {3 if TRITON_VERSION < (3, 8) else 6}'
# Bytes of one tile's scores in float32; two tiles are alive in the backward pass. At
# this size, a launch has work for longer than the next one takes to prepare.
GPU_TILE_BYTES = 512 * 2**20
# Keys and queries are padded with zeros to multiples of these, so that loads are 16
# bytes wide, and each size and stride of a product suits the fast kernels of cuBLAS:
# at 1050 keys it takes one for operands of any alignment, at half the speed.
KEY_ALIGNMENT = 16
QUERY_ALIGNMENT = 32


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
    if torch.cuda.is_available():
        return _device_problem('cuda', torch.cuda.current_device()) is None
    return _device_problem('cpu', None) is None


def _device_problem(device: str, index: Optional[int]) -> Optional[str]:
    """Why the kernels cannot run on a device; None if they can."""
    return _find_device_problem(device, index)


@functools.cache
def _find_device_problem(device: str, index: Optional[int]) -> Optional[str]:
    if not HAS_TRITON:
        return 'Triton is not installed'
    if TRITON_VERSION < MIN_TRITON:
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
        tile_rows (int, optional): Query rows of a tile. Default: what 512 MiB of
            scores in float32 hold, or ``MMREST_TILE_BYTES`` of them.

    Returns:
        Tensor: Of shape (B, h, N, d), in the memory order (B, N, h, d).
    """
    # the operator costs more time than a small stage's kernels; compilers, fake
    # tensors and modes that watch or replace operators need it
    is_plain = type(q) in (Tensor, torch.nn.Parameter)
    if (
        torch.compiler.is_compiling()
        or not is_plain
        or torch._C._len_torch_dispatch_stack()
    ):
        return _attention_op(q, k, v, weight, bias, scale, eps, tile_rows)[0]
    return _Attention.apply(q, k, v, weight, bias, scale, eps, tile_rows)


# ---------------------------------------------------------------------------------
# Kernels
#
# Tensors of a block have shape (ROWS, KEYS), and a tuple holds one for each head.
# A warp has one row, a thread LANE neighbouring keys of it. Loops over heads are
# unrolled. Logarithms and exponentials have base 2: `weight` is W log2(e). Columns
# of a tile beyond the last key meet zeros in the products, or give rows that nothing
# reads.
# ---------------------------------------------------------------------------------


def _jit(function: Any) -> Any:
    if not HAS_TRITON:
        return function
    # sizes that differ between images must not compile a kernel again
    sizes = ('rows', 'num_keys', 'num_queries', 'length', 'parts')
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
    length,
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
    step = length.to(tl.int64) * row_stride
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
    length,
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
    step = length.to(tl.int64) * row_stride
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
            e = tl.where(valid, tl.exp2(x), 0.0)
            # to the last bit as in the forward pass
            centred = e * (inverse[i] * num_keys)[:, None] - 1.0
            centred = centred.to(scores.dtype.element_ty)
            tl.store(scores + first + i * step + block, centred, mask=mask)
            p = e * inverse[i][:, None]
            t = tl.load(grads + first + i * step + block, mask=mask, other=0.0)
            grad = p * (r[i] * t.to(tl.float32) + c[i] * p - delta[i][:, None])
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
    share = grad_weight + (image * num_queries + row[:, None]) * COUNT
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
def _pack(
    source, target, rows, padded, image, head, row, column,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy a block of a head's rows to (B, h, padded, d); 0 beyond the last row.

    The numbers ``image`` to ``column`` are the strides of ``source``.
    """
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    d = tl.arange(0, COLUMNS)[None, :]
    pair = tl.program_id(1).to(tl.int64)
    source += pair // HEADS * image + pair % HEADS * head
    values = tl.load(
        source + n * row + d * column, mask=(n < rows) & (d < DIM), other=0.0
    )
    tl.store(
        target + (pair * padded + n) * DIM + d, values, mask=(n < padded) & (d < DIM)
    )
    return values


@_jit
@no_type_check
def pack_kernel(
    q, k, v, weight, q_packed, k_packed, v_packed, mix,
    num_queries, num_keys, padded_queries, padded_keys,
    q_image, q_head, q_row, q_column,
    k_image, k_head, k_row, k_column,
    v_image, v_head, v_row, v_column,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy q, k and v to (B, h, padded rows, d); write ``weight * log2(e)``."""
    kind = tl.program_id(2)
    if kind == 0:
        _pack(
            q, q_packed, num_queries, padded_queries, q_image, q_head, q_row, q_column,
            HEADS, DIM, ROWS, COLUMNS,
        )  # fmt: skip
        entry = tl.arange(0, 64)
        mask = (entry < HEADS * HEADS) & (tl.program_id(0) + tl.program_id(1) == 0)
        values = tl.load(weight + entry, mask=mask, other=0.0).to(tl.float32)
        tl.store(mix + entry, values * 1.4426950408889634, mask=mask)
    if kind == 1:
        _pack(
            k, k_packed, num_keys, padded_keys, k_image, k_head, k_row, k_column,
            HEADS, DIM, ROWS, COLUMNS,
        )  # fmt: skip
    if kind == 2:
        _pack(
            v, v_packed, num_keys, padded_keys, v_image, v_head, v_row, v_column,
            HEADS, DIM, ROWS, COLUMNS,
        )  # fmt: skip


@_jit
@no_type_check
def grad_kernel(
    grad, out, grad_packed, sums,
    num_queries, padded_queries,
    grad_image, grad_head, grad_row, grad_column,
    out_image, out_head, out_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy G to (B, h, padded rows, d); sum ``G * out`` over blocks of its rows."""
    values = _pack(
        grad, grad_packed, num_queries, padded_queries,
        grad_image, grad_head, grad_row, grad_column,
        HEADS, DIM, ROWS, COLUMNS,
    )  # fmt: skip
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    d = tl.arange(0, COLUMNS)[None, :]
    pair = tl.program_id(1).to(tl.int64)
    out += pair // HEADS * out_image + pair % HEADS * out_head + n * out_row + d
    other = tl.load(out, mask=(n < num_queries) & (d < DIM), other=0.0)
    product = values.to(tl.float32) * other.to(tl.float32)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + program, tl.sum(tl.sum(product, axis=1), axis=0))


@_jit
@no_type_check
def gain_kernel(
    statistics, gain, num_queries, num_keys, eps,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``r / sqrt(M)`` of a head, from what its rows add to M times the variance."""
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    row = tl.arange(0, BLOCK)
    statistics += image * num_queries * (3 * HEADS) + 2 * HEADS + head
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_queries, BLOCK):
        pointers = statistics + (first + row).to(tl.int64) * (3 * HEADS)
        total += tl.load(pointers, mask=row < num_queries - first, other=0.0)
    variance = tl.sum(total, axis=0) + eps * num_keys.to(tl.float32)
    tl.store(gain + tl.program_id(0), 1.0 / tl.sqrt(variance))


@_jit
@no_type_check
def _unpack(
    source, target, factor, rows, padded, parts, image, head, row,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``target = factor * sum of the parts`` of ``source``, (B, h, parts, padded, d).

    The numbers ``image`` to ``row`` are the strides of ``target``.
    """
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    d = tl.arange(0, COLUMNS)[None, :]
    mask = (n < rows) & (d < DIM)
    pair = tl.program_id(1).to(tl.int64)
    source += (pair * parts * padded + n) * DIM + d
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in range(0, parts):
        values = tl.load(source + part * padded * DIM, mask=mask, other=0.0)
        total += values.to(tl.float32)
    target += pair // HEADS * image + pair % HEADS * head + n * row + d
    tl.store(target, (total * factor).to(target.dtype.element_ty), mask=mask)


@_jit
@no_type_check
def out_kernel(
    product, gain, out, num_queries, padded_queries, parts,
    out_image, out_head, out_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The output, from ``C v / sqrt(M)`` and ``r / sqrt(M)``."""
    factor = tl.load(gain + tl.program_id(1))
    _unpack(
        product, out, factor, num_queries, padded_queries, parts,
        out_image, out_head, out_row, HEADS, DIM, ROWS, COLUMNS,
    )  # fmt: skip


@_jit
@no_type_check
def unpack_kernel(
    q_sums, k_sums, v_sums, gain, grad_q, grad_k, grad_v,
    num_queries, num_keys, padded_queries, padded_keys, parts,
    q_image, q_head, q_row, k_image, k_head, k_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and v from what the products left."""
    kind = tl.program_id(2)
    if kind == 0:
        _unpack(
            q_sums, grad_q, 1.0, num_queries, padded_queries, 1,
            q_image, q_head, q_row, HEADS, DIM, ROWS, COLUMNS,
        )  # fmt: skip
    if kind == 1:
        _unpack(
            k_sums, grad_k, 1.0, num_keys, padded_keys, parts,
            k_image, k_head, k_row, HEADS, DIM, ROWS, COLUMNS,
        )  # fmt: skip
    if kind == 2:
        factor = tl.load(gain + tl.program_id(1))
        _unpack(
            v_sums, grad_v, factor, num_keys, padded_keys, parts,
            k_image, k_head, k_row, HEADS, DIM, ROWS, COLUMNS,
        )  # fmt: skip


def choose_lane(heads: int, itemsize: int) -> int:
    """Neighbouring keys that a thread loads at once.

    16 bytes, or half of that where 8 scores and 8 gradients a key fill the registers.
    """
    return min(16 // itemsize, 8 if heads <= 4 else 4)


# ---------------------------------------------------------------------------------
# Forward and backward
# ---------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A tile: its images, its query rows with the padding, and rows without it."""

    images: slice
    rows: slice
    length: int
    valid: int
    is_all: bool

    def keys(self, x: Tensor) -> Tensor:
        """What the tile takes of keys or values, (maps, M, d)."""
        return (x if self.is_all else x[self.images]).flatten(0, 1)

    def queries(self, x: Tensor) -> Tensor:
        """What the tile takes of queries, (maps, rows, d)."""
        return (x if self.is_all else x[self.images, :, self.rows]).flatten(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """What the tile takes of a tensor of shape (B, N, ...)."""
        return x if self.is_all else x[self.images, self.rows]


class _Operands:
    """Queries, keys and values with padded rows, (B, h, rows, d), and the tiles."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, tile_rows: Optional[int]
    ) -> None:
        self.batch, self.heads, self.num_queries, self.dim = q.shape
        self.num_keys = k.shape[2]
        self.padded_queries = _round_up(self.num_queries, QUERY_ALIGNMENT)
        self.padded_keys = _round_up(self.num_keys, KEY_ALIGNMENT)
        columns = 1 << (self.dim - 1).bit_length()
        # of the kernels that copy
        self.options = dict(
            HEADS=self.heads, DIM=self.dim,
            ROWS=max(1, 4096 // columns), COLUMNS=columns,
        )  # fmt: skip
        self.query_blocks = _divide_up(self.padded_queries, self.options['ROWS'])
        self.blocks = _divide_up(
            max(self.padded_queries, self.padded_keys), self.options['ROWS']
        )
        # of the kernels of score rows
        self.row_options = dict(
            HEADS=self.heads, ROWS=ROWS, LANE=choose_lane(self.heads, q.element_size()),
            num_warps=ROWS, ptx_options=PTX_OPTIONS,
        )  # fmt: skip
        pairs = self.batch, self.heads
        self.q = q.new_empty(*pairs, self.padded_queries, self.dim)
        self.k = q.new_empty(*pairs, self.padded_keys, self.dim)
        self.v = q.new_empty(*pairs, self.padded_keys, self.dim)
        self.mix = q.new_empty(self.heads, self.heads, dtype=torch.float32)
        pack_kernel[(self.blocks, self.batch * self.heads, 3)](
            q, k, v, weight.contiguous(), self.q, self.k, self.v, self.mix,
            self.num_queries, self.num_keys, self.padded_queries, self.padded_keys,
            *q.stride(), *k.stride(), *v.stride(), **self.options,
        )  # fmt: skip
        tile = choose_tile(q, self.num_keys, tile_rows, GPU_TILE_BYTES)
        if tile_rows is None:
            tile = Tile(tile.images, _round_up(tile.rows, QUERY_ALIGNMENT))
        self.tile = Tile(
            min(tile.images, self.batch), min(tile.rows, self.padded_queries)
        )

    def new_maps(self) -> Tensor:
        """The buffer of a tile's scores, used for every tile of a pass."""
        # the last tile takes the padding, too
        rows = self.tile.rows + self.padded_queries - self.num_queries
        rows = min(rows, self.padded_queries)
        return self.q.new_empty(self.tile.images * self.heads * rows, self.padded_keys)

    def maps_of(self, buffer: Tensor, part: _Part) -> Tensor:
        """The tile's scores, (maps, rows, padded keys)."""
        maps = (part.images.stop - part.images.start) * self.heads
        if not part.is_all:
            buffer = buffer[: maps * part.length]
        return buffer.view(maps, part.length, self.padded_keys)

    def parts(self) -> Iterator[_Part]:
        for images in image_slices(self.batch, self.tile):
            for rows, _ in row_slices(self.num_queries, self.tile):
                is_last = rows.stop == self.num_queries
                stop = self.padded_queries if is_last else rows.stop
                length = stop - rows.start
                count = images.stop - images.start
                is_all = count == self.batch and length == self.padded_queries
                valid = rows.stop - rows.start
                yield _Part(images, slice(rows.start, stop), length, valid, is_all)


# Triton's own cdiv and next_power_of_2 take microseconds
def _divide_up(size: int, by: int) -> int:
    return -(-size // by)


def _round_up(size: int, multiple: int) -> int:
    return _divide_up(size, multiple) * multiple


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
    out = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    statistics = q.new_empty(batch, num_queries, 3, heads, dtype=torch.float32)
    gain = q.new_empty(batch, heads, 1, 1, dtype=torch.float32)
    if not q.numel():
        return out, statistics, gain.zero_()
    x = _Operands(q, k, v, weight, tile_rows)
    buffer = x.new_maps()
    product = torch.empty_like(x.q)

    for part in x.parts():
        maps = x.maps_of(buffer, part)
        _multiply(part.queries(x.q), part.keys(x.k).mT, out=maps, factor=scale)
        forward_kernel[(_divide_up(part.valid, ROWS), len(maps) // heads)](
            maps, x.mix, part.tokens(statistics),
            part.valid, part.length, x.num_keys, x.padded_keys, num_queries,
            **x.row_options,
        )  # fmt: skip
        # a tile of one image or of all rows: the result is a view of `product`
        target, values = part.queries(product), part.keys(x.v)
        _multiply(maps, values, out=target, factor=x.num_keys**-0.5)

    gain_kernel[(batch * heads,)](
        statistics, gain, num_queries, x.num_keys, eps,
        HEADS=heads, BLOCK=4096, num_warps=16,
    )  # fmt: skip
    out_kernel[(x.query_blocks, batch * heads)](
        product, gain, out, num_queries, x.padded_queries, 1,
        *out.stride()[:3], **x.options,
    )  # fmt: skip
    return out, statistics, gain


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
    grad_q = q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
    grad_k = k.new_empty(k.shape)
    grad_v = v.new_empty(v.shape)
    if not q.numel():
        return grad_q, grad_k.zero_(), grad_v.zero_(), torch.zeros_like(weight)
    x = _Operands(q, k, v, weight, tile_rows)
    packed = torch.empty_like(x.q)
    sums = q.new_empty(batch, heads, x.query_blocks, dtype=torch.float32)
    grad_kernel[(x.query_blocks, batch * heads)](
        grad, out, packed, sums, num_queries, x.padded_queries,
        *grad.stride(), *out.stride()[:3], **x.options,
    )  # fmt: skip
    grad_dot_out = sums.sum(-1)
    buffers = x.new_maps(), x.new_maps()
    q_sums = torch.empty_like(x.q)
    # sums over several tiles are not rounded to half precision in between
    is_whole = x.tile.rows >= num_queries
    dtype = q.dtype if is_whole else torch.float32
    count = _count_parts(x, x.padded_queries if is_whole else x.tile.rows)
    k_sums = q.new_empty(batch, heads, count, x.padded_keys, dim, dtype=dtype)
    v_sums = torch.empty_like(k_sums)
    shares = q.new_empty(batch, num_queries, heads, heads, dtype=torch.float32)

    for part in x.parts():
        maps, grad_maps = (x.maps_of(buffer, part) for buffer in buffers)
        q_part, k_part = part.queries(x.q), part.keys(x.k)
        grad_part = part.queries(packed)
        _multiply(q_part, k_part.mT, out=maps, factor=scale)
        _multiply(grad_part, part.keys(x.v).mT, out=grad_maps)
        images = part.images
        backward_kernel[(_divide_up(part.valid, ROWS), len(maps) // heads)](
            maps, grad_maps, x.mix, part.tokens(statistics),
            gain if part.is_all else gain[images],
            grad_dot_out if part.is_all else grad_dot_out[images],
            part.tokens(shares),
            part.valid, part.length, x.num_keys, x.padded_keys, num_queries,
            **x.row_options,
        )  # fmt: skip
        _multiply(grad_maps, k_part, out=part.queries(q_sums), factor=scale)
        first = part.rows.start == 0
        k_total, v_total = (s if part.is_all else s[images] for s in (k_sums, v_sums))
        _accumulate(k_total, grad_maps, q_part, scale, first)
        _accumulate(v_total, maps, grad_part, x.num_keys**-0.5, first)

    unpack_kernel[(x.blocks, batch * heads, 3)](
        q_sums, k_sums, v_sums, gain, grad_q, grad_k, grad_v,
        num_queries, x.num_keys, x.padded_queries, x.padded_keys, count,
        *grad_q.stride()[:3], *grad_k.stride()[:3], **x.options,
    )  # fmt: skip
    grad_weight = shares.sum((0, 1))
    return grad_q, grad_k, grad_v, grad_weight.to(weight.dtype)


def _count_parts(x: _Operands, length: int) -> int:
    """Into how many products the sums over a tile's rows are cut.

    Their results, (M, d), are small and the sums are long: all of a GPU should have
    work. A part has at least 128 rows, and a multiple of 8.
    """
    maps = x.tile.images * x.heads
    wanted = max(1, 256 // (maps * _divide_up(x.padded_keys, 128)))
    wanted = min(wanted, max(1, length // 128))
    return math.gcd(max(1, length // 8 if length % 8 == 0 else 1), _power_of_2(wanted))


def _power_of_2(limit: int) -> int:
    return 1 << (limit.bit_length() - 1)


def _accumulate(
    total: Tensor, maps: Tensor, tokens: Tensor, factor: float, first: bool
) -> None:
    """``total += factor * maps^T @ tokens``, or ``=`` for the first tile.

    ``total`` has shape (B, h, parts, M, d): the sums over parts of the rows. A tile
    whose rows do not divide into as many goes to the first.
    """
    parts = total.shape[2]
    if maps.shape[1] % parts:
        parts, total = 1, total[:, :, :1]
    if parts > 1:
        maps = maps.unflatten(1, (parts, -1)).flatten(0, 1)
        tokens = tokens.unflatten(1, (parts, -1)).flatten(0, 1)
    if first and total.dtype == tokens.dtype:
        _multiply(maps.mT, tokens, out=total.view(-1, *total.shape[3:]), factor=factor)
        return
    product = tokens.new_empty(len(maps), *total.shape[3:])
    _multiply(maps.mT, tokens, out=product, factor=factor)
    if first:
        total.copy_(product.view(total.shape))
    else:
        total.add_(product.view(total.shape))


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


class _Attention(torch.autograd.Function):
    """The operator without its registration's costs, for eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        scale: float,
        eps: float,
        tile_rows: Optional[int],
    ) -> Tensor:
        with _On(q):
            out, statistics, gain = _attend(q, k, v, weight, scale, eps, tile_rows)
        ctx.save_for_backward(q, k, v, weight, bias, out, statistics, gain)
        ctx.scale, ctx.tile_rows = scale, tile_rows
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        if torch.is_grad_enabled():  # create_graph=True: the operator refuses later
            return _backward(ctx, grad)
        q, k, v, weight, bias, out, statistics, gain = ctx.saved_tensors
        with _On(q):
            grads = _differentiate(
                grad, q, k, v, weight, out, statistics, gain, ctx.scale, ctx.tile_rows
            )
        grad_bias = None if bias is None else torch.zeros_like(bias)
        return (*grads, grad_bias, None, None, None)
