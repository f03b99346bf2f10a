"""Evaluate a checkpoint with the metrics of a config, with MMEngine's Runner."""

import argparse
import os
import os.path as osp
import sys

from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmrest import launch
from mmrest.checkpoint import CheckpointError, check_load_from
from mmrest.hooks import LabelRangeError
from mmrest.datasets.preflight import PreflightError, check_config, log_report

# How each package's hook is told to draw and where to (None: by the visualizer).
DRAWING = {
    'DetVisualizationHook': (dict(draw=True), 'test_out_dir'),
    'SegVisualizationHook': (dict(draw=True, interval=1), None),
    'VisualizationHook': (dict(enable=True, interval=1), 'out_dir'),
}


class EvaluationRunner(Runner):
    """A Runner that tests alone.

    MMEngine's builds the training loop, with its data, when it is asked for its
    iteration, and mmseg's hook asks when it draws.
    """

    iter = epoch = 0


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config',
        help='path of a config, or package::folder/name.py of an installed one',
    )
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
    launch.add_common_arguments(parser)
    return parser.parse_args()


def draw(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization') or {}
    if hook.get('type') not in DRAWING:
        raise launch.LaunchError(
            '--show and --show-dir need default_hooks.visualization to be one of '
            f'{", ".join(DRAWING)}; found {hook.get("type")}.'
        )
    options, folder = DRAWING[hook['type']]
    hook.update(options, show=args.show, wait_time=args.wait_time)
    if args.show_dir and folder:
        hook[folder] = args.show_dir
    elif args.show_dir:
        # The backend writes below WORK_DIR/TIME/vis_data.
        target = osp.join(osp.pardir, args.show_dir)
        backends = list(cfg.visualizer.get('vis_backends') or [])
        local = [b for b in backends if b.get('type') == 'LocalVisBackend']
        if not local:
            local = [ConfigDict(type='LocalVisBackend')]
            backends += local
        for backend in local:
            backend.img_save_dir = target
        cfg.visualizer.vis_backends = backends


def evaluators(cfg: Config) -> list:
    """The config's metrics, as a list that may be changed and added to."""
    if not isinstance(cfg.test_evaluator, (list, tuple)):
        cfg.test_evaluator = [cfg.test_evaluator]
    cfg.test_evaluator = list(cfg.test_evaluator)
    return cfg.test_evaluator


def augment(cfg: Config) -> None:
    missing = [name for name in ('tta_model', 'tta_pipeline') if name not in cfg]
    if missing:
        raise launch.LaunchError(f'--tta needs {" and ".join(missing)} in the config.')
    if cfg.tta_model.type == 'DetTTAModel' and cfg.model.get('roi_head', {}).get(
        'mask_head'
    ):
        raise launch.LaunchError(
            "--tta: mmdet's DetTTAModel merges boxes only and refuses a detector with "
            'a mask head. Test without --tta.'
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def write_results(cfg: Config, path: str) -> None:
    metrics = evaluators(cfg)
    if path.endswith(('.pkl', '.pickle')):
        detector = cfg.get('default_scope') == 'mmdet'  # whose masks go out as RLE
        kind = 'DumpDetResults' if detector else 'DumpResults'
        metrics.append(ConfigDict(type=kind, out_file_path=path))
        return
    iou = [metric for metric in metrics if metric.get('type') == 'IoUMetric']
    if iou and not osp.splitext(path)[1]:
        if osp.isdir(path) and os.listdir(path):
            raise launch.LaunchError(
                f'--out {path}: the folder is not empty, and its files might be '
                'overwritten. Give a new one.'
            )
        iou[0]['output_dir'] = path
        return
    coco = [metric for metric in metrics if metric.get('type') == 'CocoMetric']
    if not path.endswith('.json') or not coco:
        raise launch.LaunchError(
            f'--out {path}: give a name that ends in .pkl, or in .json where the '
            'evaluator is CocoMetric, or a folder where it is IoUMetric.'
        )
    coco[0]['outfile_prefix'] = path[: -len('.json')]


def main():
    args = parse_args()
    try:
        cfg = launch.load_config(args)
        cfg.load_from = args.checkpoint
        cfg.resume = False
        if args.show or args.show_dir:
            draw(cfg, args)
        report = []
        if not args.no_preflight and launch.on_first_process():
            report = check_config(cfg, 'test')
        if args.tta:
            augment(cfg)
        if args.out:
            write_results(cfg, args.out)
        launch.prepare_process_group(cfg)
        if 'runner_type' in cfg:
            runner = RUNNERS.build(cfg)
        else:
            runner = EvaluationRunner.from_cfg(cfg)
        log_report(report)
        check_load_from(runner.model, cfg.load_from, hooks=runner.hooks)
        runner.test()
        launch.end_process_group()
    except (
        launch.LaunchError,
        PreflightError,
        CheckpointError,
        LabelRangeError,
    ) as error:
        sys.exit(f'tools/test.py: {error}')


if __name__ == '__main__':
    main()
