"""Download published ImageNet weights to where the configs expect them::

    python -m mmrest.weights rest_base    # writes pretrained/rest_base.pth
    python -m mmrest.weights --list

The order is: sources, download, checks, command line.

The authors offer their files on Baidu, from which a program cannot download, and those
of ResT also on Google Drive. PaddleViT offers its converted files of ResT and ResTV2 on
Google Drive, and has evaluated them again.
"""

import argparse
import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError, read_state_dict
from .checkpoint.atomic import atomic_path, torch_bytes
from .checkpoint.comparison import compare, describe_defects, explain, tensors_of
from .checkpoint.reading import is_url
from .models import ResT, ResTV2
from .utils.text import shorten

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# ---------------------------------------------------------------- sources

FOLDER = 'pretrained'
DRIVE = 'https://drive.google.com'
BAIDU = 'https://pan.baidu.com/s'
BAIDU_CODE = 'rest'
ORIGINS = dict(
    authors="the authors' folder on Google Drive",
    paddlevit="the file of PaddleViT's port on Google Drive",
)


class Source(NamedTuple):
    """A file that a program can download.

    Attributes:
        origin (str): A key of ``ORIGINS``.
        drive_id (str): Id of a file or folder on Google Drive.
        suffix (str): The format: ``'.pth'`` or ``'.pdparams'``.
        top1 (float, optional): ImageNet top-1 in percent, as measured by the origin.
        is_folder (bool): Whether ``drive_id`` is a folder, in which the file is
            searched.
        size (int, optional): Expected size of the file in bytes.
        sha256 (str, optional): Expected SHA-256 of the file.
    """

    origin: str
    drive_id: str
    suffix: str
    top1: Optional[float] = None
    is_folder: bool = False
    size: Optional[int] = None
    sha256: Optional[str] = None


class Model(NamedTuple):
    """A published ImageNet model.

    Attributes:
        kind (str): ``'ResT'`` or ``'ResTV2'``.
        arch (str): Its ``arch``.
        top1 (float): ImageNet top-1 in percent, as published.
        baidu (str): Name of the authors' file on Baidu.
        sources (tuple[Source]): In the order in which they are tried.
    """

    kind: str
    arch: str
    top1: float
    baidu: str
    sources: tuple[Source, ...] = ()


