"""Count the multiply-accumulates and parameters of a config's model."""

import argparse

from mmengine.registry import MODELS, init_default_scope

from mmrest import launch
from mmrest.utils.complexity import complexity
from mmrest.utils.config_types import find_toolbox
from mmrest.utils.text import parse_count


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    launch.add_config_arguments(parser)
    parser.add_argument(
        '--shape',
        type=parse_count,
        nargs=2,
        default=(800, 1333),
        metavar=('H', 'W'),
        help='size of the image [800 1333]',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.short_errors('tools/analysis_tools/get_flops.py'):
        cfg = launch.load_config(args.config, args.cfg_options)
    init_default_scope(find_toolbox(cfg) or 'mmengine')
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


if __name__ == '__main__':
    main()
