"""Evaluate a checkpoint, and compare with the expected results.

These are in the config (expected_results) or in the model index. Exit status: 0 if all
agree, 1 if one differs, 2 if nothing could be compared.
"""

import argparse
import sys

from mmrest import launch
from mmrest.optim.amp import test_with_amp
from mmrest.utils.evaluation import EvaluationRunner, augment_images
from mmrest.utils.results import AUGMENTED, compare, expected


def parse_args() -> argparse.Namespace:
    parser = launch.ArgumentParser(description=__doc__)
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    launch.add_run_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with launch.short_errors('tools/check_results.py', status=2):
        cfg = launch.load_run_config(args)
        figures = expected(cfg, args.config)
        cfg.load_from, cfg.resume = args.checkpoint, False
        report = launch.check_before_run(cfg, args, 'test')
        if AUGMENTED in figures.metrics:
            augment_images(cfg)
        launch.start_process_group(cfg)
        runner = launch.build_runner(cfg, report, EvaluationRunner)
        launch.check_start(runner, cfg, exact=True)
        if args.amp:
            test_with_amp(runner.model, args.amp)
        agree, text = compare(runner.test(), figures)
    print(text)
    status = 0 if agree else 1
    launch.end_process_group(status)
    return status


if __name__ == '__main__':
    sys.exit(main())
