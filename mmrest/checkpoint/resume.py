"""Choose the checkpoint from which a run continues: the newest complete one.

The first process reads it, once, and tells the others.
"""

import os
import re
import zipfile
from typing import Any, Callable, NamedTuple, Optional, TypeVar

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from torch import Tensor

from ..utils.text import shorten
from .comparison import describe_defects
from .reading import CheckpointError, RefusedError, Source, read_checkpoint
from .state_dict import as_mmengine_reads

T = TypeVar('T')

NAMES = ('iter_{}.pth', 'epoch_{}.pth')
# entries without which MMEngine cannot continue a run
TRAINING_STATE = ('meta', 'state_dict', 'message_hub')


class Latest(NamedTuple):
    """A checkpoint to continue from."""

    path: Source  # the file
    seed: Optional[int]  # of the run that wrote it
    iteration: int  # its iteration; -1 if unknown
    # why it is not the one that ``last_checkpoint`` names; empty if it is
    warning: str = ''
    # names and shapes of its weights, on the meta device; None if another process
    # read it
    state_dict: Optional[dict[str, Tensor]] = None
    defects: tuple[str, ...] = ()  # what is wrong with the values of its weights


def choose_checkpoint(work_dir: str, resume: Source = 'auto') -> Optional[Latest]:
    """Choose the checkpoint to continue from, the same one for all processes.

    All processes of a distributed run must call it. The first one reads the file.

    Args:
        work_dir (str): The folder of the run.
        resume (str | Path): A path, or ``'auto'`` for the result of
            :func:`find_latest`. Default: ``'auto'``.

    Returns:
        Latest | None: None if nothing was saved yet.

    Raises:
        CheckpointError: On all processes, if the file cannot be used or one of them
            does not see it.
    """
    found: list[Optional[Latest]] = [None]

    def choose() -> Optional[Latest]:
        latest = find_latest(work_dir) if resume == 'auto' else inspect_latest(resume)
        found[0] = latest
        return latest._replace(state_dict=None, defects=()) if latest else None

    latest = on_first_process(choose)
    if latest is None:
        return None
    _check_visible(os.fspath(latest.path))
    return found[0] or latest


def find_latest(work_dir: str) -> Optional[Latest]:
    """Find the checkpoint from which a run in a work folder continues.

    It is the one that ``last_checkpoint`` names. If that is damaged or missing, it is
    the newest complete one in the same folder or in the work folder, by the numbers in
    the names ``iter_*.pth`` and ``epoch_*.pth``. A checkpoint is complete if safe
    loading can read it, its checksums are right, and it holds the state of a training.

    Args:
        work_dir (str): The folder.

    Returns:
        Latest | None: None if nothing was saved yet.

    Raises:
        CheckpointError: If there are checkpoints, but no complete one.
    """
    named = _named(work_dir)
    damaged: dict[str, str] = {}
    folders = {os.path.abspath(work_dir)}
    templates = list(NAMES)
    if named is not None:
        try:
            return inspect_latest(named)
        except RefusedError:
            raise
        except CheckpointError as error:
            damaged[named] = str(error)
        if '://' not in named:
            folders.add(os.path.dirname(named))
        numbered = re.fullmatch(r'(.*?)\d+(\D*)', os.path.basename(named))
        if numbered:
            own = '{}'.join(numbered.groups())
            templates = list(dict.fromkeys([own, *NAMES]))
    found = [_newest_complete(folders, name, damaged) for name in templates]
    complete = [latest for latest in found if latest is not None]
    if complete:
        latest = max(complete, key=lambda item: item.iteration)
        reasons = [f'last_checkpoint names {named}, which cannot be used.']
        if named is None:
            reasons = [f'{os.path.join(work_dir, "last_checkpoint")} names no file.']
        reasons += [f'{reason.removesuffix(".")}.' for reason in damaged.values()]
        warning = (
            f'{" ".join(reasons)} Continuing from {latest.path}, the newest complete '
            f'checkpoint (iteration {latest.iteration}).'
        )
        return latest._replace(warning=warning)
    if not damaged:
        return None
    reasons = [f'{path}: {reason}' for path, reason in damaged.items()]
    raise CheckpointError(
        f'{work_dir} holds no complete checkpoint to continue from. '
        f'{shorten(reasons, 4)} To start from the beginning instead, choose another '
        '--work-dir or leave out --resume; to continue from a file elsewhere, name '
        'it: --resume PATH.'
    )


