"""Folders that a run writes into: writable, and without checkpoints of another run."""

import os.path as osp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoint.resume import NAMES
from ...utils.disk import explain_unwritable
from ...utils.text import shorten


def check_folders(cfg: Any) -> Iterator[str]:
    """Write a small file into the work folder and the folder of the checkpoints."""
    for name, folder in (
        ('--work-dir', cfg.get('work_dir')),
        ('default_hooks.checkpoint.out_dir', _out_dir(cfg)),
    ):
        problem = explain_unwritable(str(folder)) if folder else None
        if problem:
            yield (
                f'{name}: {problem} Make room or make it writable, or choose another '
                f'folder with {name}.'
            )


def note_checkpoints(cfg: Any) -> Iterator[str]:
    """Name checkpoints that a training from the start may overwrite."""
    if cfg.get('resume') or not cfg.get('work_dir'):
        return
    folder = Path(cfg.work_dir)
    if _out_dir(cfg):  # MMEngine makes a folder of the same name there
        folder = Path(_out_dir(cfg)) / osp.basename(osp.abspath(cfg.work_dir))
    names = [p.name for name in NAMES for p in folder.glob(name.format('*'))]
    if names:
        yield (
            f'{folder} holds {shorten(sorted(names))} of an earlier run. This run '
            'starts from the beginning, and overwrites files of the same name. To '
            'continue the earlier run, stop this one and pass --resume; to keep its '
            'files, choose another --work-dir.'
        )


def _out_dir(cfg: Any) -> Any:
    return ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('out_dir')
