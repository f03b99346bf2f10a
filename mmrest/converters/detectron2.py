"""Published (detectron2) ResT detectors to mmdet's native modules and back.

Both directions are pure functions from one dict of tensors to another; files
are the business of :mod:`mmrest.converters.files`.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from mmrest.models.arch import ARCHS

from .layout import (
    BACKBONE_PREFIX,
    KINDS,
    RETINA_RATIOS,
    RETINA_SCALES,
    Detector,
    Entry,
    constants,
    entries,
    swap_anchor_order,
)

# detectron2's frozen batch norm has no counter, hence files without it.
OPTIONAL_SUFFIX = '.num_batches_tracked'
MAX_LISTED = 20


class ConversionError(ValueError):
    """A checkpoint is not what the converter was asked to convert."""


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        detector (Detector): what was recognised.
        state_dict (dict[str, Tensor]): the converted tensors.
        entries (list[Entry]): the mapping that was applied.
        added (list[str]): detectron2 names of batch norm counters that the
            source lacks; they are 0 in ``state_dict``.
        constants (dict[str, Tensor]): stored tensors that are no weights, by
            their detectron2 names.
    """

    detector: Detector
    state_dict: 'OrderedDict[str, Tensor]'
    entries: list[Entry]
    added: list[str] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)


def _listing(lines: Iterable[str]) -> str:
    lines = list(lines)
    shown = [f'  {line}' for line in lines[:MAX_LISTED]]
    if len(lines) > MAX_LISTED:
        shown.append(f'  ... and {len(lines) - MAX_LISTED} more')
    return '\n'.join(shown)


def _kind(state_dict: Mapping[str, Tensor], signs: Mapping[str, str]) -> str:
    """Name the detector whose sign, a typical key, the state dict holds."""
    found = [kind for kind in KINDS if signs[kind] in state_dict]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConversionError(
            'found the heads of a Mask R-CNN and of a RetinaNet in one checkpoint'
        )
    raise ConversionError(f'no Mask R-CNN or RetinaNet: {_describe(state_dict)}')


def _describe(state_dict: Mapping[str, Tensor]) -> str:
    """Say what a checkpoint that was not recognised looks like."""
    if not state_dict:
        return 'the checkpoint is empty'
    if 'head.weight' in state_dict and 'stem.conv1.weight' in state_dict:
        return (
            'this is an ImageNet checkpoint, which needs no conversion: name it in '
            "backbone.init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    if any(
        name.startswith(('neck.', 'bbox_head.', 'roi_head.')) for name in state_dict
    ):
        return (
            'the names are those of an mmdet checkpoint; the way to detectron2 is '
            'tools/model_converters/mmdet_to_detectron2.py'
        )
    if any(
        name.startswith(('backbone.fpn_', 'backbone.bottom_up.')) for name in state_dict
    ):
        return (
            'the names are those of a detectron2 checkpoint, but not of these two '
            'detectors; the way from detectron2 to mmdet is '
            'tools/model_converters/detectron2_to_mmdet.py'
        )
    return f'found {len(state_dict)} tensors, the first named\n' + _listing(
        list(state_dict)[:5]
    )


def _arch(state_dict: Mapping[str, Tensor], prefix: str) -> str:
    """Recognise the backbone by the width of its stem and its depths."""
    if f'{prefix}stem.proj.0.weight' in state_dict:
        raise ConversionError(
            'the backbone is a ResTv2; this converter knows the detectors of ResT (v1)'
        )
    stem = state_dict.get(f'{prefix}stem.conv3.weight')
    if stem is None or stem.dim() != 4:
        raise ConversionError(f'no ResT backbone: {prefix}stem.conv3.weight is missing')
    depths = [0] * 4
    for name in state_dict:
        block = re.match(re.escape(prefix) + r'stage([1-4])\.(\d+)\.', name)
        if block:
            stage = int(block[1]) - 1
            depths[stage] = max(depths[stage], int(block[2]) + 1)
    found = (stem.shape[0], tuple(depths))
    known = {arch: (s.embed_dims[0], s.depths) for arch, s in ARCHS.items()}
    for arch, sizes in known.items():
        if sizes == found:
            return arch
    raise ConversionError(
        'no known ResT: the channels after the stem and the blocks of the four '
        f'stages are {found}; known are {known}'
    )


def _num_classes(state_dict: Mapping[str, Tensor], kind: str, name: str) -> int:
    """Read the class count off the classification layer's weight."""
    rows = state_dict[name].shape[0] if state_dict[name].dim() else 0
    if kind == 'mask_rcnn':
        count = rows - 1  # the last row is background
    else:
        count, rest = divmod(rows, RETINA_SCALES * RETINA_RATIOS)
        if rest:
            raise ConversionError(
                f'{name} has {rows} outputs, no multiple of the nine anchors'
            )
    if count < 1:
        raise ConversionError(f'{name} has {rows} outputs, too few for one class')
    return count