# ImageNet top-1 in percent, as published
TOP1 = {
    'rest_lite': 77.2,
    'rest_small': 79.6,
    'rest_base': 81.6,
    'rest_large': 83.6,
    'restv2_tiny': 82.3,
    'restv2_small': 83.2,
    'restv2_base': 83.7,
    'restv2_large': 84.2,
    # fine-tuned at 384x384
    'restv2_tiny_384': 83.7,
    'restv2_small_384': 84.5,
    'restv2_base_384': 85.1,
    'restv2_large_384': 85.4,
}
# The authors' files. In their table, the two Mask R-CNN of size small have one link.
BAIDU_IDS = {
    'rest_lite': '1VVzrzZi_tD3yTp_lw9tU9A',
    'rest_small': '1Y-MIzzzcQnmrbHfGGR0mrw',
    'rest_base': '1HhR9YxtGIhouZ0GEA4LYlw',
    'rest_large': '14c4u_oRoBcKOt1aTlsBBpw',
    'restv2_tiny': '1LHAbsrXnGsjvAE3d5zhaHQ',
    'restv2_small': '1nysV5MTtwsDLChrRa7vmZQ',
    'restv2_base': '1GH3N2_rbZx816mN87UzYgQ',
    'restv2_large': '1A2huwk_Ii4ZzQllg1iHrEw',
    'restv2_tiny_384': '1fEMs_OrDa_xF7Cw1DiBU9w',
    'restv2_small_384': '1S1GERP-lYEJANYr17xk3dA',
    'restv2_base_384': '12RBMZmf6IlJIB3lIkeBH9Q',
    'restv2_large_384': '1dlxiWexb9mho63WdWS8nXg',
    'retinanet_rest_small': '13YXVRQeNcF_3Txns8eJzZw',
    'retinanet_rest_base': '1hMRM5YEIGsfWfvqbuC7JWA',
    'mask_rcnn_rest_small': '1UfDsRGwgZcydXtj56ZFoDg',
    'mask_rcnn_rest_base': '1oSdMGTSBK_JDcLEq3XjY8w',
    'mask_rcnn_restv2_tiny': '16fDcEupHBZ1zHyzFFZvM3g',
    'mask_rcnn_restv2_small': '1UfDsRGwgZcydXtj56ZFoDg',
    'mask_rcnn_restv2_base': '1zHQM0KqgtqQzg0-mdtx-Jg',
    'upernet_restv2_tiny': '1X-hAafTLFnwJPQSI2BNOKw',
    'upernet_restv2_small': '1WHiL0Rf9JeOB76yh6WOvLQ',
    'upernet_restv2_base': '1dtkg68j3vCU-dxJxl8VFdg',
}
# The authors' folder on Google Drive, with the files of ResT
AUTHORS_FOLDER = '1H6QUZsKYbU6LECtxzGHKqEeGbx1E8uQ9'
# PaddleViT's files on Google Drive, and the top-1 that was measured there
PADDLEVIT = {
    'rest_lite': ('1JF3TVYw76kFizAVC3K5wnGqtAjY3R842', 77.18),
    'rest_small': ('1Hq8Bh55ZvM4sufRCaOyIX3-bYi7J66F4', 79.55),
    'rest_base': ('1DqygDScRdwLQM4QltkaC4uJAy_BHfS9y', 81.60),
    'rest_large': ('14XBb3HgNYaprMsG1kz1NvSYP6mN3-MEV', 83.57),
    'restv2_tiny': ('1vSbX1m_4wcE-SdOGpE6tMIj6kuV2_slK', 82.32),
    'restv2_small': ('1_aFBSog30XkUrC_XOChiitSmBgE6ZxE7', 83.18),
    'restv2_base': ('1hDne3_2TuadxxlZiV7qyghuj5jybmcms', 83.70),
    'restv2_large': ('16XU0i3HV_bn9uhftcScEdVhOLIHbrl91', 84.24),
}


def _model(name: str) -> Model:
    generation, arch = name.split('_')[:2]
    kind = 'ResT' if generation == 'rest' else 'ResTV2'
    sources = []
    if kind == 'ResT':
        sources.append(Source('authors', AUTHORS_FOLDER, '.pth', is_folder=True))
    if name in PADDLEVIT:
        drive_id, top1 = PADDLEVIT[name]
        sources.append(Source('paddlevit', drive_id, '.pdparams', top1))
    return Model(kind, arch, TOP1[name], BAIDU_IDS[name], tuple(sources))


MODELS: dict[str, Model] = {name: _model(name) for name in TOP1}
# Detectors and segmentors
BAIDU_ONLY = {name: file for name, file in BAIDU_IDS.items() if name not in MODELS}


class WeightsError(CheckpointError):
    """Weights could not be downloaded; existing files are unchanged."""


def advise(path: Union[str, os.PathLike]) -> str:
    """Name the command that downloads a missing file; empty if the file is unknown."""
    name, folder = Path(path).stem, os.path.dirname(path) or '.'
    if Path(path).suffix != '.pth' or name not in (*MODELS, *BAIDU_ONLY):
        return ''
    if name in BAIDU_ONLY:
        return f'`python -m mmrest.weights {name}` says where this file is.'
    option = '' if folder == FOLDER else f' --folder {folder}'
    return f'`python -m mmrest.weights {name}{option}` downloads this file.'


# ---------------------------------------------------------------- download

