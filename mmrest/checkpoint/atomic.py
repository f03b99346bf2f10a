"""Write files completely or not at all, even if the process is killed.

A file is written under a temporary name in the same folder, synced to the disk, and
then renamed, which replaces an older file in one step. At any time, also after a kill
or a power failure, there is either the old content or the new one.
"""

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Union

import torch
from mmengine.dist import all_gather_object, is_main_process

from ..utils.disk import free_space
from .reading import CheckpointError

PathLike = Union[str, os.PathLike]

# suffix of the temporary names
UNFINISHED = '.mmrest-unfinished'

# texts in the RuntimeError that torch's zip writer raises instead of an OSError
_WRITER_ERRORS = ('PytorchStreamWriter', 'inline_container', 'iostream error')
# errors of file systems that cannot sync a folder
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written; older files are intact."""


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[str]:
    """Write a file or folder completely or not at all, from one process.

    Yields:
        str: The temporary name to write under. When the block ends, it is renamed to
        ``path``; after an exception it is removed.

    Raises:
        OSError: With the name of the file, which errors of a full disk lack.
    """
    try:
        yield _temporary_name(path)
        _put_in_place(path)
    except BaseException as error:
        _remove_quietly(_temporary_name(path))
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise


def atomic_write(path: PathLike, content: Union[bytes, memoryview]) -> None:
    """Write a file completely or not at all, and create its folder.

    Raises:
        CheckpointWriteError: If that fails. An older file is intact.
    """
    with _described(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with atomic_path(path) as temporary:
            Path(temporary).write_bytes(content)


def torch_bytes(content: Any) -> bytes:
    """The content of a file of ``torch.save``, which reports full disks badly."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def atomic_save(path: str, save: Callable[[str], None]) -> None:
    """Let a function write a file or folder, completely or not at all.

    All processes of a distributed run must call it, with the same path. It returns on
    all of them or raises on all of them, so that none waits for one that has failed.
    ``save`` is called on each process with the temporary name. It may write on the
    first one only.

    Raises:
        CheckpointWriteError: On all processes, if one could not write. An older file or
            folder is intact.
    """
    is_main = is_main_process()
    for step in (
        lambda: save(_temporary_name(path)),
        lambda: _put_in_place(path) if is_main else None,  # when all have written
    ):
        problem = None
        try:
            with _described(path):
                step()
        except CheckpointWriteError as error:
            problem = str(error)
        problems = [each for each in all_gather_object(problem) if each is not None]
        if problems:
            if is_main:
                _remove_quietly(_temporary_name(path))
            raise CheckpointWriteError(problems[0])


def remove_unfinished(folder: PathLike) -> list[str]:
    """Remove files that killed processes have left unfinished in a folder.

    Returns their names. Subfolders are not searched.
    """
    try:
        names = sorted(n for n in os.listdir(folder) if n.endswith(UNFINISHED))
    except FileNotFoundError:
        return []
    for name in names:
        _remove_quietly(os.path.join(folder, name))
    return names


def _temporary_name(path: PathLike) -> str:
    return f'{os.fspath(path)}{UNFINISHED}'


def _put_in_place(path: PathLike) -> None:
    """Sync what was written under the temporary name, and rename it to ``path``."""
    temporary = Path(_temporary_name(path))
    is_folder = temporary.is_dir()
    for part in [*temporary.rglob('*'), temporary] if is_folder else [temporary]:
        _sync(part)
    if is_folder and os.path.isdir(path):  # os.replace needs an empty one
        shutil.rmtree(path)
    os.replace(temporary, path)
    _sync(Path(path).absolute().parent)


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == 'nt':
        return  # Windows cannot open folders
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
    """Explain errors of writing; others pass."""
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
        elif code == errno.ENOENT:
            advice = (
                'Another run in the same folder may have removed it; give each a '
                '--work-dir of its own'
            )
        elif code == errno.EDQUOT:
            space += ' Your quota is used up.'
        raise CheckpointWriteError(
            f'{path} could not be written: {reason}. {space} Earlier checkpoints are '
            f'intact, and no part of this one is left. {advice}; then continue with '
            '--resume.'
        ) from error
