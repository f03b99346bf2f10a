"""From a path or URL to the object that the checkpoint holds."""

import os
import re
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional, Union
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

from ..utils.text import shorten
from .diagnosis import foreign_kind, why_damaged
from .errors import CheckpointError, RefusedError
from .safe_globals import (
    FORCE_SAFE,
    FORCE_UNSAFE,
    mmengine_globals_allowed,
    stand_ins_only,
)

Source = Union[str, os.PathLike]

_ENVIRONMENT = threading.RLock()

# how the versions of torch name what they refuse
REFUSALS = (
    r'GLOBAL (\S+) was not an allowed global',
    r'unsupported GLOBAL (\S+) whose module',
    r'Unsupported class (\S+)',
    # an allowed name that was used in a way that is not allowed
    r'(?:Trying to call|Can only \w+|mmrest refuses) (.+)',
)


def read_checkpoint(source: Source, map_location: Any = 'cpu') -> Any:
    """Read a checkpoint, with safe loading always on.

    Args:
        source (str | Path): A file, an ``http(s)://`` address (kept in the cache
            of ``torch.hub``), or a name that mmengine knows, as
            ``torchvision://resnet50``.
        map_location (str | torch.device | dict | callable): As in
            ``torch.load``. Default: ``'cpu'``.

    Returns:
        Any: What the file holds, usually a dict.

    Raises:
        CheckpointError: If there is no such file, it is no checkpoint, it is
            damaged, or it holds objects that safe loading refuses.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise CheckpointError(
            f'a checkpoint is a path or a URL, but {source!r} was given'
        )
    source = os.fspath(source)
    if re.match(r'https?://', source):
        path = _download(source)
        where = f'{source} (kept as {path}; delete that file to download it again)'
    elif '://' in source:
        return _read_through_mmengine(source, map_location)
    else:
        path = where = os.path.expanduser(source)
    return read_file(path, where, map_location)


def read_file(path: str, where: str, map_location: Any) -> Any:
    """Read a file of the file system, which messages call ``where``."""
    if os.path.isdir(path):
        raise CheckpointError(
            f'the checkpoint {where} is a folder; name the file in it'
            f'{_list_checkpoints(path)}'
        )
    if not os.path.exists(path):
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            found = f'its folder {folder} does not exist either'
        else:
            found = f'its folder exists{_list_checkpoints(folder)}'
        raise CheckpointError(f'the checkpoint {where} does not exist; {found}')
    try:
        foreign = foreign_kind(path)
    except OSError as error:
        raise CheckpointError(f'{where} cannot be read: {error}') from error
    if foreign:
        raise CheckpointError(f'{where} is not a usable checkpoint. {foreign}')
    try:
        with stand_ins_only():
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        _raise_if_refused(error, where)
        raise CheckpointError(
            f'{where} is not a usable checkpoint. {why_damaged(path, str(error))}'
        ) from error


def _list_checkpoints(folder: str) -> str:
    names = sorted(name for name in os.listdir(folder) if name.endswith('.pth'))
    return f', with {shorten(names)}' if names else ', without a .pth file'


def _download(url: str) -> str:
    """Fetch a URL into the cache of ``torch.hub``, as mmengine does."""
    name = os.path.basename(urlparse(url).path)
    if not name:
        raise CheckpointError(f'{url} does not end in the name of a file')
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, name)
    if get_rank() == 0:
        try:
            _fetch(url, folder, path)
        finally:
            barrier()
    else:
        barrier()
        # a machine that does not share the cache fetches its own
        _fetch(url, folder, path)
    return path


def _fetch(url: str, folder: str, path: str) -> None:
    if os.path.exists(path):
        return
    print_log(f'Downloading {url} to {path}', logger='current')
    try:
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=os.isatty(2))
    except (urllib.error.URLError, OSError) as error:
        raise CheckpointError(
            f'{url} could not be downloaded: {error}. Check the address and the '
            'network, or download the file by hand and name it by its path.'
        ) from error


def _read_through_mmengine(source: str, map_location: Any) -> Any:
    """Let mmengine find what it has a name for, with safe loading forced."""
    try:
        with stand_ins_only(), weights_only_forced():
            return CheckpointLoader.load_checkpoint(source, map_location)
    except ImportError:  # of the backend's own library, which it names
        raise
    except KeyError as error:
        raise CheckpointError(f'mmengine knows no checkpoint {source}') from error
    except Exception as error:
        _raise_if_refused(error, source)
        raise CheckpointError(f'{source} could not be loaded: {error}') from error


@contextmanager
def weights_only_forced() -> Iterator[None]:
    """Have every ``torch.load`` be a safe one, whatever its caller asks for.

    mmengine's loader of URLs goes through ``torch.hub``, whose default is not safe.
    """
    # one thread at a time: another's end must not switch safety off here
    with _ENVIRONMENT:
        names = (FORCE_SAFE, FORCE_UNSAFE)
        before = {name: os.environ.pop(name, None) for name in names}
        os.environ[FORCE_SAFE] = '1'
        try:
            yield
        finally:
            del os.environ[FORCE_SAFE]
            os.environ.update({k: v for k, v in before.items() if v is not None})


def _raise_if_refused(error: Exception, where: str) -> None:
    """Raise a ``RefusedError`` if that is what torch's error means."""
    name = _refused_object(str(error))
    if name is None:
        return
    advice = (
        'If you trust where the file comes from, save its weights alone with the '
        "program that wrote it: torch.save({'state_dict': model.state_dict()}, path)."
    )
    if name.startswith(('mmengine.', 'numpy.')) and not mmengine_globals_allowed():
        advice = (
            f'torch {torch.__version__} cannot read the training state of mmengine '
            'safely; torch 2.6 or later can. Or save the weights alone.'
        )
    # without torch's own text, which advises to switch safety off
    raise RefusedError(
        f'{where} was not loaded. It holds an object that safe loading refuses: '
        f'{name}. Nothing of it was run. {advice}',
        name,
    ) from None


def _refused_object(message: str) -> Optional[str]:
    for pattern in REFUSALS:
        match = re.search(pattern, message)
        if match:
            return match.group(1).strip()
    return None
