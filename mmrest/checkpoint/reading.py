"""Read a checkpoint from a path or URL, with safe loading.

The order is: errors, reading, and the diagnosis of a file that cannot be read.
"""

import os
import re
import urllib.error
import zipfile
from typing import Any, Optional, Union
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

from ..utils.text import shorten
from .paddle_files import is_paddle, read_paddle
from .safe_globals import mmengine_globals_allowed, stand_ins_only, weights_only_forced
from .safetensors_files import is_safetensors, read_safetensors

Source = Union[str, os.PathLike]

# how the versions of torch name what they refuse
_REFUSALS = (
    r'GLOBAL (\S+) was not an allowed global',
    r'unsupported GLOBAL (\S+) whose module',
    r'Unsupported class (\S+)',
    # an allowed name that was used in a way that is not allowed
    r'(?:Trying to call|Can only \w+|mmrest refuses) (.+)',
)


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit.

    The message says what is wrong, what was found and what to do.
    """


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint does not exist or cannot be reached."""


class RefusedError(CheckpointError):
    """Safe loading refuses an object (``name``) in a checkpoint."""

    def __init__(self, message: str, name: str = '') -> None:
        super().__init__(message)
        self.name = name

    @property
    def is_for_newer_torch(self) -> bool:
        """Whether it is part of MMEngine's training state and needs a newer torch."""
        return not mmengine_globals_allowed() and self.name.startswith('mmengine.')


def read_checkpoint(source: Source, map_location: Any = 'cpu') -> Any:
    """Read a checkpoint, always with safe loading.

    Args:
        source (str | Path): A file of ``torch.save``, of safetensors, or of
            PaddlePaddle (``.pdparams``); an ``http(s)://`` address, which is kept in
            the cache of ``torch.hub``; or an address that MMEngine knows, such as
            ``torchvision://resnet50``.
        map_location (str | torch.device | dict | callable): As in ``torch.load``.
            Default: ``'cpu'``.

    Returns:
        Any: The content of the file, usually a dict. A safetensors file gives
        ``state_dict`` and ``meta``.

    Raises:
        CheckpointNotFoundError: If there is no such file. It is also a
            ``FileNotFoundError``.
        CheckpointError: If it is not a checkpoint, is damaged, or holds objects that
            safe loading refuses.
    """
    path = local_file(source)
    if path is None:
        return _read_through_mmengine(os.fspath(source), map_location)
    where = os.fspath(source)
    if is_url(where):
        where = f'{where} (kept as {path}; delete that file to download it again)'
    return read_file(path, where, map_location)


def local_file(source: Source) -> Optional[str]:
    """Return the path of a checkpoint's file, after downloading it if needed.

    The path need not exist. It is None for addresses that MMEngine has to read.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise CheckpointError(
            f'a checkpoint is a path or a URL, but {source!r} was given'
        )
    source = os.fspath(source)
    if is_url(source):
        return _download(source)
    return None if '://' in source else os.path.expanduser(source)


def is_url(source: str) -> bool:
    """Whether a source is a web address."""
    return source.startswith(('http://', 'https://'))


def read_file(path: str, where: str, map_location: Any = 'cpu') -> Any:
    """Like :func:`read_checkpoint`, for a file that messages call ``where``."""
    if os.path.isdir(path):
        raise CheckpointNotFoundError(
            f'the checkpoint {where} is a folder; name the file in it'
            f'{_list_checkpoints(path)}'
        )
    if not os.path.exists(path):
        folder = os.path.dirname(os.path.abspath(path))
        found = f'its folder {folder} does not exist either'
        if os.path.isdir(folder):
            found = f'its folder exists{_list_checkpoints(folder)}'
        from ..weights import advise  # which reads through this module

        raise CheckpointNotFoundError(
            f'the checkpoint {where} does not exist; {found}. {advise(path)}'.strip()
        )
    try:
        safetensors = is_safetensors(path)
        foreign = None if safetensors else _foreign_kind(path)
    except OSError as error:
        raise CheckpointNotFoundError(f'{where} cannot be read: {error}') from error
    if foreign:
        raise CheckpointError(f'{where} is not a usable checkpoint. {foreign}')
    try:
        # a dict or callable means something to torch.load alone
        named = isinstance(map_location, (str, torch.device))
        device = map_location if named else 'cpu'
        if safetensors:
            return read_safetensors(path, device)
        if is_paddle(path):
            return read_paddle(path, device)
        with stand_ins_only():
            return torch.load(path, map_location=map_location, weights_only=True)
    except ImportError as error:
        raise CheckpointError(f'{where}: {error}') from error
    except Exception as error:
        _raise_if_refused(error, where)
        reason = _why_damaged(path, str(error) or type(error).__name__)
        raise CheckpointError(
            f'{where} is not a usable checkpoint. {reason}'
        ) from error


def _list_checkpoints(folder: str) -> str:
    ends = ('.pth', '.safetensors', '.pdparams')
    names = sorted(name for name in os.listdir(folder) if name.endswith(ends))
    return f', with {shorten(names)}' if names else ', without a .pth file'


def _download(url: str) -> str:
    """Fetch a URL into the cache of ``torch.hub``, as MMEngine does."""
    name = os.path.basename(urlparse(url).path)
    if not name:
        raise CheckpointError(f'{url} does not end in the name of a file')
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
    if get_rank() > 0:
        barrier()  # a machine that does not share the cache fetches its own
    try:
        if not os.path.exists(path):
            print_log(f'Downloading {url} to {path}', logger='current')
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=os.isatty(2))
    except (urllib.error.URLError, OSError) as error:
        raise CheckpointNotFoundError(
            f'{url} could not be downloaded: {error}. Check the address and the '
            'network, or download the file by hand and name it by its path.'
        ) from error
    finally:
        if get_rank() == 0:
            barrier()
    return path


def _read_through_mmengine(source: str, map_location: Any) -> Any:
    """Let MMEngine find what it has a name for, with safe loading forced."""
    try:
        with stand_ins_only(), weights_only_forced():
            return CheckpointLoader.load_checkpoint(source, map_location)
    # ImportError: of the backend's own library, which it names
    except (CheckpointError, ImportError):
        raise
    except (KeyError, FileNotFoundError) as error:
        raise CheckpointNotFoundError(
            f'mmengine knows no checkpoint {source}'
        ) from error
    except Exception as error:
        _raise_if_refused(error, source)
        raise CheckpointError(f'{source} could not be loaded: {error}') from error


def _raise_if_refused(error: Exception, where: str) -> None:
    """Raise a ``RefusedError`` if that is what torch's error means."""
    matches = (re.search(pattern, str(error)) for pattern in _REFUSALS)
    name = next((match[1].strip() for match in matches if match), None)
    if name is None:
        return
    advice = (
        'If you trust where the file comes from, save only its weights with the '
        "program that wrote it, as torch.save({'state_dict': model.state_dict()}, "
        'path) does.'
    )
    if name.startswith(('mmengine.', 'numpy.')) and not mmengine_globals_allowed():
        advice = (
            f'torch {torch.__version__} cannot read the training state of mmengine '
            'safely; torch 2.6 or later can. Or save only the weights.'
        )
    # without torch's own text, which advises to switch safety off
    raise RefusedError(
        f'{where} was not loaded. It holds an object that safe loading refuses: '
        f'{name}. Nothing of it was run. {advice}',
        name,
    ) from None