_ATTEMPTS = 3  # to continue after a broken connection
_TIMEOUT = 60  # seconds without an answer
_UNFINISHED = '.unfinished'
_KEPT = 'The received part is kept, and the same command continues from there.'


def fetch(
    name: str,
    folder: Union[str, os.PathLike] = FOLDER,
    origin: Optional[str] = None,
    start: Optional[str] = None,
) -> Path:
    """Download the file of an ImageNet model, unless it exists.

    The file is complete, and all names and shapes fit the model with its classifier. It
    holds only the tensors, under the published names. An interrupted download is
    continued by the next call.

    Args:
        name (str): A key of ``MODELS``.
        folder (str | Path): Folder of the file ``<name>.pth``. Default:
            ``'pretrained'``.
        origin (str, optional): The only source to try, a key of ``ORIGINS``. Default:
            None, all in turn.
        start (str, optional): A file or URL to use instead: ``.pth``, ``.pdparams`` or
            ``.safetensors``. Default: None.

    Returns:
        Path: The file.

    Raises:
        WeightsError: If it cannot be downloaded, or exists and does not fit. Existing
            files are unchanged.
    """
    if name not in MODELS:
        raise WeightsError(_unknown(name))
    path = Path(folder) / f'{name}.pth'
    if path.exists():
        try:
            check(path, name)
        except CheckpointError as error:
            raise WeightsError(
                f'{path} exists and was not replaced, but {error} Move it away to '
                'download it again.'
            ) from error
        return path
    if start is not None and not is_url(start):
        _put_in_place(check(start, name), path)
        return path
    failures = []
    for source in _sources(name, origin, start):
        try:
            _fetch_from(source, path, name)
            return path
        except CheckpointError as error:
            where = ORIGINS.get(source.origin, source.origin)
            failures.append(f'{where}: {str(error).rstrip(".")}')
    reasons = f' ({"; ".join(failures)})' if failures else ''
    raise WeightsError(f'{name} was not downloaded{reasons}. {_by_hand(name, folder)}')


def _sources(name: str, origin: Optional[str], start: Optional[str]) -> list[Source]:
    if start is not None:
        return [Source(start, start, Path(urlsplit(start).path).suffix)]
    return [s for s in MODELS[name].sources if origin in (None, s.origin)]


def _fetch_from(source: Source, path: Path, name: str) -> None:
    gdown, errors = _import_gdown()
    folder = path.parent / _UNFINISHED
    file = folder / f'{name}-{Path(source.origin).stem}{source.suffix}'
    with _one_at_a_time(path.parent):
        if path.exists():  # another process has downloaded it
            check(path, name)
            return
        try:
            _download(source, file, name, gdown, errors)
            try:
                _check_bytes(file, source)
                tensors = check(file, name)
            except CheckpointError:
                file.unlink()
                raise
            _put_in_place(tensors, path)
            file.unlink()
        finally:
            with contextlib.suppress(OSError):  # it is not there, or not empty
                folder.rmdir()


def _import_gdown() -> tuple[Any, Any]:
    """Import the package and the module of its errors."""
    try:
        errors: Any = import_module('gdown.exceptions')
        _ = errors.FileURLRetrievalError, errors.DownloadError  # since 6.5
        return import_module('gdown'), errors
    except (ImportError, AttributeError) as error:
        raise WeightsError(
            'downloading needs the package gdown, 6.5 or later, and Python 3.10 or '
            "later: pip install 'mmrest[weights]'"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lock a folder, for example against other ranks of a run; not on Windows."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise WeightsError(
            f'{folder} could not be made or opened: {error.strerror}'
        ) from error
    if descriptor is None:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _download(source: Source, file: Path, name: str, gdown: Any, errors: Any) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        url = source.drive_id
        if not is_url(url):
            url = f'{DRIVE}/uc?id={_find_in_folder(gdown, source, name)}'
        for attempt in range(_ATTEMPTS):
            try:
                gdown.download(
                    url, str(file), resume=True, timeout=_TIMEOUT, use_cookies=False
                )
                break
            except errors.FileURLRetrievalError:
                raise
            except errors.DownloadError as error:
                if 'byte range' in str(error):  # the server cannot continue
                    for part in file.parent.glob(f'{file.name}*.part'):
                        part.unlink()
                if attempt == _ATTEMPTS - 1:
                    raise
    except Exception as error:  # of requests, or gdown at an unknown page
        raise WeightsError(_reason(error, file, errors)) from error


