"""Draw the predictions of a model for images, a video or a camera."""

import argparse
import sys
import time
from pathlib import Path

from mmrest import launch
from mmrest.inference import infer, init_inferencer
from mmrest.utils.disk import free_space
from mmrest.utils.text import parse_count


def parse_args() -> argparse.Namespace:
    parser = launch.ArgumentParser(description=__doc__)
    parser.add_argument(
        'input',
        help='an image, a folder of images, an http(s) address, a video, or the '
        'number of a camera',
    )
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    parser.add_argument(
        '--out-dir',
        metavar='DIR',
        help='new or empty folder for pictures (vis) and JSON (preds) '
        '[outputs/DATE_TIME, or none with --show]',
    )
    parser.add_argument(
        '--show', action='store_true', help='show the pictures in a window'
    )
    parser.add_argument('--device', help='such as cpu or cuda:0 [a GPU if there is]')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='lowest score of boxes to draw; the JSON holds all [0.3]',
    )
    parser.add_argument(
        '--batch-size', type=parse_count, default=1, help='images at once [1]'
    )
    launch.add_amp_argument(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    out_dir = args.out_dir
    if out_dir is None and not args.show:
        out_dir = time.strftime('outputs/%Y%m%d_%H%M%S')
    with launch.short_errors('tools/image_demo.py'):
        cfg = launch.load_config(args.config, args.cfg_options)
        inferencer = init_inferencer(cfg, args.checkpoint, args.device, args.amp)
        options = (args.score_thr, args.batch_size, args.show)
        try:
            skipped = infer(inferencer, args.input, out_dir, *options)
        except OSError as error:
            sys.exit(f'tools/image_demo.py: {error}. {free_space(out_dir or ".")}')
    if out_dir is not None and any(Path(out_dir, 'preds').iterdir()):
        print(f'pictures and JSON are in {out_dir}')
    if skipped:
        print(f'{len(skipped)} could not be read, see above', file=sys.stderr)
    return 1 if skipped else 0


if __name__ == '__main__':
    sys.exit(main())
