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
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .tiled import (
    Tile,
    choose_tile,
    empty_gradients,
    empty_output,
    image_slices,
    refuse_second_order,
    row_slices,
    zero_gradient,
)
from .triton_kernels import (
    HAS_TRITON,
    PTX_OPTIONS,
    ROWS,
    TRITON_VERSION,
    backward_kernel,
    choose_lane,
    forward_kernel,
    gain_kernel,
    grad_kernel,
    out_kernel,
    pack_kernel,
    unpack_kernel,
)

if HAS_TRITON:
    import triton

MIN_TRITON = (3, 4)
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# With more, the kernels want more registers than a thread has.
MAX_HEADS = 8
# One map for each image and head; a grid of blocks is no larger in this dimension.
MAX_MAPS = 65535
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
    maps = q.shape[0] * q.shape[1]
    if maps > MAX_MAPS:
        return f'it supports up to {MAX_MAPS} images times heads, found {maps}'
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
    is_interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if is_interpreted and device in ('cpu', 'cuda'):
        return None
    if device != 'cuda' or torch.version.hip is not None:
        return f'it needs tensors on an NVIDIA GPU, found {device}'
    if not torch.cuda.is_available():
        return None  # fake tensors, of a device that is elsewhere
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        wanted, found = ('.'.join(map(str, c)) for c in (MIN_CAPABILITY, capability))
        return f'it needs compute capability {wanted} or newer, found {found}'
    return _find_compiler_problem(index)


def _find_compiler_problem(index: Optional[int]) -> Optional[str]:
    """Triton needs a C compiler and its cache folder on the user's machine."""
    args = (torch.float32, torch.float32, 1, 1, 1e-5)
    options = dict(HEADS=1, BLOCK=32, ptx_options=PTX_OPTIONS, grid=(1, 1, 1))
    try:
        with torch.cuda.device(index):
            # the brackets load what was compiled
            gain_kernel.warmup(*args, **options)[1, 1, 1]
    except Exception as error:
        reason = next(iter(str(error).splitlines()), '')
        return f'Triton cannot compile kernels here ({type(error).__name__}: {reason})'
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
# Forward and backward
#
# Operands have one map for each image and head: (maps, rows, d), with padded rows.
# ---------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A tile: its images, maps and query rows with the padding, and rows without it."""

    images: slice
    maps: slice
    rows: slice
    length: int
    valid: int
    is_all: bool

    def keys(self, x: Tensor) -> Tensor:
        """What the tile takes of a tensor of shape (maps, ...)."""
        return x if self.is_all else x[self.maps]

    def queries(self, x: Tensor) -> Tensor:
        """What the tile takes of queries, (maps, rows, d)."""
        return x if self.is_all else x[self.maps, self.rows]

    def tokens(self, x: Tensor) -> Tensor:
        """What the tile takes of a tensor of shape (B, N, ...)."""
        return x if self.is_all else x[self.images, self.rows]

    def pairs(self, x: Tensor) -> Tensor:
        """What the tile takes of a tensor of shape (B, h, ...)."""
        return x if self.is_all else x[self.images]


