"""Evaluate a checkpoint and compare with the figures that it should reach.

They stand in the config (expected_results) or in the model index. Exit status: 0 if
all agree, 1 if one differs, 2 if nothing could be compared.
"""

import argparse
import sys

from mmengine.runner import Runner

from mmrest import launch
from mmrest.checkpoint import CheckpointError, check_load_from
from mmrest.datasets.preflight import PreflightError, check_config, log_report
from mmrest.utils.results import ResultsError, compare, expected


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or mmrest::folder/name.py')
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    launch.add_common_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        cfg = launch.load_config(args)
        figures = expected(cfg, args.config)
        cfg.load_from = args.checkpoint
        cfg.resume = False
        report = []
        if not args.no_preflight and launch.on_first_process():
            report = check_config(cfg, 'test')
        launch.prepare_process_group(cfg)
        runner = Runner.from_cfg(cfg)
        log_report(report)
        check_load_from(runner.model, cfg.load_from, hooks=runner.hooks)
        agree, text = compare(runner.test(), figures)
    except (
        launch.LaunchError,
        CheckpointError,
        PreflightError,
        ResultsError,
    ) as error:
        print(f'tools/check_results.py: {error}', file=sys.stderr)
        return 2
    print(text)
    status = 0 if agree else 1
    launch.end_process_group(status)
    return status


if __name__ == '__main__':
    sys.exit(main())