def _find_in_folder(gdown: Any, source: Source, name: str) -> str:
    """The id of a source's file on Google Drive."""
    if not source.is_folder:
        return source.drive_id
    files = gdown.download_folder(
        id=source.drive_id,
        skip_download=True,
        quiet=True,
        timeout=_TIMEOUT,
        use_cookies=False,
    )
    for file in files:
        found = Path(file.path)
        plain = re.sub(r'[^a-z0-9]', '', found.stem.lower())
        if found.suffix == source.suffix and plain.startswith(name.replace('_', '')):
            return file.id
    paths = shorten(file.path for file in files) or 'nothing'
    raise WeightsError(f'it holds no {name}{source.suffix}, but {paths}')


def _reason(error: Exception, file: Path, errors: Any) -> str:
    """Explain briefly why a download failed."""
    requests: Any = import_module('requests')
    if isinstance(error, errors.FileURLRetrievalError):
        return (
            'it answered with a page instead of the file, as for a deleted file or one '
            'that was downloaded too often today'
        )
    if isinstance(error, errors.DownloadError):
        return f'{" ".join(str(error).split()).partition(". ")[0]}. {_KEPT}'
    if isinstance(error, (requests.ConnectionError, requests.Timeout)):
        return f'the connection to {urlsplit(error.request.url).hostname} failed'
    if isinstance(error, requests.HTTPError):
        return f'it answered with HTTP status {error.response.status_code}'
    if isinstance(error, OSError) and error.errno:
        return f'{file} could not be written: {error.strerror}. {_KEPT}'
    if isinstance(error, CheckpointError):
        return str(error)
    return f'it answered with something unknown ({type(error).__name__}: {error})'


def _put_in_place(tensors: dict[str, Tensor], path: Path) -> None:
    """Write only the tensors, so that MMEngine, timm and others can read the file."""
    content = torch_bytes(tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            Path(temporary).write_bytes(content)
    except OSError as error:
        raise WeightsError(
            f'{path} could not be written: {error.strerror}. No part of it was kept.'
        ) from error


# ---------------------------------------------------------------- checks


def check(path: Union[str, os.PathLike], name: str) -> dict[str, Tensor]:
    """Check all names and shapes of a file against the model with its classifier.

    ``name`` is a key of ``MODELS``. Returns the tensors under the published names.

    Raises:
        CheckpointError: If it cannot be read or does not fit.
    """
    tensors = read_state_dict(path)
    model = _classifier(MODELS[name])
    found = compare(tensors, tensors_of(model))
    problems = [*found.problems, *describe_defects(found.fitting)]
    if problems:
        # of the other generation, nearly all names differ
        text = ' '.join(explain(model, tensors) or problems)
        raise WeightsError(f'{path} is not {name}. {text}')
    return tensors


def _classifier(published: Model) -> nn.Module:
    """Build the model of an ImageNet file, without values."""
    with torch.device('meta'):
        model: nn.Module
        if published.kind == 'ResT':
            model = ResT(published.arch, out_indices=(3,))
        else:
            model = ResTV2(published.arch, out_indices=(3,), out_norm='final')
        model.head = nn.Linear(model.arch.embed_dims[-1], 1000)
    return model


def _check_bytes(file: Path, source: Source) -> None:
    content = file.read_bytes()
    size, sha256 = len(content), hashlib.sha256(content).hexdigest()
    print(f'received {size:,} bytes, SHA-256 {sha256}')
    if source.size not in (None, size):
        raise WeightsError(f'the file has {size:,} bytes instead of {source.size:,}')
    if source.sha256 not in (None, sha256):
        raise WeightsError(
            f'the file has the SHA-256 {sha256} instead of {source.sha256}'
        )


# ---------------------------------------------------------------- command line


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run ``python -m mmrest.weights``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m mmrest.weights',
        description='Put published ImageNet weights where the configs look for them.',
    )
    parser.add_argument('name', nargs='?', help='e.g. rest_base, see --list')
    parser.add_argument('--list', action='store_true', help='list what there is')
    parser.add_argument('--folder', default=FOLDER, help=f'[{FOLDER}]')
    parser.add_argument('--source', choices=ORIGINS, help='[all, in this order]')
    parser.add_argument(
        '--from',
        dest='start',
        metavar='FILE_OR_URL',
        help='take this .pth, .pdparams or .safetensors, which a browser downloaded',
    )
    args = parser.parse_args(argv)
    if args.list:
        print('\n'.join(_table()))
        return 0
    if not args.name:
        parser.error('name a model, or give --list')
    try:
        path = fetch(args.name, args.folder, args.source, args.start)
        print(f'{path} exists and fits {args.name}')
    except (CheckpointError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'interrupted. {_KEPT}', file=sys.stderr)
        return 130
    return 0