def recognise(state_dict: Mapping[str, Tensor], form: str = 'detectron2') -> Detector:
    """Tell detector, backbone and class count from names and shapes.

    Args:
        state_dict (dict[str, Tensor]): tensors by name.
        form (str): whose names they are, 'detectron2' or 'mmdet'. Defaults to
            'detectron2'.

    Returns:
        Detector: what the checkpoint holds.

    Raises:
        ConversionError: if it is no ResT Mask R-CNN or RetinaNet.
    """
    if form == 'detectron2':
        prefix = BACKBONE_PREFIX
        signs = {
            'mask_rcnn': 'roi_heads.box_predictor.cls_score.weight',
            'retinanet': 'head.cls_score.weight',
        }
    else:
        prefix = 'backbone.'
        signs = {
            'mask_rcnn': 'roi_head.bbox_head.fc_cls.weight',
            'retinanet': 'bbox_head.retina_cls.weight',
        }
    kind = _kind(state_dict, signs)
    arch = _arch(state_dict, prefix)
    return Detector(kind, arch, _num_classes(state_dict, kind, signs[kind]))


def _check_constants(kind: str, found: Mapping[str, Tensor]) -> None:
    expected = constants(kind)
    wrong = []
    for name, value in found.items():
        want = expected[name]
        same_size = value.numel() == want.numel()
        if not same_size or not torch.allclose(
            value.detach().float().flatten(), want.flatten(), rtol=1e-4, atol=1e-3
        ):
            wrong.append(f'{name}: expected {want.tolist()}, found {value.tolist()}')
    if wrong:
        raise ConversionError(
            'the checkpoint was made with other settings than the published ones, '
            'so the published config does not fit it:\n' + _listing(wrong)
        )


def _check(
    detector: Detector,
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Entry],
    optional: Iterable[str] = (),
) -> None:
    """Raise an error that lists whatever does not fit ``expected``."""
    problems = []
    present = {*state_dict, *optional}
    missing = [name for name in expected if name not in present]
    unmapped = [name for name in state_dict if name not in expected]
    shapes, broken = [], []
    for name, tensor in state_dict.items():
        if name not in expected:
            continue
        if tuple(tensor.shape) != expected[name].shape:
            shapes.append(
                f'{name}: expected {expected[name].shape}, found {tuple(tensor.shape)}'
            )
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            broken.append(name)
    for title, names in (
        ('missing', missing),
        ('not known', unmapped),
        ('of another shape', shapes),
        ('with NaN or infinite values', broken),
    ):
        if names:
            problems.append(f'{len(names)} tensors {title}:\n{_listing(names)}')
    if problems:
        raise ConversionError(f'as {detector}:\n' + '\n'.join(problems))


def to_mmdet(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename a published detector's tensors for mmdet's native modules.

    Args:
        state_dict (dict[str, Tensor]): tensors under detectron2's names. It is
            not changed; tensors that need no reordering are shared.

    Returns:
        Conversion: with the tensors under mmdet's names.

    Raises:
        ConversionError: if the tensors are not exactly those of one of the
            detectors, or hold NaN or infinite values.
    """
    detector = recognise(state_dict)
    known_constants = constants(detector.kind)
    stored = {k: v for k, v in state_dict.items() if k in known_constants}
    _check_constants(detector.kind, stored)
    weights = {k: v for k, v in state_dict.items() if k not in stored}

    mapping = entries(detector)
    by_name = {entry.detectron2: entry for entry in mapping}
    added = [
        name
        for name in by_name
        if name.endswith(OPTIONAL_SUFFIX) and name not in weights
    ]
    _check(detector, weights, by_name, optional=added)

    converted = OrderedDict()
    for name, tensor in weights.items():
        entry = by_name[name]
        converted[entry.mmdet] = (
            swap_anchor_order(tensor) if entry.anchor_order else tensor
        )
    for name in added:
        converted[by_name[name].mmdet] = torch.zeros((), dtype=torch.long)
    return Conversion(detector, converted, mapping, added, stored)


def to_detectron2(
    state_dict: Mapping[str, Tensor],
    added: Iterable[str] = (),
    stored: Optional[Mapping[str, Tensor]] = None,
) -> Conversion:
    """Rename an mmdet ResT detector's tensors for detectron2.

    Args:
        state_dict (dict[str, Tensor]): tensors under mmdet's names.
        added (list[str]): detectron2 names to leave out again, as
            :func:`to_mmdet` reported them. Defaults to none.
        stored (dict[str, Tensor]): constants to put back. Defaults to none.

    Returns:
        Conversion: with the tensors under detectron2's names. What
        :func:`to_mmdet` made from a checkpoint becomes that checkpoint again,
        bit for bit, if its ``added`` and ``constants`` are given.

    Raises:
        ConversionError: as :func:`to_mmdet`.
    """
    detector = recognise(state_dict, form='mmdet')
    mapping = entries(detector)
    by_name = {entry.mmdet: entry for entry in mapping}
    _check(detector, state_dict, by_name)

    left_out = set(added)
    converted = OrderedDict()
    for name, tensor in state_dict.items():
        entry = by_name[name]
        if entry.detectron2 in left_out:
            continue
        converted[entry.detectron2] = (
            swap_anchor_order(tensor) if entry.anchor_order else tensor
        )
    stored = dict(stored or {})
    converted.update(stored)
    return Conversion(detector, converted, mapping, sorted(left_out), stored)
