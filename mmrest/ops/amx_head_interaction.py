"""ResT's head-interaction attention in bfloat16, for CPUs with AMX.

``amx_head_interaction.cpp`` has the formulas of :mod:`mmrest.ops.tiled` for blocks of
rows that stay in a core's cache, between products by PyTorch's interface to AMX. It is
compiled on the machine when it is first asked for, about 20 seconds, and kept in
PyTorch's folder for extensions (``TORCH_EXTENSIONS_DIR``). Nothing asks for it unless
``attn_impl='amx'`` is given.
"""

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from .tiled import (
    choose_tile,
    empty_gradients,
    empty_output,
    refuse_second_order,
    zero_gradient,
)

SOURCE = Path(__file__).with_suffix('.cpp')
HEADS = (2, 4, 8)
# What all processors with AMX have. Without traps and errno, loops become vectors.
FLAGS = (
    '-std=c++20 -O3 -fopenmp -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma '
    '-mprefer-vector-width=512 -fno-math-errno -fno-trapping-math -fno-signed-zeros'
)
# The backward pass stores two maps of 2 bytes for a tile; 'tiled' has four of 4 bytes.
TILE_FACTOR = 4
# The share of a thread, as in the source
BLOCK_ROWS = 32


def why_not(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Optional[str]:
    """Why this operator cannot compute the attention; None if it can.

    Args:
        q (Tensor): Queries, of shape (B, h, N, d).
        k (Tensor): Keys, of shape (B, h, M, d).
        v (Tensor): Values, of shape (B, h, M, d).
        dropout_p (float): Dropout on the normalised map. Default: 0.
    """
    if q.device.type != 'cpu':
        return f'it needs tensors on the CPU, found {q.device.type}'
    if q.dtype != torch.bfloat16:
        found = str(q.dtype).split('.')[-1]
        return f"it supports bfloat16 (torch.autocast('cpu')), found {found}"
    if q.shape[1] not in HEADS:
        return f'it supports 2, 4 or 8 heads, found {q.shape[1]}'
    if q.shape[3] == 0 or q.shape[3] % 2:
        return f'it needs an even number of channels per head, found {q.shape[3]}'
    if k.shape[2] == 0:
        return 'it needs at least one key'
    if dropout_p > 0.0:
        return f'it has no dropout, found dropout_p={dropout_p}'
    if not torch.backends.mkldnn.enabled:
        return 'torch.backends.mkldnn.enabled is False'
    return _machine_problem()


def is_available() -> bool:
    """Whether the operator can run on this machine; the first call compiles it."""
    return _machine_problem() is None


def _machine_problem() -> Optional[str]:
    """Why the operator cannot run on this machine; None if it can."""
    return _find_machine_problem()


@functools.cache
def _find_machine_problem() -> Optional[str]:
    has_amx = getattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    if not has_amx():
        return 'the processor has no AMX, or this version of PyTorch does not use it'
    if torch.backends.cpu.get_cpu_capability() != 'AVX512':
        return 'it needs AVX-512, which ATEN_CPU_CAPABILITY has turned off'
    try:
        _load_library()
        # the system may refuse AMX, and ONEDNN_MAX_CPU_ISA may leave it out
        x = torch.zeros(1, 2, 1, 2, dtype=torch.bfloat16)
        torch.ops.mmrest_amx.forward(x, x, x, torch.eye(2), 1.0, 1e-5)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), '')
        return f'it cannot be built here ({type(error).__name__}: {reason})'
    return None


def _load_library() -> None:
    """Load the library, and build it where this version of PyTorch has none yet."""
    # the import changes the environment of the process
    from torch.utils import cpp_extension

    root = os.environ.get('TORCH_EXTENSIONS_DIR') or (
        cpp_extension.get_default_build_root()
    )
    content = SOURCE.read_text() + FLAGS + torch.__version__
    name = f'mmrest_amx_{hashlib.sha256(content.encode()).hexdigest()[:12]}'
    library = Path(root, f'{name}.so')
    if library.exists():
        torch.ops.load_library(library)
        return
    os.makedirs(root, exist_ok=True)
    # A folder of its own: a build that was killed leaves a lock behind, on which the
    # next one would wait forever.
    with tempfile.TemporaryDirectory(prefix=name, dir=root) as folder:
        cpp_extension.load(
            name,
            [str(SOURCE)],
            extra_cflags=FLAGS.split(),
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder, f'{name}.so'), library)


# A constant to compilers, see triton_head_interaction.py
_machine_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def amx_head_interaction_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    scale: float,
    eps: float,
    bias: Optional[Tensor] = None,
    tile_rows: Optional[int] = None,
) -> Tensor:
    """``InstanceNorm(softmax(Conv1x1(scale * q k^T))) v``, in bfloat16 with AMX.

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
        tile_rows (int, optional): Query rows whose maps the backward pass stores,
            rounded up to a multiple of 32. Default: 4 times those that
            :func:`mmrest.ops.tiled.choose_tile` gives, and 32 for each thread at least.

    Returns:
        Tensor: Of shape (B, h, N, d), in the memory order (B, N, h, d).
    """
    return _attention_op(q, k, v, weight, bias, scale, eps, tile_rows)[0]


# ---------------------------------------------------------------- the operator


@torch.library.custom_op('mmrest::amx_head_interaction_attention', mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: float,
    eps: float,
    tile_rows: Optional[int],
) -> tuple[Tensor, Tensor]:
    choose_tile(q, k.shape[2], tile_rows)  # raises what the backward pass would
    _require_library()
    with torch.autocast('cpu', enabled=False):
        return torch.ops.mmrest_amx.forward(q, k, v, weight, scale, eps)


@torch.library.custom_op(
    'mmrest::amx_head_interaction_attention_backward', mutates_args=()
)
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    out: Tensor,
    rstd: Tensor,
    scale: float,
    tile_rows: Optional[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if tile_rows is None:
        fitting = TILE_FACTOR * choose_tile(q, k.shape[2]).rows
        tile_rows = max(fitting, BLOCK_ROWS * torch.get_num_threads())
    _require_library()
    with torch.autocast('cpu', enabled=False):
        return torch.ops.mmrest_amx.backward(
            grad, q, k, v, weight, out, rstd, scale, tile_rows
        )


def _require_library() -> None:
    """Load the library for an exported program, which has not asked for it."""
    if problem := _machine_problem():
        raise RuntimeError(f"attn_impl='amx' cannot be used here: {problem}.")


@_attention_op.register_fake
def _(q, k, v, weight, bias, scale, eps, tile_rows):  # noqa: ANN001
    return empty_output(q), q.new_empty(*q.shape[:2], 1, 1, dtype=torch.float32)


@_backward_op.register_fake
def _(grad, q, k, v, weight, out, rstd, scale, tile_rows):  # noqa: ANN001
    return empty_gradients(q, k, v, weight)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, weight, bias, scale, _, tile_rows = inputs
    out, rstd = output
    ctx.save_for_backward(q, k, v, weight, bias, out, rstd)
    ctx.scale, ctx.tile_rows = scale, tile_rows
    ctx.mark_non_differentiable(rstd)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Optional[Tensor], ...]:
    q, k, v, weight, bias, out, rstd = ctx.saved_tensors
    grads = _backward_op(grad, q, k, v, weight, out, rstd, ctx.scale, ctx.tile_rows)
    return (*grads, zero_gradient(bias), None, None, None)


_attention_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(refuse_second_order("attn_impl='amx'"))
