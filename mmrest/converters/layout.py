"""The names and shapes of a ResT detector's tensors, in detectron2 and in mmdet.

A detector is described once, as a list of :class:`Entry`: the name in the
published (detectron2) checkpoints, the name in mmdet's modules, the shape, and
whether the nine RetinaNet anchors have to be reordered.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrest.models import rest, restv2

# Stages that feed the FPN. Requesting other stages would change the features.
OUT_INDICES = {'mask_rcnn': (0, 1, 2, 3), 'retinanet': (1, 2, 3)}
BACKBONE_PREFIX = 'backbone.bottom_up.'

BACKBONES = {'ResT': rest.ResT, 'ResTV2': restv2.ResTV2}
ARCHS = {'ResT': rest.ARCHS, 'ResTV2': restv2.ARCHS}
# Mean and standard deviation of the pixels. Published ResT detectors take BGR pixels.
PIXELS = {
    'ResT': ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    'ResTV2': ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}

FPN_CHANNELS = 256
RPN_ANCHORS = 3
RETINA_SCALES = 3
RETINA_RATIOS = 3
RETINA_ANCHORS = RETINA_SCALES * RETINA_RATIOS
ROI_SIZE = 7
FC_CHANNELS = 1024


@dataclass(frozen=True)
class Detector:
    """What a checkpoint holds."""

    kind: str  # ``'mask_rcnn'`` or ``'retinanet'``
    arch: str  # the backbone's name, as ``'small'``
    num_classes: int  # classes without background
    backbone: str = 'ResT'  # or ``'ResTV2'``

    @property
    def name(self) -> str:
        """As in the names of configs, e.g. ``'mask_rcnn_restv2_tiny'``."""
        return f'{self.kind}_{self.backbone.lower()}_{self.arch}'

    def __str__(self) -> str:
        backbone = self.backbone.lower()
        return f'{self.kind} {backbone}_{self.arch}, {self.num_classes} classes'


@dataclass(frozen=True)
class Entry:
    """One tensor under its two names."""

    detectron2: str  # name in a published checkpoint
    mmdet: str  # name in mmdet's modules
    shape: tuple[int, ...]  # the same in both
    # whether the first axis counts RetinaNet's nine anchors, size-major in detectron2
    # and ratio-major in mmdet
    anchor_order: bool = False

    def reorder(self, tensor: Tensor) -> Tensor:
        """Bring the tensor from the one order into the other, if they differ."""
        return swap_anchor_order(tensor) if self.anchor_order else tensor


def _layer(
    detectron2: str,
    mmdet: str,
    weight: tuple[int, ...],
    anchor_order: bool = False,
    transposed: bool = False,
) -> Iterator[Entry]:
    """Weight and bias of a convolution or a linear layer."""
    yield Entry(f'{detectron2}.weight', f'{mmdet}.weight', weight, anchor_order)
    bias = (weight[1] if transposed else weight[0],)
    yield Entry(f'{detectron2}.bias', f'{mmdet}.bias', bias, anchor_order)


def _backbone(detector: Detector) -> Iterator[Entry]:
    with torch.device('meta'):  # names and shapes only, no memory
        build = BACKBONES[detector.backbone]
        model = build(detector.arch, out_indices=OUT_INDICES[detector.kind])
    for name, tensor in model.state_dict().items():
        # the norm of an output of ResTV2 is the only layer of a Sequential there
        published = re.sub(r'^(norm_\d)\.', r'\1.0.', name)
        shape = tuple(tensor.shape)
        yield Entry(BACKBONE_PREFIX + published, f'backbone.{name}', shape)


def _fpn(embed_dims: tuple[int, ...], out_indices: tuple[int, ...]) -> Iterator[Entry]:
    for level, index in enumerate(out_indices):
        exponent = index + 2  # detectron2 names a level by log2 of its stride
        yield from _layer(
            f'backbone.fpn_lateral{exponent}',
            f'neck.lateral_convs.{level}.conv',
            (FPN_CHANNELS, embed_dims[index], 1, 1),
        )
        yield from _layer(
            f'backbone.fpn_output{exponent}',
            f'neck.fpn_convs.{level}.conv',
            (FPN_CHANNELS, FPN_CHANNELS, 3, 3),
        )


def _mask_rcnn_heads(num_classes: int) -> Iterator[Entry]:
    c = FPN_CHANNELS
    rpn = 'proposal_generator.rpn_head'
    yield from _layer(f'{rpn}.conv', 'rpn_head.rpn_conv', (c, c, 3, 3))
    yield from _layer(
        f'{rpn}.objectness_logits', 'rpn_head.rpn_cls', (RPN_ANCHORS, c, 1, 1)
    )
    yield from _layer(
        f'{rpn}.anchor_deltas', 'rpn_head.rpn_reg', (RPN_ANCHORS * 4, c, 1, 1)
    )
    box = 'roi_head.bbox_head'
    # Both flatten the pooled (C, 7, 7) map in this order, so columns stay.
    for i, columns in enumerate((c * ROI_SIZE**2, FC_CHANNELS)):
        yield from _layer(
            f'roi_heads.box_head.fc{i + 1}',
            f'{box}.shared_fcs.{i}',
            (FC_CHANNELS, columns),
        )
    # Background is the last class in both.
    yield from _layer(
        'roi_heads.box_predictor.cls_score',
        f'{box}.fc_cls',
        (num_classes + 1, FC_CHANNELS),
    )
    yield from _layer(
        'roi_heads.box_predictor.bbox_pred',
        f'{box}.fc_reg',
        (num_classes * 4, FC_CHANNELS),
    )
    mask = 'roi_head.mask_head'
    for i in range(4):
        yield from _layer(
            f'roi_heads.mask_head.mask_fcn{i + 1}',
            f'{mask}.convs.{i}.conv',
            (c, c, 3, 3),
        )
    yield from _layer(
        'roi_heads.mask_head.deconv', f'{mask}.upsample', (c, c, 2, 2), transposed=True
    )
    yield from _layer(
        'roi_heads.mask_head.predictor', f'{mask}.conv_logits', (num_classes, c, 1, 1)
    )


def _retinanet_heads(embed_dims: tuple[int, ...], num_classes: int) -> Iterator[Entry]:
    c = FPN_CHANNELS
    for level, channels in ((6, embed_dims[-1]), (7, c)):
        yield from _layer(
            f'backbone.top_block.p{level}',
            f'neck.fpn_convs.{level - 3}.conv',
            (c, channels, 3, 3),
        )
    for subnet, convs in (('cls_subnet', 'cls_convs'), ('bbox_subnet', 'reg_convs')):
        for i in range(4):
            # Every second module of detectron2's subnet is a ReLU.
            yield from _layer(
                f'head.{subnet}.{2 * i}', f'bbox_head.{convs}.{i}.conv', (c, c, 3, 3)
            )
    yield from _layer(
        'head.cls_score',
        'bbox_head.retina_cls',
        (RETINA_ANCHORS * num_classes, c, 3, 3),
        anchor_order=True,
    )
    yield from _layer(
        'head.bbox_pred', 'bbox_head.retina_reg', (RETINA_ANCHORS * 4, c, 3, 3), True
    )


def entries(detector: Detector) -> list[Entry]:
    """List every tensor of a detector.

    Args:
        detector (Detector): Kind, backbone and class count.

    Returns:
        list[Entry]: One entry for each tensor, backbone first.
    """
    dims = ARCHS[detector.backbone][detector.arch].embed_dims
    result = list(_backbone(detector))
    result += _fpn(dims, OUT_INDICES[detector.kind])
    if detector.kind == 'mask_rcnn':
        result += _mask_rcnn_heads(detector.num_classes)
    else:
        result += _retinanet_heads(dims, detector.num_classes)
    return result


def swap_anchor_order(tensor: Tensor) -> Tensor:
    """Exchange the size and the ratio axis of RetinaNet's nine anchors.

    detectron2 counts anchor ``3 * size + ratio``, mmdet ``3 * ratio + size``.
    Both axes have three entries, so the same exchange serves both ways.

    Args:
        tensor (Tensor): Weight or bias; the first axis is 9 x something.

    Returns:
        Tensor: A contiguous copy of the same shape.
    """
    grid = tensor.reshape(RETINA_SCALES, RETINA_RATIOS, -1)
    return grid.transpose(0, 1).reshape(tensor.shape).contiguous()


def constants(kind: str, backbone: str = 'ResT') -> dict[str, Tensor]:
    """Tensors that detectron2 may store although they are no weights.

    Older releases of detectron2 wrote the pixel statistics and the anchors of
    a cell into the checkpoint. mmdet takes both from the config; a checkpoint
    that holds other values needs another config.

    Args:
        kind (str): ``'mask_rcnn'`` or ``'retinanet'``.
        backbone (str): ``'ResT'`` or ``'ResTV2'``. Default: ``'ResT'``.

    Returns:
        dict[str, Tensor]: Name to the values of the published models.
    """
    mean, std = PIXELS[backbone]
    result = {
        'pixel_mean': torch.tensor(mean).view(3, 1, 1),
        'pixel_std': torch.tensor(std).view(3, 1, 1),
    }
    if kind == 'mask_rcnn':
        prefix, octaves = 'proposal_generator.anchor_generator.cell_anchors', [1.0]
    else:
        prefix = 'anchor_generator.cell_anchors'
        octaves = [2 ** (i / RETINA_SCALES) for i in range(RETINA_SCALES)]
    for level, size in enumerate((32, 64, 128, 256, 512)):
        half = []
        for octave in octaves:
            for ratio in (0.5, 1.0, 2.0):
                width = size * octave / ratio**0.5
                half.append((width / 2, width * ratio / 2))
        w, h = torch.tensor(half).unbind(1)
        result[f'{prefix}.{level}'] = torch.stack((-w, -h, w, h), 1)
    return result
