"""Train the model of a config, with MMEngine's Runner."""

import argparse
import logging
import sys

from mmrest import launch
from mmrest.hooks import Preempted, StopSignals
from mmrest.optim.amp import train_with_amp
from mmrest.utils.disk import explain_disk_error, survive_log_errors


def parse_args() -> argparse.Namespace:
    parser = launch.ArgumentParser(description=__doc__)
    launch.add_config_arguments(parser)
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='multiply the learning rate by batch / auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='continue from this checkpoint; without a path from the newest complete '
        'one in the work folder, or from the start if there is none',
    )
    parser.add_argument(
        '--tensorboard', action='store_true', help='log for TensorBoard as well'
    )
    launch.add_run_arguments(parser)
    return parser.parse_args()


def train(args: argparse.Namespace, cfg: launch.Config) -> None:
    train_with_amp(cfg, args.amp)
    if args.auto_scale_lr:
        launch.scale_learning_rate(cfg)
    if args.tensorboard:
        launch.log_for_tensorboard(cfg)
    launch.start_process_group(cfg)
    latest = launch.choose_start(cfg, args.resume)
    notes = launch.check_before_run(cfg, args, 'train')
    if latest and latest.warning:
        notes.append((logging.WARNING, latest.warning))
    runner = launch.build_runner(cfg, notes)
    launch.check_start(runner, cfg, latest)
    survive_log_errors(runner.logger)
    runner.train()
    launch.end_process_group()


def main() -> None:
    # a signal raises a SystemExit with the status
    StopSignals().start()
    args = parse_args()
    with launch.short_errors('tools/train.py'):
        cfg = launch.load_run_config(args)
        try:
            train(args, cfg)
        except OSError as error:
            text = explain_disk_error(error, cfg.work_dir)
            if text is None:
                raise
            sys.exit(f'tools/train.py: {text}')
        except Preempted as stop:
            launch.end_process_group(stop.code)
            raise  # it ends Python with the exit status


if __name__ == '__main__':
    main()
