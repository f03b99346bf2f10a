"""Evaluate a checkpoint with the metrics of a config, with MMEngine's Runner."""

import argparse

from mmrest import launch
from mmrest.optim.amp import test_with_amp
from mmrest.utils.evaluation import (
    EvaluationRunner,
    augment_images,
    draw_predictions,
    write_predictions,
)


def parse_args() -> argparse.Namespace:
    parser = launch.ArgumentParser(description=__doc__)
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='NAME.pkl: write all predictions as a pickle; NAME.json: write '
        'NAME.bbox.json and NAME.segm.json in the result format of COCO; for a '
        'segmentor a folder: write its label images there',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument(
        '--show-dir', help='write the predictions as images to WORK_DIR/TIME/SHOW_DIR'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds an image is shown [2]'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation by tta_model and tta_pipeline of the config',
    )
    launch.add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.short_errors('tools/test.py'):
        cfg = launch.load_run_config(args)
        cfg.load_from, cfg.resume = args.checkpoint, False
        if args.show or args.show_dir:
            draw_predictions(cfg, args.show, args.show_dir, args.wait_time)
        report = launch.check_before_run(cfg, args, 'test')
        if args.tta:
            augment_images(cfg)
        if args.out:
            write_predictions(cfg, args.out)
        launch.start_process_group(cfg)
        runner = launch.build_runner(cfg, report, EvaluationRunner)
        launch.check_start(runner, cfg, exact=True)
        if args.amp:
            test_with_amp(runner.model, args.amp)
        runner.test()
        launch.end_process_group()


if __name__ == '__main__':
    main()
