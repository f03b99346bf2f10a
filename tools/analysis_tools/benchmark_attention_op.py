"""Time the head-interaction attention alone, by implementation, on a CUDA device.

One row for each stage that has it (2 to 4), with the sizes that an image gives, and
one for the sum over the blocks of ResT-Base. Times are medians of CUDA events.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmrest.ops import head_interaction_attention
from mmrest.ops.triton_head_interaction import why_not

IMPLS = ('dense', 'tiled', 'triton')
DTYPES = ('bfloat16', 'float16', 'float32')


class Stage(NamedTuple):
    """A stage of ResT: its number, heads, stride, reduction and blocks."""

    number: int
    heads: int
    stride: int
    reduction: int
    blocks: int


STAGES = (Stage(2, 2, 8, 4, 2), Stage(3, 4, 16, 2, 6), Stage(4, 8, 32, 1, 2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--shape', nargs=2, type=int, default=(800, 1333), metavar=('H', 'W'))
    add('--batch', type=int, default=2, metavar='N', help='images [2]')
    add('--dim', type=int, default=96, help='of a head; 64 in lite and small [96]')
    add('--dtype', nargs='+', choices=DTYPES, default=['bfloat16'])
    add('--impl', nargs='+', choices=IMPLS, default=list(IMPLS))
    add('--repeats', type=int, default=20, metavar='N', help='timed calls [20]')
    args = parser.parse_args()
    if min(*args.shape, args.batch, args.dim, args.repeats) < 1:
        parser.error('sizes and counts must be at least 1')
    if not torch.cuda.is_available():
        parser.error('needs a CUDA device; benchmark.py measures CPUs')
    return args


def make_inputs(stage: Stage, args: argparse.Namespace, dtype: torch.dtype) -> list:
    """Queries, keys, values and weight as leaves, and the gradient of the output."""
    height, width = (-(-size // stage.stride) for size in args.shape)
    reduced = (-(-size // stage.reduction) for size in (height, width))
    queries, keys = height * width, next(reduced) * next(reduced)

    def draw(tokens: int) -> Tensor:
        size = (args.batch, tokens, stage.heads, args.dim)
        return torch.randn(size, device='cuda', dtype=dtype).transpose(1, 2)

    leaves = [draw(queries), draw(keys), draw(keys)]
    leaves.append(torch.randn(stage.heads, stage.heads, device='cuda') * 0.5)
    return [leaf.requires_grad_() for leaf in leaves] + [draw(queries)]


def attend(impl: str, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """The attention as a model under autocast calls it."""
    with torch.autocast('cuda', q.dtype, enabled=q.dtype != torch.float32):
        return head_interaction_attention(q, k, v, weight, attn_impl=impl)


def measure(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds of a call, and MiB that it needs above what was there."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    peak = torch.cuda.max_memory_allocated() - before
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        function()
    events[-1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:])]
    return statistics.median(times), peak / 2**20


def measure_stage(
    stage: Stage, impl: str, args: argparse.Namespace, dtype: torch.dtype
) -> tuple[float, float, float, float]:
    """Milliseconds and MiB, forward, then forward with backward."""
    torch.manual_seed(0)
    *leaves, grad = make_inputs(stage, args, dtype)
    if impl == 'triton' and (reason := why_not(*leaves[:3])):
        raise SystemExit(f"attn_impl='triton' cannot be measured: {reason}")

    def forward() -> None:
        with torch.no_grad():
            attend(impl, *leaves)

    def both() -> None:
        torch.autograd.grad(attend(impl, *leaves), leaves, grad)

    return (*measure(forward, args.repeats), *measure(both, args.repeats))


def main() -> None:
    args = parse_args()
    height, width = args.shape
    print(
        f'{torch.cuda.get_device_name()}, torch {torch.__version__}, '
        f'{args.batch} x {height} x {width}, {args.dim} channels a head'
    )
    print('| type | stage | implementation | forward | with backward | memory |')
    print('|---|---|---|---|---|---|')
    for name in args.dtype:
        total = {impl: [0.0, 0.0] for impl in args.impl}
        for stage in STAGES:
            for impl in args.impl:
                row = measure_stage(stage, impl, args, getattr(torch, name))
                forward, _, both, memory = row
                total[impl][0] += stage.blocks * forward
                total[impl][1] += stage.blocks * both
                print(
                    f'| {name} | {stage.number} | {impl} | {forward:.3f} ms | '
                    f'{both:.3f} ms | {memory:.0f} MiB |',
                    flush=True,
                )
        for impl, (forward, both) in total.items():
            print(
                f'| {name} | all blocks | {impl} | {forward:.2f} ms | {both:.2f} ms | |'
            )


if __name__ == '__main__':
    main()
