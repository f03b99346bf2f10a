"""Check the data of a config before a run: files, annotations, images, classes."""

import argparse

from mmrest import launch
from mmrest.datasets import fill_coco_fields
from mmrest.datasets.preflight import check_data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    launch.add_config_arguments(parser)
    parser.add_argument(
        '--stage',
        choices=('train', 'test'),
        default='train',
        help='training and validation data, or test data [train]',
    )
    parser.add_argument(
        '--decode',
        type=int,
        metavar='N',
        help='images to decode of each dataset [all up to 500, else 100]',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.short_errors('tools/check_dataset.py'):
        cfg = launch.load_config(args.config, args.cfg_options, needs_model=False)
        fill_coco_fields()
        options = dict(cfg.get('preflight') or {})
        if args.decode is not None:
            options['decode'] = args.decode
        report = check_data(cfg, args.stage, **options)
        for _, text in report:
            print(text)
        if not report:
            print(
                f'nothing was checked: for {args.stage} {args.config} names no dataset '
                'of detection or segmentation'
            )


if __name__ == '__main__':
    main()
