"""Which checkpoint of a work folder a run continues from: the newest whole one."""

import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from mmengine.dist import all_gather_object

from ..utils.text import shorten
from .errors import CheckpointError, RefusedError
from .reading import Source, read_checkpoint
from .safe_globals import mmengine_globals_allowed

NAMES = ('iter_{}.pth', 'epoch_{}.pth')
# what MMEngine needs to continue a run
TRAINING_STATE = ('meta', 'state_dict', 'message_hub')


class Latest(NamedTuple):
    """A checkpoint to continue from.

    Attributes:
        path (str): The file.
        seed (int | None): Of the run that wrote it.
        iteration (int): How far that run was; -1 if not known.
        warning (str): Why it is not the one that ``last_checkpoint`` names; empty
            if it is.
    """

    path: str
    seed: Optional[int]
    iteration: int
    warning: str = ''


def find_latest(work_dir: str) -> Optional[Latest]:
    """Find the checkpoint with which a run in a work folder continues.

    It is the one that ``last_checkpoint`` names. If that is damaged or gone, it is
    the newest whole one beside it or in the work folder; the numbers in the names
    ``iter_*.pth`` and ``epoch_*.pth`` decide, not the time of writing. Whole means
    that it can be read with safe loading, that its checksums are right, and that it
    holds the state of a training.

    Args:
        work_dir (str): The folder.

    Returns:
        Latest | None: None if nothing was saved yet.

    Raises:
        CheckpointError: If there are checkpoints and none of them is whole.
    """
    named = _named(work_dir)
    damaged: dict[str, str] = {}
    if named is not None:
        try:
            return inspect_latest(named)
        except RefusedError:
            raise
        except CheckpointError as error:
            damaged[named] = str(error)
    folders = [os.path.dirname(named)] if named and '://' not in named else []
    if os.path.abspath(work_dir) not in folders:
        folders.append(os.path.abspath(work_dir))
    found = [
        latest
        for name in _templates(named)
        if (latest := _newest_whole(folders, name, damaged)) is not None
    ]
    if found:
        latest = max(found, key=lambda item: item.iteration)
        return latest._replace(warning=_warn(work_dir, named, latest, damaged))
    if not damaged:
        return None
    reasons = [f'{path}: {reason}' for path, reason in damaged.items()]
    raise CheckpointError(
        f'{work_dir} holds no whole checkpoint to continue from. '
        f'{shorten(reasons, 4)} To start from the beginning instead, choose another '
        '--work-dir or leave out --resume; to continue from a file elsewhere, name '
        'it: --resume PATH.'
    )


def inspect_latest(path: Source) -> Latest:
    """Make sure that a run can continue from a checkpoint.

    Args:
        path (str | Path): A file; a folder (sharded) or an address is believed.

    Returns:
        Latest: With what the checkpoint says of its run.

    Raises:
        CheckpointError: If the file is damaged, refused by safe loading, or holds
            no state of a training.
    """
    path = os.fspath(path)
    if '://' in path or (os.path.isdir(path) and os.listdir(path)):
        return Latest(path, None, -1)
    try:
        checkpoint = read_checkpoint(path)
    except RefusedError as error:
        if mmengine_globals_allowed() or not error.name.startswith('mmengine.'):
            raise
        return Latest(path, None, -1)  # an older torch reads none of mmengine's
    broken = _broken_part(path)
    if broken is not None:
        raise CheckpointError(f'{path} is damaged: the checksum of {broken} is wrong')
    missing = _missing_state(checkpoint)
    if missing:
        raise _ForeignError(
            f'{path} holds no state of a training ({missing} is missing), perhaps '
            'weights alone. To start a new run with them, leave out --resume and give '
            '--cfg-options load_from=PATH.'
        )
    meta = checkpoint['meta']
    return Latest(path, meta.get('seed'), meta['iter'])


def check_agreement(path: Optional[str]) -> None:
    """Make sure that all processes continue from the same file.

    Args:
        path (str, optional): The choice of this process.

    Raises:
        CheckpointError: On all processes, if they differ.
    """
    choices = all_gather_object(path)
    if len(set(choices)) > 1:
        listed = (f'process {rank}: {choice}' for rank, choice in enumerate(choices))
        raise CheckpointError(
            'the processes would continue from different checkpoints ('
            f'{shorten(listed)}). They must see the same folder; wait until its file '
            'server has caught up, or name one file: --resume PATH.'
        )


class _ForeignError(CheckpointError):
    """A checkpoint of weights alone."""


def _named(work_dir: str) -> Optional[str]:
    """The path in ``last_checkpoint``, if there is one."""
    try:
        with open(os.path.join(work_dir, 'last_checkpoint'), 'rb') as file:
            text = file.read().decode(errors='replace').strip().strip('\0')
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f'{work_dir} cannot be read: {error}') from error
    return text or None


def _templates(named: Optional[str]) -> list[str]:
    """Name patterns to look for: that of the named file and the usual ones."""
    templates = list(NAMES)
    parts = re.fullmatch(r'(.*?)(\d+)(\D*)', os.path.basename(named or ''))
    if parts:
        own = '{}'.join((parts[1], parts[3]))
        templates = [own, *(name for name in NAMES if name != own)]
    return templates


def _newest_whole(
    folders: list[str], template: str, damaged: dict[str, str]
) -> Optional[Latest]:
    for path in _newest_first(folders, template):
        if path in damaged:
            continue
        try:
            return inspect_latest(path)
        except _ForeignError:
            continue  # weights that someone put there
        except RefusedError:
            raise
        except CheckpointError as error:
            damaged[path] = str(error)
    return None


def _newest_first(folders: list[str], template: str) -> Iterator[str]:
    pattern = r'(\d+)'.join(re.escape(part) for part in template.split('{}'))
    found = []
    for folder in folders:
        names = os.listdir(folder) if os.path.isdir(folder) else ()
        for name in names:
            match = re.fullmatch(pattern, name)
            if match:
                found.append((int(match[1]), os.path.join(folder, name)))
    return (path for _, path in sorted(found, reverse=True))


def _missing_state(checkpoint: Any) -> Optional[str]:
    if not isinstance(checkpoint, dict):
        return 'everything'
    for key in TRAINING_STATE:
        if not isinstance(checkpoint.get(key), dict):
            return key
    return None if isinstance(checkpoint['meta'].get('iter'), int) else 'meta.iter'


def _broken_part(path: str) -> Optional[str]:
    """The first part of a file whose checksum is wrong; torch compares none."""
    options = getattr(torch.serialization, 'get_crc32_options', lambda: True)
    if not options() or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return f'a part ({error})'


def _warn(
    work_dir: str, named: Optional[str], latest: Latest, damaged: dict[str, str]
) -> str:
    if named is None:
        reasons = [f'{os.path.join(work_dir, "last_checkpoint")} names no file.']
    else:
        reasons = [f'last_checkpoint names {named}, which cannot be used.']
    reasons += [_sentence(reason) for reason in damaged.values()]
    return (
        f'{" ".join(reasons)} Continuing from {latest.path}, the newest that is whole '
        f'(iteration {latest.iteration}).'
    )


def _sentence(text: str) -> str:
    return text if text.endswith('.') else f'{text}.'
