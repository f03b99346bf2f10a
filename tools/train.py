"""Train the model that a config describes, with MMEngine's Runner."""

import argparse
import copy
import sys

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from torch.nn import Module
from torch.random import fork_rng

from mmrest import launch
from mmrest.checkpoint import CheckpointError, check_agreement, check_load_from
from mmrest.hooks import LabelRangeError, NonFiniteError, Preempted, StopSignals
from mmrest.hooks.disk import explain_disk_error, survive_log_errors
from mmrest.datasets.preflight import PreflightError, check_config, log_report


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config',
        help='path of a config, or package::folder/name.py of an installed one',
    )
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision (needs a GPU)'
    )
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
        help='continue from this checkpoint; without a path from the newest whole one '
        'in the work folder, or from the start if there is none',
    )
    parser.add_argument(
        '--tensorboard', action='store_true', help='log for TensorBoard as well'
    )
    launch.add_common_arguments(parser)
    return parser.parse_args()


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    if args.amp:
        if get_device() in ('cpu', 'mps'):
            raise launch.LaunchError(
                f'--amp needs a GPU, and the device here is {get_device()}. Train '
                'without --amp.'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise launch.LaunchError(
                '--auto-scale-lr needs the batch that the learning rate was chosen '
                'for. Add auto_scale_lr=dict(enable=False, base_batch_size=16) to the '
                'config.'
            )
        cfg.auto_scale_lr.enable = True
    if args.tensorboard:
        cfg.visualizer.setdefault('vis_backends', []).append(
            dict(type='TensorboardVisBackend')
        )


def check_start(runner: Runner, cfg: Config) -> None:
    """Refuse a checkpoint of which MMEngine would load less than is meant."""
    start = cfg.get('load_from')
    check_agreement(start)
    if start:
        model = runner.model
        if not isinstance(model, Module):  # FlexibleRunner builds it in train()
            with fork_rng():
                model = MODELS.build(copy.deepcopy(model))
        check_load_from(model, start, exact=bool(cfg.get('resume')), hooks=runner.hooks)


def main():
    # the signals' exception is a SystemExit with the status
    StopSignals().start()
    args = parse_args()
    cfg = {}
    try:
        cfg = launch.load_config(args)
        apply_options(cfg, args)
        note = launch.choose_start(cfg, args.resume)
        report = []
        if not args.no_preflight and launch.on_first_process():
            report = check_config(cfg, 'train')
        launch.prepare_process_group(cfg)
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        log_report(report)
        if note:
            runner.logger.warning(note)
        check_start(runner, cfg)
        survive_log_errors(runner.logger)
        runner.train()
        launch.end_process_group()
    except (
        launch.LaunchError,
        PreflightError,
        CheckpointError,
        NonFiniteError,
        LabelRangeError,
    ) as error:
        sys.exit(f'tools/train.py: {error}')
    except OSError as error:
        text = explain_disk_error(error, cfg.get('work_dir', '.'))
        if text is None:
            raise
        sys.exit(f'tools/train.py: {text}')
    except Preempted as stop:
        launch.end_process_group(stop.code)
        raise  # it carries the exit status


if __name__ == '__main__':
    main()
