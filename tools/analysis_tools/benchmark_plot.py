"""Draw time and memory over the area of the image from a sweep's JSON file."""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

MIB = 2**20
# file name, title, and the value that a row of the file has
PANELS = (
    ('benchmark_time.png', 'Seconds per image', lambda row: row['time']),
    (
        'benchmark_memory.png',
        "MiB above the model's own",
        lambda row: row['memory'] / MIB if row['memory'] else None,
    ),
)


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the pictures; those of an earlier sweep are replaced.

    Args:
        result (dict): what ``benchmark.py --sweep --json`` writes.
        folder (Path): made if it does not exist.

    Returns:
        list[Path]: the pictures.
    """
    import matplotlib

    matplotlib.use('Agg')
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw_panel(result, folder / panel[0], *panel[1:]) for panel in PANELS]


def _draw_panel(result: dict[str, Any], path: Path, title: str, value: Any) -> Path:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    points, ends = defaultdict(list), {}
    shapes = {}
    for row in result['rows']:
        if row['subject']['matmul']:
            continue
        height, width = row['shape']
        shapes[height * width] = f'{height}x{width}'
        key = (row['name'], row['dtype'])
        if row['failure']:
            ends[key] = f'{row["failure"]} at {height}x{width}'
        elif value(row) is not None:
            points[key].append((height * width, value(row)))
    several = len({dtype for _, dtype in points}) > 1

    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    for key, line in points.items():
        name = ', '.join(key) if several else key[0]
        label = f'{name} ({ends[key]})' if key in ends else name
        areas, values = zip(*sorted(line))
        ours = name.startswith('ResT')
        style = '-o' if ours and 'dense' not in name else '--s' if ours else ':^'
        axes.plot(areas, values, style, label=label, lw=2.5 if style == '-o' else 1.5)
    axes.set(xscale='log', yscale='log', xlabel='Image', title=title)
    axes.set_xticks(list(shapes), list(shapes.values()), rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(which='both', alpha=0.25)
    if points:
        axes.legend(fontsize='small')
    machine = result['machine']
    axes.annotate(
        f'{machine["gpu"] if result["settings"]["device"] != "cpu" else machine["cpu"]}'
        f', {machine["threads"]} threads, torch {machine["torch"]}',
        xy=(0.99, 0.01), xycoords='axes fraction', ha='right', fontsize='x-small',
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('json', type=Path, help='what benchmark.py --json wrote')
    parser.add_argument('folder', type=Path, help='folder of the pictures')
    args = parser.parse_args()
    try:
        result = json.loads(args.json.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        print(f'error: cannot read {args.json}: {error}', file=sys.stderr)
        return 1
    for path in draw(result, args.folder):
        print(path)
    return 0


if __name__ == '__main__':
    sys.exit(main())
