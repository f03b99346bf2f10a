"""Check that a run can write into its folders."""

import errno
import os
import os.path as osp
import tempfile
from collections.abc import Iterator
from typing import Any

from ...utils.disk import free_space

# about the size of log and config before the first checkpoint
_PROBE_BYTES = 64 * 1024


def check_folders(cfg: Any) -> Iterator[str]:
    """Write a small file into the work folder and the folder of the checkpoints.

    The file has no name and is removed. For a folder that does not exist, its parent is
    checked.
    """
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    for name, folder in (
        ('--work-dir', cfg.get('work_dir')),
        ('default_hooks.checkpoint.out_dir', checkpoint.get('out_dir')),
    ):
        if not folder or '://' in str(folder):
            continue
        folder = existing = osp.abspath(str(folder))
        while not osp.lexists(existing):
            existing = osp.dirname(existing)
        try:
            if not osp.isdir(existing):
                raise NotADirectoryError(errno.ENOTDIR, 'it is a file', existing)
            with tempfile.TemporaryFile(dir=existing) as probe:
                probe.write(bytes(_PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            where = folder if existing == folder else f'{folder} (in {existing})'
            yield (
                f'{name}: nothing can be written in {where}: {error.strerror}. '
                f'{free_space(existing)} Make room or make it writable, or choose '
                f'another folder with {name}.'
            )
