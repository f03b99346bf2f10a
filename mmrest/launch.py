"""What the tools do between their arguments and MMEngine's Runner.

Options that several tools have, the config that they select, the checks before a run,
mixed precision, and the process group on machines without an accelerator.
"""

import argparse
import atexit
import copy
import logging
import os
import os.path as osp
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import init_dist
from mmengine.hub import get_config
from mmengine.logging import print_log
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn
from torch.random import fork_rng

from .checkpoint import (
    CheckpointError,
    check_load_from,
    choose_checkpoint,
    force_safe_loading,
)
from .checkpoint.resume import Latest
from .config import SCOPE, find_config
from .datasets import fill_coco_fields
from .datasets.preflight import PreflightError, check_config, log_report
from .datasets.preflight.reading import walk
from .deployment.preprocessing import ExportError
from .hooks import LabelRangeError, NonFiniteError
from .optim.amp import DTYPES, AmpError
from .utils.config_types import find_toolbox, type_name
from .utils.results import ResultsError

# What each toolbox comes with, see setup.py.
EXTRAS = dict(mmdet='det', mmseg='seg', mmpretrain='cls')
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


class LaunchError(ValueError):
    """A command line or config with which a run cannot start."""


# What a tool reports as one message instead of a traceback.
EXPECTED_ERRORS = (
    LaunchError,
    AmpError,
    PreflightError,
    CheckpointError,
    NonFiniteError,
    LabelRangeError,
    ResultsError,
    ExportError,
)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose ``--amp`` takes a data type only where one follows.

    argparse alone would take the config in ``--amp config.py`` for the data type.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words):
            if word == '--amp' and not {*words[index + 1 : index + 2]} & {*DTYPES}:
                words[index] = '--amp=auto'
        return super().parse_known_args(words, namespace)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config and the options that change it."""
    parser.add_argument(
        'config',
        help='path of a config, or package::folder/name.py of an installed one',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override fields of the config, e.g. train_cfg.max_iters=100 '
        'model.backbone.init_cfg=None "a.b=[(1,2),(3,4)]"',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every tool that starts a model's Runner, but the config."""
    add_work_dir_arguments(parser)
    add_amp_argument(parser)
    parser.add_argument(
        '--launcher', choices=LAUNCHERS, default='none', help='job launcher [none]'
    )
    # Set by torch.distributed.launch; torchrun sets the variable instead.
    parser.add_argument(
        '--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS
    )


def add_work_dir_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where a run writes, and whether its data are looked at first."""
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints [work_dirs/CONFIG NAME]'
    )
    parser.add_argument(
        '--no-preflight',
        action='store_true',
        help='start without looking for missing files and mismatched classes first',
    )


def add_amp_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--amp`` to an :class:`ArgumentParser`."""
    parser.add_argument(
        '--amp',
        nargs='?',
        choices=('auto', *DTYPES),
        const='auto',
        metavar='bfloat16|float16',
        help='automatic mixed precision; alone: bfloat16 where the device has it, '
        'else float16',
    )


@contextmanager
def short_errors(tool: str, status: int = 1) -> Iterator[None]:
    """End the process with one message, and ``status``, where no traceback is needed.

    The message begins with the name of the tool.
    """
    try:
        yield
    except EXPECTED_ERRORS as error:
        print(f'{tool}: {error}', file=sys.stderr)
        _end_if_gloo(status)
        sys.exit(status)


def load_config(name: str, cfg_options: Optional[dict] = None) -> Config:
    """Read a config and override some of its fields.

    Args:
        name (str): A path, or ``package::folder/name.py`` as in ``_base_``.
        cfg_options (dict, optional): New values by dotted name.

    Raises:
        LaunchError: If there is no such config, or its toolbox is not installed.
    """
    # mmengine loads some addresses, and its OneDL twin some files, unsafely
    force_safe_loading()
    fill_coco_fields()
    cfg = _read(name)
    check_toolbox(cfg, name)
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    return cfg


