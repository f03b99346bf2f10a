"""What the tools do between their arguments and MMEngine's Runner.

That is: options that several tools share, reading the config, the checks before a run,
mixed precision, and the process group on machines without an accelerator.
"""

import argparse
import atexit
import copy
import logging
import os
import os.path as osp
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict, DictAction
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

# The extra of pip that installs each toolbox
EXTRAS = dict(mmdet='det', mmseg='seg', mmpretrain='cls')
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


class LaunchError(ValueError):
    """A command line or config with which a run cannot start."""


# Errors that tools report without a traceback
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
    """A parser whose ``--amp`` takes the next word only if it is a data type.

    argparse itself would take the config in ``--amp config.py`` for the data type.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words):
            if word == '--amp' and not {*words[index + 1 : index + 2]} & {*DTYPES}:
                words[index] = '--amp=auto'
        return super().parse_known_args(words, namespace)


class OverrideAction(DictAction):
    """MMEngine's action for ``KEY=VALUE``, with a usage error for other words."""

    def __call__(self, parser: Any, namespace: Any, values: Any, *args: Any) -> None:
        for text in values:
            if '=' not in text:
                parser.error(
                    f'{text!r} is no KEY=VALUE. Everything that follows --cfg-options '
                    'must be one, up to the next option; name files before it.'
                )
            if re.search(r'[=\[(,]\s*(dict\(|\{)', text):  # it would become a string
                parser.error(
                    f'{text}: a dict cannot be a value. Give its fields, as in '
                    'model.backbone.init_cfg.type=Pretrained, or set it in the config.'
                )
        try:
            super().__call__(parser, namespace, values, *args)
        except (AssertionError, RecursionError) as error:
            parser.error(f'{" ".join(values)}: brackets do not match. {error}')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config, and the option that overrides its fields."""
    parser.add_argument(
        'config',
        help='path of a config, or package::folder/name.py of an installed one',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OverrideAction,
        metavar='KEY=VALUE',
        help='override fields of the config, e.g. train_cfg.max_iters=100 '
        'model.backbone.init_cfg=None "a.b=[(1,2),(3,4)]"',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tools that start a model's Runner, except the config."""
    add_work_dir_arguments(parser)
    add_amp_argument(parser)
    parser.add_argument(
        '--launcher', choices=LAUNCHERS, default='none', help='job launcher [none]'
    )
    # set by torch.distributed.launch; torchrun sets a variable instead
    parser.add_argument(
        '--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS
    )


def add_work_dir_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the work folder, and the option to skip the check of the data."""
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
    """End the process with a message and ``status``, instead of a traceback.

    This applies to ``EXPECTED_ERRORS``. The message begins with the name of the tool.
    """
    try:
        yield
    except EXPECTED_ERRORS as error:
        print(f'{tool}: {error}', file=sys.stderr)
        _end_if_gloo(status)
        sys.exit(status)


def load_config(
    name: str, cfg_options: Optional[dict] = None, needs_model: bool = True
) -> Config:
    """Read a config, and override some of its fields.

    Args:
        name (str): A path, or ``package::folder/name.py`` as in ``_base_``.
        cfg_options (dict, optional): New values by dotted name.
        needs_model (bool): Whether a config without ``model`` is refused.
            Default: True.

    Raises:
        LaunchError: If there is no such config, it cannot be read, the options do not
            fit it, or its toolbox is not installed.
    """
    # MMEngine loads some addresses unsafely, and OneDL's MMEngine some files
    force_safe_loading()
    fill_coco_fields()
    cfg = _read(name)
    check_toolbox(cfg, name)
    if cfg_options:
        _make_room(cfg, cfg_options)
        try:
            cfg.merge_from_dict(cfg_options)
        except (KeyError, TypeError) as error:
            raise LaunchError(
                f'--cfg-options do not fit {name}: {error.args[0]}'
            ) from error
    if needs_model and not isinstance(cfg.get('model'), dict):
        raise LaunchError(
            f'{name} has no model, but {cfg.get("model")!r}. Give a whole config, such '
            'as those in configs/, not one in configs/_base_.'
        )
    return cfg


def _make_room(cfg: Config, options: dict) -> None:
    """Replace None by a dict where options set fields of it, as MMEngine refuses."""
    for key in options:
        part: Any = cfg
        for name in key.split('.')[:-1]:
            if isinstance(part, (list, tuple)):
                inside = name.isdecimal() and int(name) < len(part)
                part = part[int(name)] if inside else None
            elif isinstance(part, (dict, Config)) and name in part:
                if part[name] is None:
                    part[name] = ConfigDict()
                part = part[name]
            else:
                break


def load_run_config(args: argparse.Namespace) -> Config:
    """Read the config of a run, and set its ``launcher`` and ``work_dir``.

    The options are those of :func:`add_config_arguments` and :func:`add_run_arguments`.
    It raises the errors of :func:`load_config`.
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
    if '::' not in name and not osp.isfile(name):
        raise LaunchError(
            f'no config {name} (looked for in {os.getcwd()}). Give a path, or '
            'package::folder/name.py for one that an installed package carries, '
            'e.g. mmrest::mask_rcnn/rest_small_fpn_1x.py.'
        )
    try:
        if '::' in name and not name.startswith(f'{SCOPE}::'):
            return get_config(name)
        return Config.fromfile(find_config(name) if '::' in name else name)
    except Exception as error:  # MMEngine's for what is no config, and the user's own
        raise LaunchError(f'cannot read the config {name}: {_where(error)}') from error