def _table() -> Iterator[str]:
    yield f'{"name":24}{"top-1":>6}{"measured":>10}  from'
    for name, model in MODELS.items():
        measured = next((f'{s.top1:.2f}' for s in model.sources if s.top1), '')
        files = [f'{s.origin} ({s.suffix})' for s in model.sources]
        where = ', '.join([*files, f'{BAIDU}/{model.baidu}'])
        yield f'{name:24}{model.top1:6.1f}{measured:>10}  {where}'
    yield ''
    yield from (f'{origin}: {where}' for origin, where in ORIGINS.items())
    yield f'Baidu asks for the access code {BAIDU_CODE}. With a file from there:'
    yield '  python -m mmrest.weights NAME --from FILE'
    yield ''
    yield 'Only on Baidu, with the command for the downloaded file:'
    for name, file in BAIDU_ONLY.items():
        yield f'{name:24}{BAIDU}/{file}'
        yield f'  {_use(name)}'


def _use(name: str) -> str:
    """The command for the file of a detector or segmentor."""
    if name.startswith('upernet'):
        config = f'upernet/{name[8:]}_upernet_160k_ade20k_512x512.py'
        return f'python tools/test.py configs/{config} FILE'
    return (
        f'python tools/model_converters/detectron2_to_mmdet.py FILE {FOLDER}/{name}.pth'
    )


def _by_hand(name: str, folder: Union[str, os.PathLike]) -> str:
    links = [
        f'{DRIVE}/{"drive/folders" if s.is_folder else "file/d"}/{s.drive_id}'
        for s in MODELS[name].sources
    ]
    links.append(f'{BAIDU}/{MODELS[name].baidu} (access code {BAIDU_CODE})')
    option = '' if os.fspath(folder) == FOLDER else f' --folder {folder}'
    return (
        f'Download it in a browser from {" or ".join(links)}, then run '
        f'`python -m mmrest.weights {name}{option} --from FILE`.'
    )


def _unknown(name: str) -> str:
    if name in BAIDU_ONLY:
        return (
            f'{name} is only on Baidu: download it in a browser from '
            f'{BAIDU}/{BAIDU_ONLY[name]} (access code {BAIDU_CODE}), then run '
            f'`{_use(name)}`.'
        )
    close = get_close_matches(name, MODELS, n=3) or list(MODELS)
    return (
        f'there are no weights called {name!r}. Did you mean {shorten(close)}? '
        '--list names all.'
    )


if __name__ == '__main__':
    sys.exit(main())
