"""Convert published (detectron2) ResT detectors to mmdet's modules, and back.

Both directions are pure functions of dicts of tensors. For files, see
:mod:`mmrest.converters.files`.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from mmrest.checkpoint.comparison import compare, describe_defects, is_counter
from mmrest.utils.text import shorten

from .layout import (
    ARCHS,
    BACKBONE_PREFIX,
    RETINA_ANCHORS,
    Detector,
    Entry,
    constants,
    entries,
)

# weight of the classification layer
_CLASSIFIERS = {
    'detectron2': {
        'mask_rcnn': 'roi_heads.box_predictor.cls_score.weight',
        'retinanet': 'head.cls_score.weight',
    },
    'mmdet': {
        'mask_rcnn': 'roi_head.bbox_head.fc_cls.weight',
        'retinanet': 'bbox_head.retina_cls.weight',
    },
}
# last 3x3 convolution of the stem, as wide as stage 1
_STEMS = {'ResT': 'stem.conv3.weight', 'ResTV2': 'stem.proj.3.weight'}


class ConversionError(ValueError):
    """A checkpoint that cannot be converted."""


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        detector (Detector): The recognised detector.
        state_dict (dict[str, Tensor]): The converted tensors.
        entries (list[Entry]): The mapping that was applied.
        added (list[str]): detectron2 names of BatchNorm counters that the source
            lacks; they are 0 in ``state_dict``.
        constants (dict[str, Tensor]): Tensors of the source that are not weights, by
            their detectron2 names.
    """

    detector: Detector
    state_dict: 'OrderedDict[str, Tensor]'
    entries: list[Entry]
    added: list[str] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)


def recognise(state_dict: Mapping[str, Tensor], form: str = 'detectron2') -> Detector:
    """Recognise detector, backbone and number of classes by names and shapes.

    Args:
        state_dict (dict[str, Tensor]): Tensors by name.
        form (str): Form of the names, ``'detectron2'`` or ``'mmdet'``.
            Default: ``'detectron2'``.

    Raises:
        ConversionError: If it is not a ResT Mask R-CNN or RetinaNet.
    """
    classifiers = _CLASSIFIERS[form]
    kinds = [kind for kind, name in classifiers.items() if name in state_dict]
    if not kinds:
        raise ConversionError(f'no Mask R-CNN or RetinaNet: {_describe(state_dict)}')
    if len(kinds) > 1:
        raise ConversionError(
            'found the heads of a Mask R-CNN and of a RetinaNet in one checkpoint'
        )
    (kind,) = kinds
    prefix = BACKBONE_PREFIX if form == 'detectron2' else 'backbone.'
    backbone, arch = _backbone(state_dict, prefix)
    num_classes = _num_classes(state_dict, kind, classifiers[kind])
    return Detector(kind, arch, num_classes, backbone)


