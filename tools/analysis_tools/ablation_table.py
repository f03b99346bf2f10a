"""Print parameters, FLOPs and speed of classifiers' backbones as a table.

The models take turns, so that a machine that is busy for a while slows all of them,
and the median over the rounds is printed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmrest.complexity import complexity


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--size', type=int, default=224, help='side in pixels [224]')
    parser.add_argument('--batch', type=int, default=8, help='images at once [8]')
    parser.add_argument('--rounds', type=int, default=11, help='[11]')
    parser.add_argument('--threads', type=int, default=2, help='of PyTorch [2]')
    return parser.parse_args()


def build(path: Path) -> torch.nn.Module:
    cfg = Config.fromfile(str(path))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.backbone.init_weights()  # the model's own would log every parameter
    return model


def forward(model: torch.nn.Module, images: torch.Tensor) -> float:
    model.eval()
    start = time.perf_counter()
    with torch.inference_mode():
        model(images)
    return time.perf_counter() - start


def step(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Forward and backward."""
    model.train()
    start = time.perf_counter()
    model(images).square().mean().backward()
    return time.perf_counter() - start


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = {path.stem: build(path) for path in args.configs}
    images = torch.randn(args.batch, 3, args.size, args.size)
    times = {(name, run): [] for name in models for run in (forward, step)}
    for round_ in range(args.rounds + 1):
        for (name, run), found in times.items():
            seconds = run(models[name], images)
            if round_:  # the first round warms up
                found.append(1000 * seconds / args.batch)
    print('| config | parameters | FLOPs | forward | forward + backward |')
    print('|---|---|---|---|---|')
    for name, model in models.items():
        counts = complexity(model, (args.size, args.size))
        medians = [statistics.median(times[name, run]) for run in (forward, step)]
        print(
            f'| `{name}` | {counts.params["total"]:,} '
            f'| {counts.flops["total"] / 1e9:.3f} G '
            f'| {medians[0]:.1f} ms | {medians[1]:.1f} ms |'
        )
    print(
        f'\nms an image, batches of {args.batch}, {args.threads} threads, median of '
        f'{args.rounds} rounds; PyTorch {torch.__version__}'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