class _Plan:
    """How a call is computed, as far as it follows from sizes and types.

    Sizes, tiles, options and grids of the kernels, and launches. In eager mode a small
    stage's kernels take less time than Python needs to find all this out, so it is kept
    for the next call of the same sizes.
    """

    def __init__(self, q: Tensor, num_keys: int, tile_rows: Optional[int]) -> None:
        self.batch, self.heads, self.num_queries, self.dim = q.shape
        self.num_keys = num_keys
        self.maps = self.batch * self.heads
        self.padded_queries = _round_up(self.num_queries, QUERY_ALIGNMENT)
        self.padded_keys = _round_up(num_keys, KEY_ALIGNMENT)
        tile = choose_tile(q, num_keys, tile_rows, GPU_TILE_BYTES)
        if tile_rows is None:
            tile = Tile(tile.images, _round_up(tile.rows, QUERY_ALIGNMENT))
        tile = Tile(min(tile.images, self.batch), min(tile.rows, self.padded_queries))
        self.parts = tuple(self._parts(tile))
        # a buffer of scores serves all tiles; the last one takes the padding, too
        rows = tile.rows + self.padded_queries - self.num_queries
        self.rows = min(rows, self.padded_queries)
        self.tile_maps = tile.images * self.heads
        # sums over several tiles are not rounded to half precision in between
        is_whole = tile.rows >= self.num_queries
        self.sum_dtype = q.dtype if is_whole else torch.float32
        self.num_sums = self._count_sums(self.padded_queries if is_whole else tile.rows)

        columns = 1 << (self.dim - 1).bit_length()
        copy_rows = max(1, 4096 // columns)
        lane = choose_lane(self.heads, q.element_size())
        # constants of the kernels that copy, and of those of score rows
        self.copies = (self.heads, self.dim, copy_rows, columns)
        self.score_rows = (self.heads, ROWS, lane)
        self.row_options: dict[str, Any] = dict(num_warps=ROWS, ptx_options=PTX_OPTIONS)
        self.query_blocks = _divide_up(self.padded_queries, copy_rows)
        self.blocks = _divide_up(max(self.padded_queries, self.padded_keys), copy_rows)
        self._launches: dict[Any, Callable[..., None]] = {}

    def _parts(self, tile: Tile) -> Iterator[_Part]:
        for images in image_slices(self.batch, tile):
            maps = slice(images.start * self.heads, images.stop * self.heads)
            for rows, _ in row_slices(self.num_queries, tile):
                is_last = rows.stop == self.num_queries
                stop = self.padded_queries if is_last else rows.stop
                length = stop - rows.start
                is_all = (
                    images.stop - images.start == self.batch
                    and length == self.padded_queries
                )
                valid = rows.stop - rows.start
                yield _Part(
                    images, maps, slice(rows.start, stop), length, valid, is_all
                )

    def _count_sums(self, length: int) -> int:
        """Into how many products the sums over a tile's rows are cut.

        Their results, (M, d), are small and the sums are long: all of a GPU should have
        work. A part has at least 128 rows, and a multiple of 8.
        """
        wanted = max(1, 256 // (self.tile_maps * _divide_up(self.padded_keys, 128)))
        wanted = min(wanted, max(1, length // 128))
        eighths = length // 8 if length % 8 == 0 else 1
        return math.gcd(max(1, eighths), _power_of_2(wanted))

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        args: tuple,
        constants: tuple,
        key: tuple = (),
        **options: Any,
    ) -> None:
        """Launch a kernel.

        Triton looks at each argument to find out what it has compiled for it. The next
        time, that is left out where all of it follows from ``key`` and the sizes: in a
        plan of a single tile, whose buffers are those of PyTorch's allocator, which are
        aligned.
        """
        key = (kernel.__name__, *key)
        launch = self._launches.get(key)
        if launch is not None:
            launch(*args, *constants)
            return
        compiled = kernel[grid](*args, *constants, **options)
        if len(self.parts) == 1 and compiled is not None:
            self._launches[key] = compiled[grid]


# of calls of different sizes; in a training with images of many sizes, some hundreds
_PLANS: dict[tuple, _Plan] = {}
MAX_PLANS = 4096


def _plan_of(q: Tensor, k: Tensor, tile_rows: Optional[int]) -> _Plan:
    budget = os.environ.get('MMREST_TILE_BYTES')
    key = (q.shape, k.shape[2], q.dtype, q.device, tile_rows, budget)
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= MAX_PLANS:
            _PLANS.clear()
        plan = _PLANS[key] = _Plan(q, k.shape[2], tile_rows)
    return plan


def _layout(*tensors: Tensor) -> tuple:
    """What Triton looks at in tensors that others allocated: types, strides, alignment.

    The user, autograd, and hooks on saved tensors.
    """
    return tuple((x.dtype, x.stride(), x.data_ptr() % 16) for x in tensors)


# Triton's own cdiv and next_power_of_2 take microseconds
def _divide_up(size: int, by: int) -> int:
    return -(-size // by)


def _round_up(size: int, multiple: int) -> int:
    return _divide_up(size, multiple) * multiple


def _power_of_2(limit: int) -> int:
    return 1 << (limit.bit_length() - 1)


def _multiply(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
    """``out = factor * a @ b``; the factor meets the sums before they are rounded.

    Autocast leaves operations in place alone.
    """
    out.baddbmm_(a, b, beta=0.0, alpha=factor)


def _pack_operands(
    plan: _Plan, q: Tensor, k: Tensor, v: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values with padded rows, and ``weight * log2(e)``."""
    weight = weight.contiguous()
    q_packed = q.new_empty(plan.maps, plan.padded_queries, plan.dim)
    k_packed = q.new_empty(plan.maps, plan.padded_keys, plan.dim)
    v_packed = q.new_empty(plan.maps, plan.padded_keys, plan.dim)
    mix = q.new_empty(plan.heads, plan.heads, dtype=torch.float32)
    plan.launch(
        pack_kernel, (plan.blocks, plan.maps, 3),
        (
            q, k, v, weight, q_packed, k_packed, v_packed, mix,
            plan.num_queries, plan.num_keys, plan.padded_queries, plan.padded_keys,
            *q.stride(), *k.stride(), *v.stride(),
        ),
        plan.copies, _layout(q, k, v, weight),
    )  # fmt: skip
    return q_packed, k_packed, v_packed, mix


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
    plan = _plan_of(q, k, tile_rows)
    queries, keys, values, mix = _pack_operands(plan, q, k, v, weight)
    buffer = q.new_empty(plan.tile_maps, plan.rows, plan.padded_keys)
    product = torch.empty_like(queries)

    for part in plan.parts:
        maps = _buffer_of(buffer, part)
        _multiply(part.queries(queries), part.keys(keys).mT, out=maps, factor=scale)
        plan.launch(
            forward_kernel, (_divide_up(part.valid, ROWS), len(maps) // heads, 1),
            (
                maps, mix, part.tokens(statistics), part.valid, part.length,
                plan.num_keys, plan.padded_keys, num_queries,
            ),
            plan.score_rows, **plan.row_options,
        )  # fmt: skip
        target = part.queries(product)
        _multiply(maps, part.keys(values), out=target, factor=plan.num_keys**-0.5)

    plan.launch(
        gain_kernel, (plan.maps, 1, 1),
        # an integer would be another type of argument
        (statistics, gain, num_queries, plan.num_keys, float(eps)),
        (heads, 4096), num_warps=16,
    )  # fmt: skip
    plan.launch(
        out_kernel, (plan.query_blocks, plan.maps, 1),
        (
            product, gain, out, num_queries, plan.padded_queries, 1,
            *out.stride()[:3],
        ),
        plan.copies,
    )  # fmt: skip
    return out, statistics, gain


def _buffer_of(buffer: Tensor, part: _Part) -> Tensor:
    """The tile's scores, (maps, rows, padded keys), next to each other."""
    if part.is_all:
        return buffer
    size = (part.maps.stop - part.maps.start, part.length, buffer.shape[2])
    return buffer.view(-1)[: math.prod(size)].view(size)


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
    plan = _plan_of(q, k, tile_rows)
    queries, keys, values, mix = _pack_operands(plan, q, k, v, weight)
    packed = torch.empty_like(queries)
    sums = q.new_empty(batch, heads, plan.query_blocks, dtype=torch.float32)
    plan.launch(
        grad_kernel, (plan.query_blocks, plan.maps, 1),
        (
            grad, out, packed, sums, num_queries, plan.padded_queries,
            *grad.stride(), *out.stride()[:3],
        ),
        plan.copies, _layout(grad, out),
    )  # fmt: skip
    grad_dot_out = sums.sum(-1)
    saved_layout = _layout(statistics, gain)
    size = (plan.tile_maps, plan.rows, plan.padded_keys)
    buffers = q.new_empty(size), q.new_empty(size)
    q_sums = torch.empty_like(queries)
    sizes = (plan.maps, plan.num_sums, plan.padded_keys, dim)
    k_sums = q.new_empty(sizes, dtype=plan.sum_dtype)
    v_sums = q.new_empty(sizes, dtype=plan.sum_dtype)
    shares = q.new_empty(batch, num_queries, heads, heads, dtype=torch.float32)

    for part in plan.parts:
        maps, grad_maps = (_buffer_of(buffer, part) for buffer in buffers)
        q_part, k_part = part.queries(queries), part.keys(keys)
        grad_part = part.queries(packed)
        _multiply(q_part, k_part.mT, out=maps, factor=scale)
        _multiply(grad_part, part.keys(values).mT, out=grad_maps)
        plan.launch(
            backward_kernel, (_divide_up(part.valid, ROWS), len(maps) // heads, 1),
            (
                maps, grad_maps, mix, part.tokens(statistics), part.pairs(gain),
                part.pairs(grad_dot_out), part.tokens(shares), part.valid, part.length,
                plan.num_keys, plan.padded_keys, num_queries,
            ),
            plan.score_rows, saved_layout, **plan.row_options,
        )  # fmt: skip
        _multiply(grad_maps, k_part, out=part.queries(q_sums), factor=scale)
        first = part.rows.start == 0
        _accumulate(part.keys(k_sums), grad_maps, q_part, scale, first)
        _accumulate(part.keys(v_sums), maps, grad_part, plan.num_keys**-0.5, first)

    plan.launch(
        unpack_kernel, (plan.blocks, plan.maps, 3),
        (
            q_sums, k_sums, v_sums, gain, grad_q, grad_k, grad_v, num_queries,
            plan.num_keys, plan.padded_queries, plan.padded_keys, plan.num_sums,
            *grad_q.stride()[:3], *grad_k.stride()[:3],
        ),
        plan.copies, saved_layout,
    )  # fmt: skip
    grad_weight = shares.sum((0, 1))
    return grad_q, grad_k, grad_v, grad_weight.to(weight.dtype)


def _accumulate(
    total: Tensor, maps: Tensor, tokens: Tensor, factor: float, first: bool
) -> None:
    """``total += factor * maps^T @ tokens``, or ``=`` for the first tile.

    ``total`` has shape (maps, parts, M, d): the sums over parts of the rows. A tile
    whose rows do not divide into as many goes to the first.
    """
    parts = total.shape[1]
    if maps.shape[1] % parts:
        parts, total = 1, total[:, :1]
    if parts > 1:
        maps = maps.unflatten(1, (parts, -1)).flatten(0, 1)
        tokens = tokens.unflatten(1, (parts, -1)).flatten(0, 1)
    if first and total.dtype == tokens.dtype:
        _multiply(maps.mT, tokens, out=total.view(-1, *total.shape[2:]), factor=factor)
        return
    product = tokens.new_empty(len(maps), *total.shape[2:])
    _multiply(maps.mT, tokens, out=product, factor=factor)
    if first:
        total.copy_(product.view(total.shape))
    else:
        total.add_(product.view(total.shape))


# ---------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------


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
    with torch.cuda.device_of(q):
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
    with torch.cuda.device_of(q):
        return _differentiate(
            grad, q, k, v, weight, out, statistics, gain, scale, tile_rows
        )


@_attention_op.register_fake
def _(q, k, v, weight, bias, scale, eps, tile_rows):
    batch, heads, num_queries, _ = q.shape
    statistics = q.new_empty(batch, num_queries, 3, heads, dtype=torch.float32)
    gain = q.new_empty(batch, heads, 1, 1, dtype=torch.float32)
    return empty_output(q), statistics, gain


@_backward_op.register_fake
def _(grad, q, k, v, weight, out, statistics, gain, scale, tile_rows):
    return empty_gradients(q, k, v, weight)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, weight, bias, scale, _, tile_rows = inputs
    out, statistics, gain = output
    ctx.save_for_backward(q, k, v, weight, bias, out, statistics, gain)
    ctx.scale, ctx.tile_rows = scale, tile_rows
    ctx.mark_non_differentiable(statistics, gain)


def _backward(
    ctx: Any, grad: Tensor, *_: Tensor, compute: Callable = _backward_op
) -> tuple[Optional[Tensor], ...]:
    q, k, v, weight, bias, out, statistics, gain = ctx.saved_tensors
    grads = compute(
        grad, q, k, v, weight, out, statistics, gain, ctx.scale, ctx.tile_rows
    )
    return (*grads, zero_gradient(bias), None, None, None)


_attention_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(refuse_second_order("attn_impl='triton'"))


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
        with torch.cuda.device_of(q):
            out, statistics, gain = _attend(q, k, v, weight, scale, eps, tile_rows)
        ctx.save_for_backward(q, k, v, weight, bias, out, statistics, gain)
        ctx.scale, ctx.tile_rows = scale, tile_rows
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        # create_graph=True, which the operator refuses later, or compiled autograd
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _backward(ctx, grad)
        with torch.cuda.device_of(grad):
            return _backward(ctx, grad, compute=_differentiate)