def load_run_config(args: argparse.Namespace) -> Config:
    """Read the config of a run, and set its ``launcher`` and ``work_dir``.

    The options are those of :func:`add_config_arguments` and
    :func:`add_run_arguments`. It raises as :func:`load_config`.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = args.config.rpartition('::')[2]
        cfg.work_dir = osp.join('work_dirs', Path(name).stem)
    return cfg


def _read(name: str) -> Config:
    if '::' in name:
        own = name.startswith(f'{SCOPE}::')
        try:
            return Config.fromfile(find_config(name)) if own else get_config(name)
        except (ImportError, OSError, ValueError, AssertionError) as error:
            raise LaunchError(f'cannot read the config {name}: {error}') from error
    if not osp.isfile(name):
        raise LaunchError(
            f'no config {name} (looked for in {os.getcwd()}). Give a path, or '
            'package::folder/name.py for one that an installed package carries, '
            'e.g. mmrest::mask_rcnn/rest_small_fpn_1x.py.'
        )
    return Config.fromfile(name)


def check_toolbox(cfg: Config, name: str) -> None:
    """Raise a :class:`LaunchError` if the toolbox of a config is not installed."""
    try:
        toolbox = find_toolbox(cfg)
    except ImportError as error:  # of a type in a pure-Python config
        raise LaunchError(f'{name}: {error}') from error
    if toolbox in EXTRAS and find_spec(toolbox) is None:
        raise LaunchError(
            f'{name} needs {toolbox}, which is not installed. Run pip install '
            f"'mmrest[{EXTRAS[toolbox]}]', or take the packages of OneDL that "
            'requirements/onedl.txt names.'
        )


def scale_learning_rate(cfg: Config) -> None:
    """Have MMEngine scale the learning rate by the batch.

    Raises:
        LaunchError: If the config does not say for which batch the rate was chosen.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise LaunchError(
            '--auto-scale-lr needs the batch that the learning rate was chosen for. '
            'Add auto_scale_lr=dict(enable=False, base_batch_size=16) to the config.'
        )
    cfg.auto_scale_lr.enable = True


def log_for_tensorboard(cfg: Config) -> None:
    """Add TensorBoard's files to what a run logs."""
    if not cfg.get('visualizer'):  # what MMEngine takes then
        backends = [dict(type='LocalVisBackend')]
        cfg.visualizer = dict(type='Visualizer', vis_backends=backends)
    backends = list(cfg.visualizer.get('vis_backends') or [])
    cfg.visualizer.vis_backends = [*backends, dict(type='TensorboardVisBackend')]


def choose_start(cfg: Config, resume: Optional[str]) -> Optional[Latest]:
    """Write into a config which checkpoint the run continues from, and its seed.

    All processes of a distributed run call it together.

    Args:
        cfg (Config): Changed in place.
        resume (str, optional): ``'auto'`` for the newest whole one of the work
            folder, if there is one; a path; or None for what the config says.

    Raises:
        CheckpointError: If the checkpoint, or all of the work folder, are damaged.
    """
    if resume is None and cfg.get('resume') and not cfg.get('load_from'):
        resume = 'auto'
    if resume is None:
        return None
    latest = choose_checkpoint(cfg.work_dir, resume)
    # a job that is restarted again and again begins with load_from, once
    cfg.resume = latest is not None
    if latest is None:
        return None
    cfg.load_from = latest.path
    # without a seed of its own the run would draw its data in another order
    own_seed = cfg.get('randomness', {}).get('seed')
    if own_seed is None and latest.seed is not None:
        cfg.merge_from_dict({'randomness.seed': latest.seed})
    return latest


def check_start(
    runner: Any,
    cfg: Config,
    latest: Optional[Latest] = None,
    exact: Optional[bool] = None,
) -> None:
    """Refuse a checkpoint of which MMEngine would load less than is meant.

    All processes of a distributed run call it together.

    Args:
        runner (Runner | FlexibleRunner): Before ``train()`` or ``test()``.
        cfg (Config): The config that it was built from.
        latest (Latest, optional): What :func:`choose_start` returned.
        exact (bool, optional): Whether the checkpoint must fit the whole model, as for
            a test. Default: None, which is for a training: if it is resumed.

    Raises:
        CheckpointError: If the checkpoint does not fit the model.
    """
    start = latest or cfg.get('load_from')
    if not start:
        return
    model = runner.model
    if not isinstance(model, nn.Module):  # FlexibleRunner builds it later
        with fork_rng():
            model = MODELS.build(copy.deepcopy(model))
    if exact is None:
        exact = bool(cfg.get('resume'))
    check_load_from(model, start, exact=exact, hooks=runner.hooks)