def inspect_latest(path: Source) -> Latest:
    """Check that a run can continue from a checkpoint.

    Web addresses and folders, which hold sharded checkpoints, are not checked.

    Raises:
        CheckpointError: If the file is damaged, refused by safe loading, or lacks the
            state of a training, or if the path is the folder of a run.
    """
    path = os.fspath(path)
    if os.path.isfile(os.path.join(path, 'last_checkpoint')):
        raise CheckpointError(
            f'{path} is the folder of a run, not a checkpoint. To continue from its '
            f'newest checkpoint: --work-dir {path} --resume. Or name a file in it.'
        )
    if '://' in path or (os.path.isdir(path) and os.listdir(path)):
        return Latest(path, None, -1)
    try:
        checkpoint = read_checkpoint(path)
    except RefusedError as error:
        if not error.is_for_newer_torch:
            raise
        return Latest(path, None, -1)
    broken = _broken_part(path)
    if broken is not None:
        raise CheckpointError(f'{path} is damaged: the checksum of {broken} is wrong')
    missing = _missing_state(checkpoint)
    if missing:
        raise _ForeignError(
            f'{path} holds no state of a training ({missing} is missing), perhaps '
            'only weights. To start a new run with them, leave out --resume and give '
            '--cfg-options load_from=PATH.'
        )
    meta = checkpoint['meta']
    tensors = as_mmengine_reads(checkpoint, path)
    return Latest(
        path,
        meta.get('seed'),
        meta['iter'],
        state_dict={
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
            for name, tensor in tensors.items()
        },
        defects=tuple(describe_defects(tensors)),
    )


def on_first_process(action: Callable[[], T]) -> T:
    """Run a function on the first process, and return its result on all.

    Raises:
        CheckpointError: On the other processes, if it raised an error on the first.
    """
    box: list[Any] = [None, '']
    error: Optional[Exception] = None
    if is_main_process():
        try:
            box[0] = action()
        except Exception as raised:
            error = raised
            box[1] = str(raised) or type(raised).__name__
    broadcast_object_list(box)
    if error is not None:
        raise error
    if box[1]:
        raise CheckpointError(box[1])
    return box[0]


def _check_visible(path: str) -> None:
    """Check that all processes see the same file."""
    size: object = None
    if '://' in path or os.path.isdir(path):
        size = 'not a file'
    elif os.path.exists(path):
        size = os.path.getsize(path)
    sizes = all_gather_object(size)
    if len(set(sizes)) > 1:
        listed = (
            f'process {rank}: {"missing" if found is None else f"{found} bytes"}'
            for rank, found in enumerate(sizes)
        )
        raise CheckpointError(
            f'the processes do not see the same checkpoint {path} ({shorten(listed)}). '
            'They must see the same folder; wait until its file server has caught up, '
            'or copy the file to each machine.'
        )


class _ForeignError(CheckpointError):
    """A checkpoint that holds weights only."""


def _named(work_dir: str) -> Optional[str]:
    """The path in ``last_checkpoint``, if there is one."""
    try:
        with open(os.path.join(work_dir, 'last_checkpoint'), 'rb') as file:
            text = os.fsdecode(file.read()).strip().strip('\0')
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f'{work_dir} cannot be read: {error}') from error
    return text or None


def _newest_complete(
    folders: set[str], template: str, damaged: dict[str, str]
) -> Optional[Latest]:
    """Inspect numbered files from the newest on, and collect the damaged ones."""
    pattern = r'(\d+)'.join(re.escape(part) for part in template.split('{}'))
    numbered = [
        (int(match[1]), os.path.join(folder, name))
        for folder in folders
        if os.path.isdir(folder)
        for name in os.listdir(folder)
        if (match := re.fullmatch(pattern, name))
    ]
    for _, path in sorted(numbered, reverse=True):
        if path in damaged:
            continue
        try:
            return inspect_latest(path)
        except _ForeignError:
            continue  # weights that the user put there
        except RefusedError:
            raise
        except CheckpointError as error:
            damaged[path] = str(error)
    return None


def _missing_state(checkpoint: Any) -> Optional[str]:
    if not isinstance(checkpoint, dict):
        return 'everything'
    for key in TRAINING_STATE:
        if not isinstance(checkpoint.get(key), dict):
            return key
    return None if isinstance(checkpoint['meta'].get('iter'), int) else 'meta.iter'


def _broken_part(path: str) -> Optional[str]:
    """The first part of a file with a wrong checksum, since torch checks none."""
    options = getattr(torch.serialization, 'get_crc32_options', lambda: True)
    if not options() or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return f'a part ({error})'
