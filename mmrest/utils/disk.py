"""Messages about full disks and folders that cannot be written, except for checkpoints.

For those, see :mod:`mmrest.checkpoint.atomic`.
"""

import errno
import logging
import os
import os.path as osp
import shutil
import sys
import tempfile
from typing import Optional

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# about the size of log and config before the first checkpoint
_PROBE_BYTES = 64 * 1024


def explain_unwritable(folder: str) -> Optional[str]:
    """Say why nothing can be written in a folder; None if it can.

    A small file without a name is written and removed. For a folder that does not
    exist, its parent is checked. Web addresses are not checked.
    """
    if '://' in folder:
        return None
    folder = existing = osp.abspath(folder)
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
        return (
            f'nothing can be written in {where}: {error.strerror}. '
            f'{free_space(existing)}'
        )
    return None


def explain_disk_error(error: OSError, folder: str) -> Optional[str]:
    """Explain a failed write of a run; None if the disk is not the reason."""
    if error.errno not in _DISK_ERRORS:
        return None
    where = error.filename or f'a file in {os.path.abspath(folder)}'
    return (
        f'{where} could not be written: {error.strerror}. {free_space(folder)} '
        'Checkpoints that were saved before are intact. Free space, or choose another '
        'folder with --work-dir; then continue with --resume.'
    )


def free_space(folder: str) -> str:
    """Say how many bytes are free in a folder, which need not exist yet."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        return f'{shutil.disk_usage(folder).free:,} bytes are free in {folder}.'
    except OSError as error:
        return f'{folder} cannot be accessed ({error.strerror}).'


def survive_log_errors(logger: logging.Logger) -> None:
    """Report once that a log file cannot be written, and continue the run.

    By default, Python prints a traceback for each line. The file handlers of the logger
    are changed.
    """
    failed = set()

    def handle_error(path: str) -> None:
        if path in failed:
            return
        failed.add(path)
        error = sys.exc_info()[1]
        reason = getattr(error, 'strerror', None) or repr(error)
        space = free_space(os.path.dirname(path))
        sys.stderr.write(
            f'The log {path} cannot be written: {reason}. {space} The run continues '
            'without these lines.\n'
        )

    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            path = handler.baseFilename
            handler.handleError = lambda record, path=path: handle_error(path)  # type: ignore
