"""Print parameters, FLOPs and speed of classifiers as a table in Markdown.

The first config is what the others are compared with. Each of them is timed
right after it, again and again, so that a machine that is busy for a while slows
both; what is printed are medians, of the times and of the ratios. With --into,
the table replaces what stands between <!-- ablation:begin --> and
<!-- ablation:end --> in a file.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmrest.utils.complexity import complexity
from mmrest.utils.text import replace_section, split_at_section


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--size', type=int, default=224, help='side in pixels [224]')
    parser.add_argument('--batch', type=int, default=8, help='images at once [8]')
    parser.add_argument('--rounds', type=int, default=11, help='[11]')
    parser.add_argument('--threads', type=int, default=2, help='of PyTorch [2]')
    parser.add_argument('--into', type=Path, help='Markdown file to update')
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


def measure(
    models: dict[str, torch.nn.Module], images: torch.Tensor, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Time forward passes and steps of the models in turn.

    Args:
        models (dict[str, nn.Module]): The first is the reference.
        images (Tensor): Of shape (B, 3, H, W).
        rounds (int): How often each model is timed, besides once to warm up.

    Returns:
        dict[str, tuple[list[float], list[float]]]: For each model the medians for
        ``forward`` and ``step``: of the seconds, and of the quotients with the
        reference's seconds just before.
    """
    (first, reference), *others = models.items()
    times = {name: ([], []) for name in models}
    quotients = {name: ([], []) for name in models}
    for round_ in range(rounds + 1):
        for name, model in others or [(first, reference)]:
            for index, run in enumerate((forward, step)):
                base = run(reference, images)
                seconds = run(model, images)
                if round_:  # the first round warms up
                    times[first][index].append(base)
                    quotients[first][index].append(1.0)
                    if model is not reference:
                        times[name][index].append(seconds)
                        quotients[name][index].append(seconds / base)
    median = statistics.median
    return {
        name: ([median(t) for t in times[name]], [median(q) for q in quotients[name]])
        for name in models
    }


def table(args: argparse.Namespace) -> str:
    models = {path.stem: build(path) for path in args.configs}
    images = torch.randn(args.batch, 3, args.size, args.size)
    measured = measure(models, images, args.rounds)
    lines = [
        '| config | parameters | FLOPs | forward | | forward + backward | |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, model in models.items():
        counts = complexity(model, (args.size, args.size))
        seconds, quotients = measured[name]
        cells = [f'`{name}`', f'{counts.params["total"]:,}']
        cells.append(f'{counts.flops["total"] / 1e9:.3f} G')
        for value, quotient in zip(seconds, quotients):
            cells += [f'{1000 * value / args.batch:.1f} ms', f'x {quotient:.2f}']
        lines.append(f'| {" | ".join(cells)} |')
    lines += [
        '',
        f'{args.size}x{args.size} pixels, float32, {platform.machine()}, '
        f'{args.threads} thread(s), PyTorch {torch.__version__}: ms an image in '
        f'batches of {args.batch}, and the time relative to `{next(iter(models))}` '
        f'just before; medians of {args.rounds} rounds.',
    ]
    return '\n'.join(lines)


def main() -> None:
    args = parse_args()
    if args.into:
        try:
            split_at_section(args.into, 'ablation')
        except ValueError as error:
            sys.exit(f'error: {error}')
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = table(args)
    print(result)
    if args.into:
        replace_section(args.into, 'ablation', result)


if __name__ == '__main__':
    main()
