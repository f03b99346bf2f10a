"""The Triton kernels of :mod:`mmrest.ops.triton_head_interaction`.

:func:`forward_kernel` and :func:`backward_kernel` are all that lies between the matrix
products, for the score rows of a tile. The others copy operands and results, with the
factors and sums that belong to them.

In the first two, tensors of a block have shape (ROWS, KEYS), and a tuple holds one for
each head. A warp has one row, a thread LANE neighbouring keys of it. Loops over heads
are unrolled. Logarithms and exponentials have base 2: ``weight`` is W log2(e). Columns
of a tile beyond the last key meet zeros in the products, or give rows that nothing
reads.
"""

from types import SimpleNamespace
from typing import Any, no_type_check

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

# Query rows of a program of the row kernels, which is as many warps: one row each.
ROWS = 4
# By itself (level 5), the assembler spills a register or two of some kernels, so that
# one more block fits on a multiprocessor. That of Triton 3.8 does so at level 3, too.
PTX_OPTIONS = f'--register-usage-level {3 if TRITON_VERSION < (3, 8) else 6}'


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
