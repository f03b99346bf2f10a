"""Conversion of checkpoint files."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlparse

from mmengine.logging import print_log
from torch import Tensor

from mmrest.checkpoint.atomic import PathLike, atomic_path, torch_bytes
from mmrest.checkpoint.reading import Source, local_file, read_checkpoint
from mmrest.checkpoint.safetensors_files import safetensors_bytes
from mmrest.checkpoint.state_dict import find_state_dict, shared_prefix
from mmrest.utils.text import shorten
from mmrest.version import __version__

from .detectron2 import Conversion, ConversionError, to_detectron2, to_mmdet
from .layout import Detector

# Configs of the published detectors. Those of ResT are not recommended for training.
PUBLISHED_CONFIGS = {
    **{
        f'{kind}_rest_{arch}': f'{kind}/rest_{arch}_fpn_1x_published.py'
        for kind in ('mask_rcnn', 'retinanet')
        for arch in ('small', 'base')
    },
    **{
        f'mask_rcnn_restv2_{arch}': f'mask_rcnn/restv2_{arch}_fpn_3x.py'
        for arch in ('tiny', 'small', 'base')
    },
}
FORMATS = ('pth', 'safetensors')


def published_config(detector: Detector) -> str:
    """Return the config, below ``configs/``, of a published checkpoint.

    Raises:
        ConversionError: If no detector with this backbone was published.
    """
    if detector.name not in PUBLISHED_CONFIGS:
        raise ConversionError(
            f'no {detector.kind} with {detector.backbone}-{detector.arch} was '
            'published, so no config exists for it; published are '
            f'{", ".join(PUBLISHED_CONFIGS)}'
        )
    return PUBLISHED_CONFIGS[detector.name]


def dataset_meta(
    detector: Detector, classes: Optional[Sequence[str]] = None
) -> dict[str, Any]:
    """Return ``classes`` and ``palette``, with which mmdet draws and evaluates.

    ``classes`` are in the order of the classification layer. Default: None, COCO's.

    Raises:
        ConversionError: If their number is not that of the detector.
    """
    from mmdet.datasets import CocoDataset  # slow to import
    from mmdet.visualization import get_palette

    if classes is None:
        meta = {key: CocoDataset.METAINFO[key] for key in ('classes', 'palette')}
        hint = (
            "COCO's classes are 80; for a checkpoint of another data set name its "
            'classes with --classes'
        )
    else:
        palette = get_palette('random', len(classes))
        meta = {'classes': tuple(classes), 'palette': palette}
        hint = 'give one name for each class'
    if len(meta['classes']) != detector.num_classes:
        raise ConversionError(
            f'the checkpoint has {detector.num_classes} classes, but '
            f'{len(meta["classes"])} names are given: {hint}'
        )
    return meta


def convert_to_mmdet(
    src: Source, classes: Optional[Sequence[str]] = None
) -> tuple[Conversion, dict[str, Any]]:
    """Convert a published detector's file for mmdet.

    Args:
        src (str | Path): File or URL of a ResT detector from detectron2.
        classes (Sequence[str], optional): Class names. Default: None, COCO's.

    Returns:
        tuple[Conversion, dict]: The mapping, and the checkpoint to be saved.

    Raises:
        ConversionError: If the tensors are not those of a published detector.
        CheckpointError: If the file cannot be read as a checkpoint.
    """
    conversion = to_mmdet(_tensors(read_checkpoint(src), src))
    detector = conversion.detector
    path = local_file(src)  # None if MMEngine has read it
    meta = {
        'config': published_config(detector),
        'dataset_meta': dataset_meta(detector, classes),
        'converter': {
            'name': 'detectron2_to_mmdet',
            'mmrest_version': __version__,
            'source': os.path.basename(urlparse(os.fspath(src)).path),
            'source_sha256': sha256(Path(path).read_bytes()) if path else None,
            'added': conversion.added,
            'constants': conversion.constants,
        },
    }
    return conversion, {'meta': meta, 'state_dict': conversion.state_dict}


def convert_to_detectron2(src: Source) -> tuple[Conversion, dict[str, Any]]:
    """Convert an mmdet ResT detector's file for detectron2.

    Args:
        src (str | Path): File or URL of a ResT detector from mmdet.

    Returns:
        tuple[Conversion, dict]: The mapping, and the checkpoint to be saved.

    Raises:
        ConversionError: If the tensors are not those of a ResT detector.
        CheckpointError: If the file cannot be read as a checkpoint.
    """
    checkpoint = read_checkpoint(src)
    history = _history(checkpoint)
    conversion = to_detectron2(
        _tensors(checkpoint, src),
        added=history.get('added', ()),
        stored=history.get('constants', {}),
    )
    return conversion, {'model': conversion.state_dict}


def publish(
    src: Source, dst: PathLike, force: bool = False, format: Optional[str] = None
) -> Path:
    """Keep the weights and meta of a checkpoint, in a file named by its hash.

    Args:
        src (str | Path): Checkpoint of MMEngine's Runner.
        dst (str | Path): File to write; ``x.pth`` becomes
            ``x-<first eight digits of the SHA-256>.pth``.
        force (bool): Whether to replace that file if it exists. Default: False.
        format (str, optional): ``'pth'`` or ``'safetensors'``. The latter keeps those
            parts of ``meta`` that JSON supports, and a warning names the others.
            Default: None, the suffix of ``dst``, or else ``'pth'``.

    Returns:
        Path: The file that was written.

    Raises:
        ConversionError: If ``src`` has no ``state_dict`` or the file exists.
        CheckpointError: If ``src`` cannot be read as a checkpoint.
    """
    checkpoint = read_checkpoint(src)
    find_state_dict(checkpoint, src)  # raises if there are no tensors
    if 'state_dict' not in checkpoint:
        raise ConversionError(
            f'{src} has no state_dict, so it is no checkpoint of mmengine; found '
            f'{shorten(checkpoint, 5)}'
        )
    kept = {key: checkpoint[key] for key in ('meta', 'state_dict') if key in checkpoint}
    dst = Path(dst)
    if format is None:
        format = 'safetensors' if dst.suffix == '.safetensors' else 'pth'
    if format == 'safetensors':
        others = [k for k, v in kept['state_dict'].items() if not isinstance(v, Tensor)]
        if others:
            raise ConversionError(
                f'state_dict holds other things than tensors, which safetensors cannot '
                f'hold: {shorten(others)}. Publish it as .pth'
            )
        try:
            content, left_out = safetensors_bytes(
                kept['state_dict'], kept.get('meta', {})
            )
        except ImportError as error:
            raise ConversionError(f'{dst}: {error}') from error
        if left_out:
            print_log(
                f'Left out of meta, which this format holds as JSON: '
                f'{shorten(left_out)}',
                logger='current',
                level=logging.WARNING,
            )
    else:
        content = torch_bytes(kept)
    stem = dst.stem if dst.suffix[1:] in FORMATS else dst.name
    final = dst.with_name(f'{stem}-{sha256(content)[:8]}.{format}')
    check_destination(final, src, force)
    with atomic_path(final) as temporary:
        Path(temporary).write_bytes(content)
    return final


def sha256(content: bytes) -> str:
    """The SHA-256 of a content, as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def check_destination(
    dst: PathLike, src: Optional[Source] = None, force: bool = False
) -> Path:
    """Return a destination, unless writing it would lose a file.

    Raises:
        ConversionError: If ``dst`` is the source, a folder, in a folder that
            does not exist, or exists without ``force``.
    """
    dst = Path(dst)
    if not dst.parent.is_dir():
        raise ConversionError(f'the folder {dst.parent} of the output does not exist')
    if dst.is_dir():
        raise ConversionError(f'{dst} is a folder; name a file')
    if dst.exists():
        source = None if src is None else os.path.expanduser(src)
        if source and os.path.exists(source) and os.path.samefile(source, dst):
            raise ConversionError(f'{dst} is the source; it is never overwritten')
        if not force:
            raise ConversionError(f'{dst} exists; use --force to replace it')
    return dst


def save(checkpoint: dict[str, Any], dst: PathLike) -> None:
    """Write a checkpoint atomically; an existing file is replaced."""
    content = torch_bytes(checkpoint)
    with atomic_path(dst) as temporary:
        Path(temporary).write_bytes(content)


def _tensors(checkpoint: Any, src: Source) -> dict[str, Tensor]:
    """Return the tensors, without the prefix of DistributedDataParallel."""
    tensors = find_state_dict(checkpoint, src).tensors
    prefix = shared_prefix(tensors, ('module.',))
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def _history(checkpoint: Any) -> Mapping[str, Any]:
    """Return what :func:`convert_to_mmdet` has saved, if it made the checkpoint."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    history = meta.get('converter') if isinstance(meta, Mapping) else None
    return history if isinstance(history, Mapping) else {}
