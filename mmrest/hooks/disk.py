"""What to say when the disk takes no more: of logs, for checkpoints say it themselves.

See :mod:`mmrest.checkpoint.atomic` for those.
"""

import errno
import logging
import os
import shutil
import sys
from typing import Optional

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def explain_disk_error(error: OSError, folder: str) -> Optional[str]:
    """Say what a failing write means for a run.

    Args:
        error (OSError): What was raised.
        folder (str): The work folder.

    Returns:
        str | None: File, reason, free space and what to do; None if the error is of
        another kind.
    """
    if error.errno not in _DISK_ERRORS:
        return None
    where = error.filename or f'a file in {os.path.abspath(folder)}'
    return (
        f'{where} could not be written: {error.strerror}. {free_space(folder)} '
        'Checkpoints that were saved before are whole. Free space, or choose another '
        'folder with --work-dir; then continue with --resume.'
    )


def free_space(folder: str) -> str:
    """A sentence with the free bytes of the file system that a folder is on.

    Args:
        folder (str): It or its nearest existing parent is looked at.

    Returns:
        str: The sentence.
    """
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        return f'{shutil.disk_usage(folder).free:,} bytes are free in {folder}.'
    except OSError as error:
        return f'{folder} cannot be looked at ({error.strerror}).'


def survive_log_errors(logger: logging.Logger) -> None:
    """Let a log file that cannot be written cost one line, and not the run.

    Python prints a traceback for each line that a log file does not take.

    Args:
        logger (Logger): Its file handlers are changed.
    """
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = _SaysOnce(handler.baseFilename)


class _SaysOnce:
    def __init__(self, path: str) -> None:
        self._path, self._said = path, False

    def __call__(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            error = sys.exc_info()[1]
            reason = getattr(error, 'strerror', None) or repr(error)
            sys.stderr.write(
                f'The log {self._path} cannot be written: {reason}. '
                f'{free_space(os.path.dirname(self._path))} The run goes on '
                'without these lines.\n'
            )
