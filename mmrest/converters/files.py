"""Checkpoint files: what is written around the converted tensors, and how."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from mmrest.checkpoint import read_checkpoint
from mmrest.checkpoint.state_dict import find_state_dict, shared_prefix
from mmrest.version import __version__

from .detectron2 import Conversion, ConversionError, to_detectron2, to_mmdet
from .layout import Detector

PathLike = Union[str, os.PathLike]

PUBLISHED_ARCHS = ('small', 'base')
PUBLISHED_KEYS = ('meta', 'state_dict')


def published_config(detector: Detector) -> str:
    """Name the config that a published checkpoint belongs to.

    Args:
        detector (Detector): what the checkpoint holds.

    Returns:
        str: path below ``configs/``, e.g.
        'mask_rcnn/rest_small_fpn_1x_published.py'.

    Raises:
        ConversionError: if no detector with this backbone was published.
    """
    if detector.arch not in PUBLISHED_ARCHS:
        raise ConversionError(
            f'no {detector.kind} with ResT-{detector.arch} was published, so no '
            f'config exists for it; published are {" and ".join(PUBLISHED_ARCHS)}'
        )
    return f'{detector.kind}/rest_{detector.arch}_fpn_1x_published.py'


def dataset_meta(
    detector: Detector, classes: Optional[Sequence[str]] = None
) -> dict[str, Any]:
    """Make the class names and colours that mmdet draws and evaluates with.

    Args:
        detector (Detector): what the checkpoint holds.
        classes (list[str], optional): names of the classes in the order of the
            classification layer. Defaults to COCO's.

    Returns:
        dict: 'classes' and 'palette', as mmdet's datasets give them.

    Raises:
        ConversionError: if the number of names is not the class count.
    """
    from mmdet.datasets import CocoDataset  # heavy, and needless for the mapping
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


def sha256(path: PathLike) -> str:
    """Compute the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def check_destination(
    dst: PathLike, src: Optional[PathLike] = None, force: bool = False
) -> Path:
    """Refuse a destination that would cost the user a file.

    Args:
        dst (str | Path): file to be written.
        src (str | Path, optional): file that is read, which must differ.
        force (bool): allow ``dst`` to exist. Defaults to False.

    Returns:
        Path: ``dst``.

    Raises:
        ConversionError: if ``dst`` is the source, a folder, in a folder that
            does not exist, or exists without ``force``.
    """
    dst = Path(dst)
    if not dst.parent.is_dir():
        raise ConversionError(f'the folder {dst.parent} of the output does not exist')
    if dst.is_dir():
        raise ConversionError(f'{dst} is a folder; name a file')
    if dst.exists():
        if src is not None and os.path.exists(src) and os.path.samefile(src, dst):
            raise ConversionError(f'{dst} is the source; it is never overwritten')
        if not force:
            raise ConversionError(f'{dst} exists; use --force to replace it')
    return dst


def save(checkpoint: dict[str, Any], dst: PathLike) -> None:
    """Write a checkpoint whole or not at all.

    The file is written beside ``dst``, forced to the disk, and renamed.

    Args:
        checkpoint (dict): anything that ``torch.save`` takes.
        dst (str | Path): file to be written; replaced if it exists.
    """
    dst = Path(dst)
    partial = dst.with_name(f'.{dst.name}.{os.getpid()}.part')
    try:
        with open(partial, 'xb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, dst)
    finally:
        partial.unlink(missing_ok=True)


def _tensors(checkpoint: Any, src: PathLike) -> dict[str, Tensor]:
    """Unwrap the tensors; the prefix of DistributedDataParallel is taken off."""
    tensors = find_state_dict(checkpoint, src).tensors
    prefix = shared_prefix(tensors, ('module.',))
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def _history(checkpoint: Any) -> Mapping[str, Any]:
    """What :func:`convert_to_mmdet` noted, if it made the checkpoint."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    history = meta.get('converter') if isinstance(meta, Mapping) else None
    return history if isinstance(history, Mapping) else {}


def convert_to_mmdet(
    src: PathLike, classes: Optional[Sequence[str]] = None
) -> tuple[Conversion, dict[str, Any]]:
    """Convert a published detector's file for mmdet.

    Args:
        src (str | Path): checkpoint of a ResT detector from detectron2.
        classes (list[str], optional): class names. Defaults to COCO's.

    Returns:
        tuple[Conversion, dict]: the mapping, and the checkpoint to be saved.

    Raises:
        ConversionError: if the tensors are not those of a published detector.
        CheckpointError: if the file cannot be read as a checkpoint.
    """
    conversion = to_mmdet(_tensors(read_checkpoint(src), src))
    detector = conversion.detector
    meta = {
        'config': published_config(detector),
        'dataset_meta': dataset_meta(detector, classes),
        'converter': {
            'name': 'detectron2_to_mmdet',
            'mmrest_version': __version__,
            'source': Path(src).name,
            'source_sha256': sha256(src),
            'added': conversion.added,
            'constants': conversion.constants,
        },
    }
    return conversion, {'meta': meta, 'state_dict': conversion.state_dict}


def convert_to_detectron2(src: PathLike) -> tuple[Conversion, dict[str, Any]]:
    """Convert an mmdet ResT detector's file for detectron2.

    Args:
        src (str | Path): checkpoint of a ResT detector from mmdet.

    Returns:
        tuple[Conversion, dict]: the mapping, and the checkpoint to be saved.

    Raises:
        ConversionError: if the tensors are not those of a ResT detector.
        CheckpointError: if the file cannot be read as a checkpoint.
    """
    checkpoint = read_checkpoint(src)
    history = _history(checkpoint)
    conversion = to_detectron2(
        _tensors(checkpoint, src),
        added=history.get('added', ()),
        stored=history.get('constants', {}),
    )
    return conversion, {'model': conversion.state_dict}


def publish(src: PathLike, dst: PathLike, force: bool = False) -> Path:
    """Keep a checkpoint's weights and meta, and name the file by its hash.

    Args:
        src (str | Path): checkpoint of mmengine's Runner.
        dst (str | Path): file to be written; 'x.pth' becomes
            'x-<first eight digits of the SHA-256>.pth'.
        force (bool): replace that file if it exists. Defaults to False.

    Returns:
        Path: the file that was written.

    Raises:
        ConversionError: if ``src`` has no ``state_dict`` or the file exists.
        CheckpointError: if ``src`` cannot be read as a checkpoint.
    """
    checkpoint = read_checkpoint(src)
    find_state_dict(checkpoint, src)  # raises if there are no tensors
    if 'state_dict' not in checkpoint:
        raise ConversionError(
            f'{src} has no state_dict, so it is no checkpoint of mmengine; found '
            f'{", ".join(map(str, list(checkpoint)[:5]))}'
        )
    dst = check_destination(dst, force=True)  # this name is not written itself
    kept = {key: checkpoint[key] for key in PUBLISHED_KEYS if key in checkpoint}
    unnamed = dst.with_name(f'.{dst.name}.{os.getpid()}.unnamed')
    try:
        save(kept, unnamed)
        stem = dst.name[: -len('.pth')] if dst.suffix == '.pth' else dst.name
        final = dst.with_name(f'{stem}-{sha256(unnamed)[:8]}.pth')
        check_destination(final, src, force)
        os.replace(unnamed, final)
    finally:
        unnamed.unlink(missing_ok=True)
    return final
