"""Names and shapes of a ResT detector's tensors, in detectron2 and in mmdet.

A detector is a list of :class:`Entry`: the name in the published (detectron2)
checkpoints, the name in mmdet, the shape, and whether RetinaNet's nine anchors have to
be reordered.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrest.models import rest, restv2

# Inputs of the FPN. Other output stages would change the features.
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
# layers whose outputs are ordered by RetinaNet's anchors
ANCHOR_LAYERS = ('head.cls_score', 'head.bbox_pred')

# a convolution or linear layer with a bias: both names, and the shape of its weight
Layer = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Detector:
    """The detector of a checkpoint."""

    kind: str  # ``'mask_rcnn'`` or ``'retinanet'``
    arch: str  # the backbone's name, as ``'small'``
    num_classes: int  # classes without background
    backbone: str = 'ResT'  # or ``'ResTV2'``

    @property
    def name(self) -> str:
        """As in names of configs, e.g. ``'mask_rcnn_restv2_tiny'``."""
        return f'{self.kind}_{self.backbone.lower()}_{self.arch}'

    def __str__(self) -> str:
        backbone = self.backbone.lower()
        return f'{self.kind} {backbone}_{self.arch}, {self.num_classes} classes'


@dataclass(frozen=True)
class Entry:
    """A tensor and its two names."""

    detectron2: str  # name in a published checkpoint
    mmdet: str  # name in mmdet's modules
    shape: tuple[int, ...]  # the same in both
    # whether the first axis is RetinaNet's nine anchors, size-major in detectron2 and
    # ratio-major in mmdet
    anchor_order: bool = False

    def reorder(self, tensor: Tensor) -> Tensor:
        """Convert the tensor between the two orders of anchors, if they differ."""
        return swap_anchor_order(tensor) if self.anchor_order else tensor


def _backbone(detector: Detector) -> Iterator[Entry]:
    with torch.device('meta'):  # names and shapes only, no memory
        build = BACKBONES[detector.backbone]
        model = build(detector.arch, out_indices=OUT_INDICES[detector.kind])
    for name, tensor in model.state_dict().items():
        # in detectron2, the output norms of ResTV2 are within a Sequential
        published = re.sub(r'^(norm_\d)\.', r'\1.0.', name)
        shape = tuple(tensor.shape)
        yield Entry(BACKBONE_PREFIX + published, f'backbone.{name}', shape)


def _fpn(embed_dims: tuple[int, ...], out_indices: tuple[int, ...]) -> Iterator[Layer]:
    c = FPN_CHANNELS
    for level, index in enumerate(out_indices):
        exponent = index + 2  # detectron2 names a level by log2 of its stride
        lateral, output = f'lateral_convs.{level}.conv', f'fpn_convs.{level}.conv'
        weight = (c, embed_dims[index], 1, 1)
        yield f'backbone.fpn_lateral{exponent}', f'neck.{lateral}', weight
        yield f'backbone.fpn_output{exponent}', f'neck.{output}', (c, c, 3, 3)


def _mask_rcnn_heads(num_classes: int) -> Iterator[Layer]:
    c, fc = FPN_CHANNELS, FC_CHANNELS
    rpn = 'proposal_generator.rpn_head'
    yield f'{rpn}.conv', 'rpn_head.rpn_conv', (c, c, 3, 3)
    yield f'{rpn}.objectness_logits', 'rpn_head.rpn_cls', (RPN_ANCHORS, c, 1, 1)
    yield f'{rpn}.anchor_deltas', 'rpn_head.rpn_reg', (RPN_ANCHORS * 4, c, 1, 1)
    box, predictor = 'roi_head.bbox_head', 'roi_heads.box_predictor'
    # Both flatten the pooled (C, 7, 7) map in this order, so columns stay.
    yield 'roi_heads.box_head.fc1', f'{box}.shared_fcs.0', (fc, c * ROI_SIZE**2)
    yield 'roi_heads.box_head.fc2', f'{box}.shared_fcs.1', (fc, fc)
    # Background is the last class in both.
    yield f'{predictor}.cls_score', f'{box}.fc_cls', (num_classes + 1, fc)
    yield f'{predictor}.bbox_pred', f'{box}.fc_reg', (num_classes * 4, fc)
    mask, published = 'roi_head.mask_head', 'roi_heads.mask_head'
    for i in range(4):
        yield f'{published}.mask_fcn{i + 1}', f'{mask}.convs.{i}.conv', (c, c, 3, 3)
    yield f'{published}.deconv', f'{mask}.upsample', (c, c, 2, 2)
    yield f'{published}.predictor', f'{mask}.conv_logits', (num_classes, c, 1, 1)


def _retinanet_heads(embed_dims: tuple[int, ...], num_classes: int) -> Iterator[Layer]:
    c = FPN_CHANNELS
    yield 'backbone.top_block.p6', 'neck.fpn_convs.3.conv', (c, embed_dims[-1], 3, 3)
    yield 'backbone.top_block.p7', 'neck.fpn_convs.4.conv', (c, c, 3, 3)
    for subnet, convs in (('cls_subnet', 'cls_convs'), ('bbox_subnet', 'reg_convs')):
        for i in range(4):
            # Every second module of detectron2's subnet is a ReLU.
            mmdet = f'bbox_head.{convs}.{i}.conv'
            yield f'head.{subnet}.{2 * i}', mmdet, (c, c, 3, 3)
    outputs = RETINA_ANCHORS * num_classes, RETINA_ANCHORS * 4
    yield 'head.cls_score', 'bbox_head.retina_cls', (outputs[0], c, 3, 3)
    yield 'head.bbox_pred', 'bbox_head.retina_reg', (outputs[1], c, 3, 3)


def entries(detector: Detector) -> list[Entry]:
    """List all tensors of a detector, those of the backbone first."""
    dims = ARCHS[detector.backbone][detector.arch].embed_dims
    layers = list(_fpn(dims, OUT_INDICES[detector.kind]))
    if detector.kind == 'mask_rcnn':
        layers += _mask_rcnn_heads(detector.num_classes)
    else:
        layers += _retinanet_heads(dims, detector.num_classes)
    result = list(_backbone(detector))
    for detectron2, mmdet, weight in layers:
        reorder = detectron2 in ANCHOR_LAYERS
        for name, shape in (('weight', weight), ('bias', weight[:1])):
            names = f'{detectron2}.{name}', f'{mmdet}.{name}'
            result.append(Entry(*names, shape, reorder))
    return result


def swap_anchor_order(tensor: Tensor) -> Tensor:
    """Exchange the size and the ratio axis of RetinaNet's nine anchors.

    In detectron2, an anchor has index ``3 * size + ratio``, in mmdet ``3 * ratio +
    size``. Both axes have three entries, so the same exchange works in both directions.
    The first axis of the weight or bias is a multiple of 9. The result is a contiguous
    copy.
    """
    grid = tensor.reshape(RETINA_SCALES, RETINA_RATIOS, -1)
    return grid.transpose(0, 1).reshape(tensor.shape).contiguous()


def constants(kind: str, backbone: str = 'ResT') -> dict[str, Tensor]:
    """Return tensors in published checkpoints that are not weights.

    Older releases of detectron2 saved the pixel statistics and the anchors of a cell.
    mmdet takes both from the config, so a checkpoint with other values needs another
    config.
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