_DAMAGED_ADVICE = 'Copy or download it again and compare its size with the source.'
_UNPACK_ADVICE = 'Unpack it and name the checkpoint inside.'
# first bytes, what begins so, what to do
_KINDS = (
    (
        b'<',
        'an HTML or XML page',
        'The server answered with a page (a login, a confirmation, an error) instead '
        'of the file. Download the file in a browser and name it by its path.',
    ),
    (
        b'version https://git-lfs',
        'a Git LFS pointer, which stands for the file',
        'Run `git lfs pull` in the repository that it comes from.',
    ),
    (b'\x1f\x8b', 'a gzip archive', _UNPACK_ADVICE),
    (b'7z\xbc\xaf', 'a 7-Zip archive', _UNPACK_ADVICE),
    (b'Rar!', 'a RAR archive', _UNPACK_ADVICE),
)


def _foreign_kind(path: str) -> Optional[str]:
    """Say what a file is, and what to do, if it must not be passed to ``torch.load``.

    That includes TorchScript archives, which hold code, and the tar format of PyTorch
    before 0.4, which cannot be read safely.
    """
    head = _read_head(path)
    if not head:
        return f'The file is empty (0 bytes). {_DAMAGED_ADVICE}'
    if not head.strip(b'\0'):
        return (
            f'The file begins with {len(head)} zero bytes, as after an interrupted '
            f'copy. {_DAMAGED_ADVICE}'
        )
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n')
    for start, kind, advice in _KINDS:
        if text.startswith(start):
            return _found(path, f'It is {kind}', advice)
    if head[257:262] == b'ustar':
        return _found(
            path,
            'It is a tar archive, perhaps a checkpoint of PyTorch before 0.4',
            'Unpack it, or load and save it again with PyTorch 1.x.',
        )
    if not (head.startswith(b'PK') and zipfile.is_zipfile(path)):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rsplit('/', 1)[-1] for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        return _found(path, f'It is a damaged zip archive ({error})')
    if 'constants.pkl' in names:
        return _found(
            path,
            'It is a TorchScript archive, which holds code',
            'Save the state dict of the model that it was made from.',
        )
    if 'data.pkl' not in names:
        return _found(path, 'It is a zip archive of other content', _UNPACK_ADVICE)
    return None


def _why_damaged(path: str, reason: str) -> str:
    """Say what is wrong with a file that cannot be read to its end, and what to do."""
    head = _read_head(path)
    is_zip, is_pickle = head.startswith(b'PK\x03\x04'), head.startswith(b'\x80')
    if is_safetensors(path):
        kind = f'It is a safetensors file of which a part is damaged ({reason})'
    elif is_paddle(path):
        kind = f'It is not what paddle.save writes, or a part is damaged ({reason})'
    elif not (is_zip or is_pickle):
        advice = 'Name a checkpoint that torch.save wrote.'
        return _found(path, 'It is not a checkpoint', advice)
    elif 'Unsupported operand' in reason:
        return _found(
            path,
            'It is a pickle of another kind than torch.save writes by default, '
            'which safe loading cannot read',
            'Save it again with torch.save and its default pickle_protocol. A file of '
            'PaddlePaddle is read if its name ends in .pdparams.',
        )
    elif is_zip and zipfile.is_zipfile(path):
        kind = 'It is a checkpoint of which a part is damaged'
    elif is_zip:
        kind = (
            'It begins as a checkpoint and lacks its end, so it was copied or '
            'downloaded in part'
        )
    else:
        kind = (
            'It begins as a pickle, so it is a checkpoint in the format of PyTorch '
            'before 1.6 that was copied in part, or no checkpoint'
        )
    return _found(path, kind)


def _found(path: str, kind: str, advice: str = _DAMAGED_ADVICE) -> str:
    size = os.path.getsize(path)
    return f'{kind} (first bytes {_read_head(path)[:16]!r}, {size:,} bytes). {advice}'


def _read_head(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read(512)