def check_before_run(
    cfg: Config, args: argparse.Namespace, stage: str
) -> list[tuple[int, str]]:
    """Look for what stands in the way of a run, on the first process of a machine.

    It is what :func:`check_config` does, unless ``args.no_preflight`` is set. Its
    report is for :func:`build_runner`, which logs it.
    """
    if args.no_preflight or not on_first_process():
        return []
    return check_config(cfg, stage)


def build_runner(
    cfg: Config, notes: list[tuple[int, str]], runner_type: type[Runner] = Runner
) -> Any:
    """Make the Runner; the process group, if needed, must be there.

    Args:
        cfg (Config): The whole config.
        notes (list[tuple[int, str]]): Level and text of what goes into the Runner's
            log.
        runner_type (type[Runner]): Where the config has no ``runner_type``.
    """
    own = 'runner_type' in cfg
    runner = RUNNERS.build(cfg) if own else runner_type.from_cfg(cfg)
    log_report(notes)
    return runner


def on_first_process() -> bool:
    """Whether this is the first process of its machine, before any group exists."""
    names = ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK')
    return not any(int(os.environ.get(name, 0)) > 0 for name in names)


def start_process_group(cfg: Config) -> None:
    """Start the process group of a launcher, with gloo where there is no accelerator.

    MMEngine's launchers assume one; the Runner takes a process group that exists
    already as it is.

    Args:
        cfg (Config): With ``launcher``; nothing happens if it is ``'none'``. Without an
            accelerator ``env_cfg``, ``model_wrapper_cfg`` and SyncBN are changed.

    Raises:
        LaunchError: If there are more processes than GPUs, or if a launcher other
            than ``pytorch`` is used without an accelerator.
    """
    if cfg.launcher == 'none':
        return
    if get_device() == 'cpu':
        _prepare_for_cpus(cfg)
        torch.distributed.init_process_group('gloo')
        return
    if get_device() == 'cuda':
        rank, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if cfg.launcher == 'pytorch' and rank >= count:
            raise LaunchError(
                f'process {rank + 1} of this machine has no GPU: {count} visible. '
                'Start as many processes as GPUs (CUDA_VISIBLE_DEVICES limits them).'
            )
    env_cfg = cfg.get('env_cfg') or {}
    # first, since init_dist sets a start method that the Runner warns of
    set_multi_processing(**env_cfg.get('mp_cfg', {}), distributed=True)
    init_dist(cfg.launcher, **env_cfg.get('dist_cfg', {}))


def _prepare_for_cpus(cfg: Config) -> None:
    if cfg.launcher != 'pytorch':
        raise LaunchError(
            f'--launcher {cfg.launcher} needs GPUs and none was found. Without GPUs '
            'use tools/dist_train.sh or tools/dist_test.sh.'
        )
    norms = [
        part
        for _, part in walk(cfg.get('model', {}), 'model')
        if type_name(part) in ('SyncBN', 'MMSyncBN', 'SyncBatchNorm')
    ]
    for part in norms:
        part['type'] = 'BN'
    if norms:
        print_log(
            'SyncBN needs GPUs; here each process normalises by its own images (BN).',
            logger='current',
            level=logging.WARNING,
        )
    cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
    cfg.setdefault(
        'model_wrapper_cfg',
        dict(
            type='MMDistributedDataParallel',
            device_ids=None,  # what DistributedDataParallel wants on a CPU
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        ),
    )


def end_process_group(status: int = 0) -> None:
    """End the processes of a group, if there is one, after their work is done.

    With gloo it does not return, and ends the process with ``status``.
    """
    _end_if_gloo(status)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_if_gloo(status: int) -> None:
    """End this process of a gloo group without Python's own end.

    While Python ends, gloo's threads at times abort the process ("terminate called
    without an active exception") and so the whole finished job. What is registered for
    the end is called.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() == 'gloo':
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