def to_mmdet(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Convert a published detector's tensors to mmdet's names.

    Args:
        state_dict (dict[str, Tensor]): Tensors under detectron2's names. It is not
            changed; tensors that are not reordered are shared.

    Raises:
        ConversionError: If the tensors are not exactly those of a published detector,
            or contain NaN or infinite values.
    """
    detector = recognise(state_dict)
    known_constants = constants(detector.kind, detector.backbone)
    stored = {k: v for k, v in state_dict.items() if k in known_constants}
    _check_constants(stored, known_constants)
    weights = {k: v for k, v in state_dict.items() if k not in stored}

    mapping = entries(detector)
    by_name = {entry.detectron2: entry for entry in mapping}
    _check(detector, weights, by_name)
    converted = OrderedDict(
        (by_name[name].mmdet, by_name[name].reorder(tensor))
        for name, tensor in weights.items()
    )
    # detectron2's frozen BatchNorm has no counter
    added = [name for name in by_name if is_counter(name) and name not in weights]
    for name in added:
        converted[by_name[name].mmdet] = torch.zeros((), dtype=torch.long)
    return Conversion(detector, converted, mapping, added, stored)


def to_detectron2(
    state_dict: Mapping[str, Tensor],
    added: Iterable[str] = (),
    stored: Optional[Mapping[str, Tensor]] = None,
) -> Conversion:
    """Convert an mmdet ResT detector's tensors to detectron2's names.

    With ``added`` and ``constants`` of :func:`to_mmdet`, its source is restored bit by
    bit.

    Args:
        state_dict (dict[str, Tensor]): Tensors under mmdet's names.
        added (Iterable[str]): detectron2 names to omit. Default: ().
        stored (dict[str, Tensor], optional): Constants to add. Default: None.

    Raises:
        ConversionError: As :func:`to_mmdet`.
    """
    detector = recognise(state_dict, form='mmdet')
    mapping = entries(detector)
    by_name = {entry.mmdet: entry for entry in mapping}
    _check(detector, state_dict, by_name)
    left_out, stored = set(added), dict(stored or {})
    converted = OrderedDict(
        (by_name[name].detectron2, by_name[name].reorder(tensor))
        for name, tensor in state_dict.items()
        if by_name[name].detectron2 not in left_out
    )
    converted.update(stored)
    return Conversion(detector, converted, mapping, sorted(left_out), stored)


def _describe(state_dict: Mapping[str, Tensor]) -> str:
    """Describe a checkpoint that was not recognised."""
    if not state_dict:
        return 'the checkpoint is empty'
    imagenet = ('stem.conv1.weight', 'stem.proj.0.weight')
    if 'head.weight' in state_dict and any(n in state_dict for n in imagenet):
        return (
            'this is an ImageNet checkpoint, which needs no conversion: name it in '
            "backbone.init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    mmdet = ('neck.', 'bbox_head.', 'roi_head.')
    detectron2 = ('backbone.fpn_', 'backbone.bottom_up.')
    for form, starts, tool in (
        ('an mmdet', mmdet, 'mmdet_to_detectron2'),
        ('a detectron2', detectron2, 'detectron2_to_mmdet'),
    ):
        if any(name.startswith(starts) for name in state_dict):
            return (
                f'the names are those of {form} checkpoint, but not of these two '
                'detectors, or of the other direction, which is '
                f'tools/model_converters/{tool}.py'
            )
    return f'found {len(state_dict)} tensors: {shorten(state_dict, 5)}'


def _backbone(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[str, str]:
    """Recognise class and arch by the width of the stem and the depths."""
    names = {backbone: prefix + name for backbone, name in _STEMS.items()}
    backbones = [
        backbone
        for backbone, name in names.items()
        if name in state_dict and state_dict[name].dim() == 4
    ]
    if len(backbones) != 1:
        wanted = ', '.join(f'{name} ({backbone})' for backbone, name in names.items())
        problem = 'both are there' if backbones else 'missing or no weight'
        raise ConversionError(
            f'no backbone ResT or ResTV2: it has one of {wanted}; {problem}'
        )
    (backbone,) = backbones
    depths = [0] * 4
    for name in state_dict:
        block = re.match(re.escape(prefix) + r'stage([1-4])\.(\d+)\.', name)
        if block:
            stage = int(block[1]) - 1
            depths[stage] = max(depths[stage], int(block[2]) + 1)
    found = (state_dict[names[backbone]].shape[0], tuple(depths))
    known = {a: (s.embed_dims[0], s.depths) for a, s in ARCHS[backbone].items()}
    for arch, sizes in known.items():
        if sizes == found:
            return backbone, arch
    raise ConversionError(
        f'no known {backbone}: the channels after the stem and the blocks of the four '
        f'stages are {found}; known are {known}'
    )


def _num_classes(state_dict: Mapping[str, Tensor], kind: str, name: str) -> int:
    """Return the number of classes, from the weight of the classification layer."""
    rows = state_dict[name].shape[0] if state_dict[name].dim() else 0
    if kind == 'mask_rcnn':
        count = rows - 1  # the last row is background
    else:
        count, rest = divmod(rows, RETINA_ANCHORS)
        if rest:
            raise ConversionError(
                f'{name} has {rows} outputs, no multiple of the nine anchors'
            )
    if count < 1:
        raise ConversionError(f'{name} has {rows} outputs, too few for one class')
    return count


def _check_constants(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    wrong = [
        f'{name}: expected {expected[name].tolist()}, found {value.tolist()}'
        for name, value in found.items()
        if value.numel() != expected[name].numel()
        or not torch.allclose(
            value.detach().float().flatten(),
            expected[name].flatten(),
            rtol=1e-4,
            atol=1e-3,
        )
    ]
    if wrong:
        raise ConversionError(
            'the checkpoint was made with other settings than the published ones, '
            f'so the published config does not fit it. {shorten(wrong)}'
        )


def _check(
    detector: Detector, state_dict: Mapping[str, Tensor], expected: Mapping[str, Entry]
) -> None:
    """Raise an error with all differences from ``expected``."""
    target = {
        name: torch.empty(entry.shape, device='meta')
        for name, entry in expected.items()
    }
    found = compare(dict(state_dict), target)
    problems = [*found.problems, *describe_defects(found.fitting)]
    if problems:
        raise ConversionError(f'as {detector}: {" ".join(problems)}')
