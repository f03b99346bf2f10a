"""Can the folders that a run writes into be written?"""

import errno
import os
import os.path as osp
import tempfile

from ...utils.disk import free_space

# about what the log and the config take before the first checkpoint
_PROBE_BYTES = 64 * 1024


def check_folders(cfg) -> list:
    """Write a small file into the work folder and into that of the checkpoints.

    It has no name and leaves nothing; a folder that does not exist is tried in the
    one that it would be made in.
    """
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    fields = {
        '--work-dir': cfg.get('work_dir'),
        'default_hooks.checkpoint.out_dir': checkpoint.get('out_dir'),
    }
    return [
        finding
        for name, folder in fields.items()
        if folder and '://' not in str(folder)
        for finding in _check(name, osp.abspath(str(folder)))
    ]


def _check(name: str, folder: str) -> list:
    existing = folder
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
        return [
            f'{name}: nothing can be written in {where}: {error.strerror}. '
            f'{free_space(existing)} Make room or make it writable, or choose another '
            f'folder with {name}.'
        ]
    return []
