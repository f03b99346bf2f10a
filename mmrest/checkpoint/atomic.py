"""Files that are written whole or not at all, whenever the process is killed.

A file is written under another name beside its place, brought to the disk, and
only then given its name, which replaces an older file in one step. Whoever looks,
before or after a kill or a power failure, finds the old content or the new.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, Union

from mmengine.dist import all_gather_object, is_main_process

from ..utils.disk import free_space
from .reading import CheckpointError

PathLike = Union[str, os.PathLike]

# what a killed process leaves behind ends in this
UNFINISHED = '.mmrest-unfinished'

# what torch's zip writer raises instead of an OSError
_WRITER_ERRORS = ('PytorchStreamWriter', 'inline_container', 'iostream error')
# of file systems that cannot bring a folder to the disk
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written; what was there before is whole."""


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[str]:
    """Write a file or folder whole or not at all, from one process.

    Yields:
        str: The name to write under. When the block is left, what is there gets the
        name ``path``, in place of what had it; after an exception it is removed.
    """
    try:
        yield _beside(path)
        _put_in_place(path)
    except BaseException:
        _remove_quietly(_beside(path))
        raise


def atomic_write(path: PathLike, content: Union[bytes, memoryview]) -> None:
    """Write a file whole or not at all; its folder is created.

    Raises:
        CheckpointWriteError: If that fails. An older file is untouched.
    """
    with _described(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with atomic_path(path) as beside:
            Path(beside).write_bytes(content)


def atomic_save(path: str, save: Callable[[str], None]) -> None:
    """Let a function write a file or folder, whole or not at all.

    All processes of a distributed run call it together, with the same path. It returns
    on all of them or raises on all of them, so that none waits for one that has failed.
    ``save`` is called on each with the name to write under; it may write on the first
    process only.

    Raises:
        CheckpointWriteError: If a process could not write, on every process. An
            older file or folder is untouched.
    """
    is_main = is_main_process()
    for step in (
        lambda: save(_beside(path)),
        lambda: _put_in_place(path) if is_main else None,  # when all have written
    ):
        problem = None
        try:
            with _described(path):
                step()
        except CheckpointWriteError as error:
            problem = str(error)
        # every process waits for the others
        problems = [each for each in all_gather_object(problem) if each is not None]
        if problems:
            if is_main:
                _remove_quietly(_beside(path))
            raise CheckpointWriteError(problems[0])


def remove_unfinished(folder: PathLike) -> list[str]:
    """Remove what processes that were killed while writing have left in a folder.

    The names that were removed are returned; subfolders are not looked at.
    """
    try:
        names = sorted(n for n in os.listdir(folder) if n.endswith(UNFINISHED))
    except FileNotFoundError:
        return []
    for name in names:
        _remove_quietly(os.path.join(folder, name))
    return names


def _beside(path: PathLike) -> str:
    return f'{os.fspath(path)}{UNFINISHED}'


def _put_in_place(path: PathLike) -> None:
    """Give what was written beside ``path`` its name, once it is on the disk."""
    beside = Path(_beside(path))
    is_folder = beside.is_dir()
    for part in [*beside.rglob('*'), beside] if is_folder else [beside]:
        _sync(part)
    if is_folder and os.path.isdir(path):  # a folder replaces an empty one only
        shutil.rmtree(path)
    os.replace(beside, path)
    _sync(Path(path).absolute().parent)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == 'nt':
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)


def _remove_quietly(path: str) -> None:
    with contextlib.suppress(OSError):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.remove(path)


@contextlib.contextmanager
def _described(path: PathLike) -> Iterator[None]:
    """Say what an error of writing means; others pass."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            sign in str(error) for sign in _WRITER_ERRORS
        ):
            raise
        code = getattr(error, 'errno', None)
        reason = os.strerror(code) if code else str(error)
        space = free_space(os.path.dirname(os.path.abspath(path)))
        advice = (
            'Free space, or keep fewer checkpoints '
            '(default_hooks.checkpoint.max_keep_ckpts), or put them elsewhere '
            '(default_hooks.checkpoint.out_dir)'
        )
        if code in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = 'Make the folder writable, or choose another with --work-dir'
        elif code == errno.EDQUOT:
            space += ' Your quota is used up.'
        raise CheckpointWriteError(
            f'{path} could not be written: {reason}. {space} Earlier checkpoints are '
            f'whole, and nothing of this one is left. {advice}; then continue with '
            '--resume.'
        ) from error
