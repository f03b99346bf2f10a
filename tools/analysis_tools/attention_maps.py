"""Draw the attention of a point in an image, for each stage and head of ResT."""

import argparse
import sys
import time

from mmrest import launch
from mmrest.inference import InferenceError, attend, init_inferencer, read_image
from mmrest.inference.attention_pictures import save_attention
from mmrest.inference.inputs import ImageError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', metavar='img', help='an image file, of any size')
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    parser.add_argument(
        '--at',
        nargs=2,
        type=int,
        required=True,
        metavar=('X', 'Y'),
        help='the point, in pixels of the image from its upper left corner',
    )
    parser.add_argument(
        '--block', type=int, default=-1, help='block of each stage [-1, the last]'
    )
    parser.add_argument(
        '--out-dir',
        metavar='DIR',
        help='new or empty folder for a picture per stage and the arrays '
        '[outputs/DATE_TIME]',
    )
    parser.add_argument('--device', help='such as cpu or cuda:0 [a GPU if there is]')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    out_dir = args.out_dir or time.strftime('outputs/%Y%m%d_%H%M%S')
    with launch.short_errors('tools/analysis_tools/attention_maps.py'):
        try:
            image = read_image(args.image)
        except ImageError as error:
            raise InferenceError(f'{args.image} {error}.') from error
        cfg = launch.load_config(args.config, args.cfg_options)
        inferencer = init_inferencer(cfg, args.checkpoint, args.device)
        found = attend(inferencer, image, *args.at, block=args.block)
        for path in save_attention(found, out_dir):
            print(path)
    return 0


if __name__ == '__main__':
    sys.exit(main())