def _where(error: Exception) -> str:
    """The message of an error, with the line of a config or module that raised it."""
    reason = str(error.args[0] if isinstance(error, KeyError) else error)
    lines = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name == '<module>'
    ]
    if not lines or isinstance(error, (ImportError, SyntaxError)):
        return reason or type(error).__name__
    file, number, _, text = lines[-1]
    return f'{type(error).__name__}: {reason}, in {file}, line {number}: {text}'


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
    """Let MMEngine scale the learning rate by the batch size.

    Raises:
        LaunchError: If the config does not name the batch size of its learning rate.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise LaunchError(
            '--auto-scale-lr needs the batch size of the learning rate. '
            'Add auto_scale_lr=dict(enable=False, base_batch_size=16) to the config.'
        )
    cfg.auto_scale_lr.enable = True


def log_for_tensorboard(cfg: Config) -> None:
    """Add TensorBoard to the log of a run."""
    if not cfg.get('visualizer'):  # MMEngine's default
        backends = [dict(type='LocalVisBackend')]
        cfg.visualizer = dict(type='Visualizer', vis_backends=backends)
    backends = list(cfg.visualizer.get('vis_backends') or [])
    cfg.visualizer.vis_backends = [*backends, dict(type='TensorboardVisBackend')]


def choose_start(cfg: Config, resume: Optional[str]) -> Optional[Latest]:
    """Set the checkpoint from which a run continues, and its seed, in the config.

    All processes of a distributed run must call it.

    Args:
        cfg (Config): Changed in place.
        resume (str, optional): A path, ``'auto'`` for the newest complete checkpoint in
            the work folder, if there is one, or None for the setting of the config.

    Raises:
        CheckpointError: If the checkpoint, or all in the work folder, are damaged.
    """
    if resume is None and cfg.get('resume') and not cfg.get('load_from'):
        resume = 'auto'
    if resume is None:
        return None
    latest = choose_checkpoint(cfg.work_dir, resume)
    # a restarted job must not begin with load_from again
    cfg.resume = latest is not None
    if latest is None:
        return None
    cfg.load_from = latest.path
    # without a seed, the run would draw its data in another order
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
    """Check that MMEngine will load all that is needed of a checkpoint.

    All processes of a distributed run must call it.

    Args:
        runner (Runner | FlexibleRunner): Before ``train()`` or ``test()``.
        cfg (Config): The config of the runner.
        latest (Latest, optional): The result of :func:`choose_start`.
        exact (bool, optional): Whether the checkpoint must fit the whole model.
            Default: None, true for a training that is resumed.

    Raises:
        CheckpointError: If the checkpoint does not fit the model.
    """
    start = latest or cfg.get('load_from')
    if not start:
        return
    model = runner.model
    if not isinstance(model, nn.Module):  # FlexibleRunner builds the model later
        with fork_rng():
            model = MODELS.build(copy.deepcopy(model))
    if exact is None:
        exact = bool(cfg.get('resume'))
    check_load_from(model, start, exact=exact, hooks=runner.hooks)


def check_before_run(
    cfg: Config, args: argparse.Namespace, stage: str
) -> list[tuple[int, str]]:
    """Check config and data on the first process of a machine, by :func:`check_config`.

    It does nothing if ``args.no_preflight`` is set. Pass the report to
    :func:`build_runner`, which logs it.
    """
    if args.no_preflight or not is_first_local_process():
        return []
    return check_config(cfg, stage)


def build_runner(
    cfg: Config, notes: list[tuple[int, str]], runner_type: type[Runner] = Runner
) -> Any:
    """Build the Runner; if a process group is needed, it must exist.

    Args:
        cfg (Config): The whole config.
        notes (list[tuple[int, str]]): Levels and texts to log.
        runner_type (type[Runner]): Used if the config has no ``runner_type``.
    """
    own = 'runner_type' in cfg
    runner = RUNNERS.build(cfg) if own else runner_type.from_cfg(cfg)
    log_report(notes)
    return runner


def is_first_local_process() -> bool:
    """Whether this is the first process of its machine; needs no process group."""
    names = ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK')
    return not any(int(os.environ.get(name, 0)) > 0 for name in names)


def start_process_group(cfg: Config) -> None:
    """Start the process group of a launcher, with gloo if there is no accelerator.

    MMEngine's launchers need an accelerator, but the Runner accepts a process group
    that exists.

    Args:
        cfg (Config): With ``launcher``. If it is ``'none'``, nothing happens. Without
            an accelerator, ``env_cfg``, ``model_wrapper_cfg`` and SyncBN are changed.

    Raises:
        LaunchError: If there are more processes than GPUs, or if a launcher other than
            ``pytorch`` is used without an accelerator.
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
    # before init_dist, which sets a start method that the Runner warns about
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
            device_ids=None,  # as DistributedDataParallel needs on CPUs
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        ),
    )


def end_process_group(status: int = 0) -> None:
    """End the process group, if there is one, after the run.

    With gloo it does not return, but ends the process with ``status``.
    """
    _end_if_gloo(status)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_if_gloo(status: int) -> None:
    """End this process of a gloo group without Python's own shutdown.

    During Python's shutdown, threads of gloo sometimes abort the process ("terminate
    called without an active exception"), and so the finished job. Functions of atexit
    are called.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() == 'gloo':
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
