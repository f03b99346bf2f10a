"""Count the multiply-accumulates and parameters of a config's model."""

import argparse
import sys

from mmengine.config import DictAction
from mmengine.registry import MODELS, init_default_scope

from mmrest import launch
from mmrest.utils.complexity import complexity


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or mmrest::folder/name.py')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        default=(800, 1333),
        metavar=('H', 'W'),
        help='size of the image [800 1333]',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override fields: KEY=VALUE'
    )
    # What else launch.load_config reads, for tools that start a Runner.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        cfg = launch.load_config(args)
    except launch.LaunchError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    result = complexity(MODELS.build(cfg.model), tuple(args.shape))
    height, width = result.shape
    print(
        f'one image of {height}x{width} (padded from {args.shape[0]}x{args.shape[1]})'
    )
    for name, flops in result.flops.items():
        print(f'{name:14} {flops / 1e9:9.3f} G  {result.params[name]:12,} parameters')
    print(
        'G: 10^9 multiply-accumulates of convolutions, linear layers and matrix '
        'products, and the operations of norms; softmax, activations and RoIAlign '
        'are not counted.'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
