"""What ``tools/train.py`` and ``tools/test.py`` share.

Arguments that every MMEngine tool has, the config they select, and the process
group on machines without an accelerator. The scope (mmdet, mmseg, mmpretrain)
comes from the config alone.
"""

import argparse
import atexit
import logging
import os
import os.path as osp
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.logging import print_log

from .checkpoint import find_latest, force_safe_loading, inspect_latest
from .config import SCOPE, find_config

# What each toolbox comes with, see setup.py.
EXTRAS = dict(mmdet='det', mmseg='seg', mmpretrain='cls')
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


class LaunchError(ValueError):
    """A command line or config with which a run cannot start."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every tool that starts a Runner."""
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints [work_dirs/CONFIG NAME]'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override fields of the config, e.g. train_cfg.max_iters=100 '
        'model.backbone.init_cfg=None "a.b=[(1,2),(3,4)]"',
    )
    parser.add_argument(
        '--no-preflight',
        action='store_true',
        help='start without looking for missing files and mismatched classes first',
    )
    parser.add_argument(
        '--launcher', choices=LAUNCHERS, default='none', help='job launcher [none]'
    )
    # Set by torch.distributed.launch; torchrun sets the variable instead.
    parser.add_argument(
        '--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS
    )


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply the options of :func:`add_common_arguments`.

    Args:
        args (Namespace): Parsed arguments with ``config``, a path or
            ``package::folder/name.py`` as in ``_base_``.

    Returns:
        Config: With ``launcher`` and ``work_dir`` set.

    Raises:
        LaunchError: If there is no such config, or its toolbox is not installed.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    # mmengine loads some addresses, and its OneDL twin some files, unsafely
    force_safe_loading()
    cfg = _read(args.config)
    check_toolbox(cfg, args.config)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = args.config.rpartition('::')[2]
        cfg.work_dir = osp.join('work_dirs', Path(name).stem)
    return cfg


def _read(name: str) -> Config:
    if '::' in name:
        try:
            if name.startswith(f'{SCOPE}::'):
                return Config.fromfile(find_config(name))
            return get_config(name)
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
    """Check that the toolbox of a config's ``default_scope`` is installed.

    Raises:
        LaunchError: If it is not.
    """
    toolbox = cfg.get('default_scope')
    if toolbox in EXTRAS and find_spec(toolbox) is None:
        raise LaunchError(
            f'{name} needs {toolbox}, which is not installed. Run pip install '
            f"'mmrest[{EXTRAS[toolbox]}]', or take the packages of OneDL that "
            'requirements/onedl.txt names.'
        )


def choose_start(cfg: Config, resume: Optional[str]) -> str:
    """Write into a config which checkpoint the run continues from, and its seed.

    Args:
        cfg (Config): Changed in place.
        resume (str, optional): ``'auto'`` for the newest whole one of the work
            folder, if there is one; a path; or None for what the config says.

    Returns:
        str: What the user should know about the choice; empty if nothing.

    Raises:
        CheckpointError: If the checkpoint, or all of the work folder, are damaged.
    """
    if resume is None and cfg.get('resume') and not cfg.get('load_from'):
        resume = 'auto'
    if resume is None:
        return ''
    latest = find_latest(cfg.work_dir) if resume == 'auto' else inspect_latest(resume)
    # a job that is restarted again and again begins with load_from, once
    cfg.resume = latest is not None
    if latest is None:
        return ''
    cfg.load_from = latest.path
    # without a seed of its own the run would draw its data in another order
    own_seed = cfg.get('randomness', {}).get('seed')
    if own_seed is None and latest.seed is not None:
        cfg.merge_from_dict({'randomness.seed': latest.seed})
    return latest.warning


def on_first_process() -> bool:
    """Whether this is the first process of its machine, before any group exists."""
    for name in ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'):
        if int(os.environ.get(name, 0)) > 0:
            return False
    return True


def prepare_process_group(cfg: Config) -> None:
    """Check the number of devices, and use gloo where there is no accelerator.

    MMEngine's launchers assume one; the Runner takes a process group that exists
    already as it is.

    Raises:
        LaunchError: If there are more processes than GPUs, or if a launcher other
            than ``pytorch`` is used without an accelerator.
    """
    if cfg.launcher == 'none':
        return
    if get_device() == 'cuda':
        rank, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if cfg.launcher == 'pytorch' and rank >= count:
            raise LaunchError(
                f'process {rank + 1} of this machine has no GPU: {count} visible. '
                'Start as many processes as GPUs (CUDA_VISIBLE_DEVICES limits them).'
            )
        return
    if get_device() != 'cpu':
        return
    if cfg.launcher != 'pytorch':
        raise LaunchError(
            f'--launcher {cfg.launcher} needs GPUs and none was found. Without GPUs '
            'use tools/dist_train.sh or tools/dist_test.sh.'
        )
    if _replace_sync_bn(cfg.get('model', {})):
        print_log(
            'SyncBN needs GPUs; here each process normalises by its own images (BN).',
            logger='current',
            level=logging.WARNING,
        )
    cfg.setdefault('env_cfg', {}).setdefault('dist_cfg', {})['backend'] = 'gloo'
    cfg.setdefault(
        'model_wrapper_cfg',
        dict(
            type='MMDistributedDataParallel',
            device_ids=None,  # what DistributedDataParallel wants on a CPU
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        ),
    )
    torch.distributed.init_process_group('gloo')


def end_process_group(status: int = 0) -> None:
    """End the processes of a group, if there is one, after their work is done.

    While Python ends, gloo's threads at times abort the process ("terminate called
    without an active exception") and so the whole finished job. With gloo this
    function therefore does not return: what is registered for the end is called,
    and the process ends without Python's own end.

    Args:
        status (int): Exit status of the process. Default: 0.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() != 'gloo':
        torch.distributed.destroy_process_group()
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _replace_sync_bn(part) -> int:
    """Write BN for SyncBN, as MMEngine does to the model of a single process."""
    if isinstance(part, (list, tuple)):
        return sum(_replace_sync_bn(value) for value in part)
    if not isinstance(part, dict):
        return 0
    found = part.get('type') in ('SyncBN', 'MMSyncBN')
    if found:
        part['type'] = 'BN'
    return found + sum(_replace_sync_bn(value) for value in part.values())
