"""Changes of a config for the options of ``tools/test.py``."""

import copy
import os
import os.path as osp
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from ..launch import LaunchError
from .config_types import find_toolbox, type_name
from .disk import explain_unwritable

# Options with which each toolbox's hook draws, and the option for the folder (None: the
# visualizer has it)
DRAWING: dict[str, tuple[dict, Optional[str]]] = {
    'DetVisualizationHook': (dict(draw=True), 'test_out_dir'),
    'SegVisualizationHook': (dict(draw=True, interval=1), None),
    'VisualizationHook': (dict(enable=True, interval=1), 'out_dir'),
}


class EvaluationRunner(Runner):
    """A Runner that only tests.

    If asked for its iteration, MMEngine's Runner builds the training loop with its
    data, and mmseg's visualization hook does ask.
    """

    iter = epoch = 0


def draw_predictions(
    cfg: Config,
    show: bool = False,
    show_dir: Optional[str] = None,
    wait_time: float = 2,
) -> None:
    """Let the visualization hook of a config draw all predictions.

    Args:
        cfg (Config): Changed in place.
        show (bool): Whether windows are opened. Default: False.
        show_dir (str, optional): Folder in ``WORK_DIR/TIME`` for the images.
        wait_time (float): Seconds to show each image. Default: 2.

    Raises:
        LaunchError: If the config has no such hook.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization') or {}
    if type_name(hook) not in DRAWING:
        raise LaunchError(
            '--show and --show-dir need default_hooks.visualization to be one of '
            f'{", ".join(DRAWING)}; found {type_name(hook) or None}.'
        )
    options, folder = DRAWING[type_name(hook)]
    hook.update(options, show=show, wait_time=wait_time)
    if show_dir and folder:
        hook[folder] = show_dir
    elif show_dir:
        backends = list(cfg.visualizer.get('vis_backends') or [])
        if not any(type_name(b) == 'LocalVisBackend' for b in backends):
            backends.append(ConfigDict(type='LocalVisBackend'))
        cfg.visualizer.vis_backends = backends
        for backend in backends:
            if type_name(backend) == 'LocalVisBackend':
                # The backend writes below WORK_DIR/TIME/vis_data.
                backend['img_save_dir'] = osp.join(osp.pardir, show_dir)


def augment_images(cfg: Config) -> None:
    """Use test-time augmentation, by ``tta_model`` and ``tta_pipeline`` of the config.

    Raises:
        LaunchError: If one of them is missing, or the model's predictions cannot be
            merged.
    """
    missing = [name for name in ('tta_model', 'tta_pipeline') if not cfg.get(name)]
    if missing:
        raise LaunchError(f'--tta needs {" and ".join(missing)} in the config.')
    has_masks = (cfg.model.get('roi_head') or {}).get('mask_head')
    if type_name(cfg.tta_model) == 'DetTTAModel' and has_masks:
        raise LaunchError(
            "--tta: mmdet's DetTTAModel merges boxes only and refuses a detector with "
            'a mask head. Test without --tta.'
        )
    wrapped = copy.deepcopy(cfg.tta_model)  # ** would replace the types that MMEngine
    wrapped.module = cfg.model  # keeps to write the config
    cfg.model = wrapped
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def write_predictions(cfg: Config, path: str) -> None:
    """Let the evaluation save all predictions.

    ``path`` is ``NAME.pkl``, or ``NAME.json`` for COCO's format, or for a segmentor the
    folder of its label images. The metrics in ``test_evaluator`` are changed in place.

    Raises:
        LaunchError: If the evaluator cannot save such a file, or nothing can be written
            in its folder.
    """
    problem = explain_unwritable(osp.dirname(path))
    if problem:  # else known after the last image
        raise LaunchError(f'--out {path}: {problem} Give another path.')
    evaluator: Any = cfg.get('test_evaluator') or []
    inner = isinstance(evaluator, dict) and 'metrics' in evaluator
    metrics = evaluator['metrics'] if inner else evaluator
    metrics = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
    kinds = {type_name(metric): metric for metric in metrics}
    if path.endswith(('.pkl', '.pickle')):
        detector = find_toolbox(cfg) == 'mmdet'  # masks are saved as RLE
        kind = 'mmdet.DumpDetResults' if detector else 'DumpResults'
        metrics.append(ConfigDict(type=kind, out_file_path=path))
    elif 'IoUMetric' in kinds and not osp.splitext(path)[1]:
        if osp.isdir(path) and os.listdir(path):
            raise LaunchError(
                f'--out {path}: the folder is not empty, and its files might be '
                'overwritten. Give a new one.'
            )
        kinds['IoUMetric']['output_dir'] = path
    elif 'CocoMetric' in kinds and path.endswith('.json'):
        kinds['CocoMetric']['outfile_prefix'] = path[: -len('.json')]
    else:
        raise LaunchError(
            f'--out {path}: give a name that ends in .pkl, or in .json where the '
            'evaluator is CocoMetric, or a folder where it is IoUMetric.'
        )
    if inner:
        evaluator['metrics'] = metrics
    else:
        cfg.test_evaluator = metrics
