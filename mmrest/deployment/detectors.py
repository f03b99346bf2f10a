"""MMDetection's detectors from pixels to boxes, as exportable modules.

The layers are those of the model. MMDetection's computations between and after them use
lists, masks of dynamic size and ``InstanceData``, which export cannot record. Here they
are implemented for one image, with the same results.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.roi_heads import FCNMaskHead, SingleRoIExtractor, StandardRoIHead
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from .operators import nms, paste_masks, pyramid_roi_align
from .preprocessing import Preprocess, require, side_of
from .verification import Arrays, Differences, compare_detections

# MMDetection's limit on the logarithm of a decoded width or height
MAX_LOG_RATIO = 4.135166556742356


class Detector(nn.Module):
    """Base class of the detectors.

    Args:
        model (nn.Module): MMDetection's model.

    Raises:
        ExportError: If a part of the model is not supported.
    """

    # the only attribute with layers: export traces proxies of layers with two names
    model: Any
    cfg: Any
    num_classes: int
    output_names: tuple[str, ...] = ('boxes', 'scores', 'labels')
    input_names = ('image', 'size')
    task = 'detection'
    has_batch = False  # the number of boxes depends on the image

    def __init__(self, model: Any) -> None:
        super().__init__()
        given = model.data_preprocessor
        self.preprocess = Preprocess.of(
            given,
            to_bgr=not given._channel_conversion,  # MMDetection reads BGR
            divisor=given.pad_size_divisor,
            pad_value=given.pad_value,
        )
        self.model = model

    @torch.no_grad()
    def predict(self, image: np.ndarray, size: np.ndarray) -> Arrays:
        """Return MMDetection's prediction for the arguments of ``forward``."""
        height, width = image.shape[1:3]
        meta = dict(
            img_shape=(height, width),
            ori_shape=tuple(size.tolist()),
            scale_factor=(width / int(size[1]), height / int(size[0])),
        )
        pixels = torch.from_numpy(image[0]).permute(2, 0, 1).flip(0)
        data = dict(inputs=[pixels], data_samples=[DetDataSample(metainfo=meta)])
        found = self.model.test_step(data)[0].pred_instances
        result = dict(boxes=found.bboxes, scores=found.scores, labels=found.labels)
        if 'masks' in found:
            result['masks'] = found.masks
        return {name: tensor.numpy() for name, tensor in result.items()}

    def compare(self, found: Arrays, expected: Arrays) -> tuple[Differences, str]:
        """See :func:`mmrest.deployment.verification.compare_detections`."""
        limit = self.cfg.max_per_img
        return compare_detections(found, expected, self.score_threshold, limit)

    @property
    def score_threshold(self) -> float:
        """Lower bound of the scores of detections."""
        return float(self.cfg.get('score_thr', 0))

    def read(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of an image of shape (1, H, W, 3)."""
        return self.model.extract_feat(self.preprocess(image))


class RetinaNet(Detector):
    """A RetinaNet from pixels to boxes.

    Args:
        model (nn.Module): MMDetection's ``RetinaNet``, with ``RetinaHead`` or
            ``ClipLastRetinaHead``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        head = model.bbox_head
        check_anchor_head(head, RetinaHead, 'bbox_head')
        self.cfg, self.num_classes = head.test_cfg, head.num_classes
        self.clips_last = type(head).__name__ == 'ClipLastRetinaHead'

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect objects.

        Args:
            image (Tensor): Of shape (1, H, W, 3), type uint8, RGB.
            size (Tensor): Height and width of the image before resizing, of type int64.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Boxes in pixels of the image before resizing,
            of shape (n, 4), scores and labels, of shape (n,), by descending score.
        """
        shape = (image.shape[1], image.shape[2])
        boxes, scores, labels = propose(
            self.model.bbox_head, self.read(image), shape, self.cfg.get('nms_pre', -1)
        )
        boxes = boxes * size_ratio(size, shape)
        limit = self.cfg.get('min_bbox_size', -1)
        valid = (scores > self.score_threshold) & is_larger(boxes, limit)
        index = nms_of_groups(boxes, scores, labels, valid, self.cfg)
        boxes, scores, labels = boxes[index], scores[index], labels[index]
        if self.clips_last:
            boxes = clip(boxes, size[1], size[0])
            index = is_larger(boxes, 0).nonzero()[:, 0]
            boxes, scores, labels = boxes[index], scores[index], labels[index]
        return boxes, scores, labels


class MaskRCNN(Detector):
    """A Mask R-CNN, or a Faster R-CNN, from pixels to boxes and masks.

    Args:
        model (nn.Module): MMDetection's model.
        paste (bool): Whether to return masks of the whole image. Otherwise, masks are
            the probabilities within each box, in the resolution of the mask head.
            Default: True.
    """

    def __init__(self, model: Any, paste: bool = True) -> None:
        super().__init__(model)
        rpn, roi = model.rpn_head, model.roi_head
        check_anchor_head(rpn, RPNHead, 'rpn_head')
        require(type(roi) is StandardRoIHead, 'roi_head', 'StandardRoIHead', roi)
        check_box_head(roi.bbox_head)
        check_extractor(roi.bbox_roi_extractor)
        if roi.with_mask:
            check_extractor(roi.mask_roi_extractor)
            is_fcn = type(roi.mask_head) is FCNMaskHead
            require(is_fcn, 'roi_head.mask_head', 'FCNMaskHead', roi.mask_head)
            self.output_names = (*self.output_names, 'masks')
        self.cfg, self.num_classes = roi.test_cfg, roi.bbox_head.num_classes
        self.paste, self.with_mask = paste, roi.with_mask

    def compare(self, found: Arrays, expected: Arrays) -> tuple[Differences, str]:
        """As for other detectors; masks of boxes, which are not bool, are pasted."""
        if 'masks' in expected and found['masks'].dtype != bool:
            height, width = expected['masks'].shape[1:]
            masks, boxes = (torch.from_numpy(found[n]) for n in ('masks', 'boxes'))
            rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
            threshold = self.cfg.mask_thr_binary
            pasted = paste_masks(masks, boxes, rows, columns, threshold)
            found = dict(found, masks=pasted.numpy())
        return super().compare(found, expected)

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            image (Tensor): As for :meth:`RetinaNet.forward`.
            size (Tensor): As for :meth:`RetinaNet.forward`.

        Returns:
            tuple[Tensor, ...]: Boxes, scores and labels, and with a mask head the
            masks: of type bool and shape (n, height, width), or without ``paste``
            probabilities of shape (n, 28, 28).
        """
        shape = (image.shape[1], image.shape[2])
        features = self.read(image)
        proposals = self.find_proposals(features, shape)
        ratio = size_ratio(size, shape)
        boxes, scores, labels = self.classify(features, proposals, shape, ratio)
        if not self.with_mask:
            return boxes, scores, labels
        masks = self.segment(features, boxes / ratio, labels)
        if self.paste:
            rows, columns = centres(size, 0), centres(size, 1)
            threshold = self.cfg.mask_thr_binary
            masks = paste_masks(masks, boxes, rows, columns, threshold)
        return boxes, scores, labels, masks

    def find_proposals(self, features: Sequence[Tensor], shape: tuple) -> Tensor:
        """Return boxes (n, 4) that may contain an object."""
        rpn = self.model.rpn_head
        cfg = rpn.test_cfg
        boxes, scores, _, levels = propose(
            rpn, features, shape, cfg.get('nms_pre', -1), with_levels=True
        )
        valid = is_larger(boxes, cfg.get('min_bbox_size', -1))
        return boxes[nms_of_groups(boxes, scores, levels, valid, cfg)]

    def classify(
        self, features: Sequence[Tensor], proposals: Tensor, shape: tuple, ratio: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels of the detections."""
        roi, cfg = self.model.roi_head, self.cfg
        head = roi.bbox_head
        pooled = extract(roi.bbox_roi_extractor, features, proposals)
        scores, deltas = head(pooled)
        # n, classes
        scores = scores.softmax(dim=-1)[:, :-1]
        classes = head.num_classes
        repeats = 1 if head.reg_class_agnostic else classes
        anchors = proposals[:, None].expand(-1, repeats, 4)
        deltas = deltas.reshape(-1, repeats, 4)
        boxes = decode(head.bbox_coder, anchors, deltas, shape) * ratio
        boxes = boxes.expand(-1, classes, 4).reshape(-1, 4)
        labels = torch.arange(classes, device=scores.device)
        labels = labels.expand(scores.shape[0], classes).reshape(-1)
        scores = scores.reshape(-1)
        valid = scores > cfg.score_thr
        index = nms_of_groups(boxes, scores, labels, valid, cfg)
        return boxes[index], scores[index], labels[index]

    def segment(
        self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor
    ) -> Tensor:
        """Return mask probabilities (n, S, S) within each box."""
        roi = self.model.roi_head
        head = roi.mask_head
        pooled = extract(roi.mask_roi_extractor, features, boxes)
        masks = head(pooled).sigmoid()
        if head.class_agnostic:
            return masks[:, 0]
        index = labels[:, None, None, None].expand(-1, 1, *masks.shape[2:])
        return masks.gather(1, index)[:, 0]


# ---------------------------------------------------------------- steps


def propose(
    head: Any,
    features: Sequence[Tensor],
    shape: tuple,
    num_best: int,
    with_levels: bool = False,
) -> tuple[Tensor, ...]:
    """Return the best anchors of each level of a dense head, decoded.

    Args:
        head (nn.Module): ``RetinaHead`` or ``RPNHead``.
        features (Sequence[Tensor]): Maps of shape (1, C, H_i, W_i).
        shape (tuple[int, int]): Height and width of the image.
        num_best (int): Number of anchors per level; all if it is not positive.
        with_levels (bool): Whether to return the levels too. Default: False.

    Returns:
        tuple[Tensor, ...]: Boxes (n, 4), scores (n,), labels (n,), and levels (n,) if
        requested.
    """
    all_scores, all_deltas = head(features)
    sizes = [(scores.shape[2], scores.shape[3]) for scores in all_scores]
    device = all_scores[0].device
    anchors = head.prior_generator.grid_priors(sizes, device=device)
    parts = []
    for level, (scores, deltas) in enumerate(zip(all_scores, all_deltas)):
        # anchors x classes
        scores = scores[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        if head.use_sigmoid_cls:
            scores = scores.sigmoid()
        else:
            scores = scores.softmax(dim=-1)[:, :-1]
        classes = scores.shape[1]
        scores = scores.reshape(-1)
        count = scores.shape[0]
        if num_best > 0:
            count = torch.sym_min(num_best, count)
        scores, index = scores.topk(count)
        anchor = torch.div(index, classes, rounding_mode='floor')
        deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)[anchor]
        boxes = decode(head.bbox_coder, anchors[level][anchor], deltas, shape)
        part: tuple[Tensor, ...] = (boxes, scores, index - anchor * classes)
        if with_levels:
            part = (*part, torch.full_like(index, level))
        parts.append(part)
    return tuple(torch.cat(tensors) for tensors in zip(*parts))


def decode(coder: Any, anchors: Tensor, deltas: Tensor, shape: tuple) -> Tensor:
    """Decode deltas of anchors, both of shape (..., 4), to boxes."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5
    extent = anchors[..., 2:] - anchors[..., :2]
    centre = centre + extent * deltas[..., :2]
    logs = deltas[..., 2:].clamp(min=-MAX_LOG_RATIO, max=MAX_LOG_RATIO)
    extent = extent * logs.exp()
    boxes = torch.cat([centre - extent * 0.5, centre + extent * 0.5], dim=-1)
    if not coder.clip_border:
        return boxes
    height, width = (boxes.new_full((), side) for side in shape)
    return clip(boxes, width, height)


def clip(boxes: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Clip boxes (..., 4) to the image."""
    limits = torch.stack([width, height, width, height]).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits)


def size_ratio(size: Tensor, shape: tuple) -> Tensor:
    """Factors for x1, y1, x2, y2 from ``shape`` to the size before resizing."""
    y, x = size[0] / shape[0], size[1] / shape[1]
    return torch.stack([x, y, x, y]).to(torch.float32)


def centres(size: Tensor, index: int) -> Tensor:
    """Centres of the pixels along an axis."""
    return torch.arange(side_of(size, index), device=size.device).float() + 0.5


def is_larger(boxes: Tensor, limit: float) -> Tensor:
    """Whether both sides of a box are larger than a limit, if that is not negative."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return (sides > limit).all(dim=1) if limit >= 0 else boxes[:, 0] == boxes[:, 0]


def nms_of_groups(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, cfg: Any
) -> Tensor:
    """Apply non-maximum suppression within each group, and return indices.

    As in :func:`mmcv.ops.batched_nms`, groups are shifted apart, so that coordinates
    are rounded in the same way.
    """
    options = cfg.nms
    largest = torch.where(valid, boxes.amax(dim=1), 0.0).max()
    apart = boxes + (groups.to(boxes.dtype) * (largest + 1))[:, None]
    scores = torch.where(valid, scores, -1.0)
    return nms(apart, scores, float(options['iou_threshold']), int(cfg.max_per_img))


def extract(extractor: Any, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Extract features (n, C, S, S) of boxes, from the levels for their sizes."""
    layers = extractor.roi_layers
    extent = boxes[:, 2:] - boxes[:, :2]
    scale = (extent[:, 0] * extent[:, 1]).sqrt()
    levels = (scale / extractor.finest_scale + 1e-6).log2().floor()
    levels = levels.clamp(min=0, max=len(layers) - 1).to(torch.int64)
    return pyramid_roi_align(
        list(features[: len(layers)]),
        boxes,
        levels,
        [layer.spatial_scale for layer in layers],
        layers[0].output_size[0],
        layers[0].sampling_ratio,
    )


# ---------------------------------------------------------------- supported parts


def check_anchor_head(head: Any, kind: type, place: str) -> None:
    own = type(head) is kind or type(head).__name__ == 'ClipLastRetinaHead'
    require(own, place, kind.__name__, head)
    generator = head.prior_generator
    is_known = type(generator) is AnchorGenerator and not generator.use_box_type
    require(is_known, f'{place}.anchor_generator', 'AnchorGenerator', generator)
    check_coder(head.bbox_coder, f'{place}.bbox_coder')
    check_nms(head.test_cfg, place)


def check_box_head(head: Any) -> None:
    place = 'roi_head.bbox_head'
    is_plain = head.with_reg and head.with_cls and not head.custom_activation
    require(is_plain, place, 'a softmax over classes, and boxes', head)
    check_coder(head.bbox_coder, f'{place}.bbox_coder')


def check_coder(coder: Any, place: str) -> None:
    is_known = type(coder) is DeltaXYWHBBoxCoder and not coder.add_ctr_clamp
    require(is_known, place, 'DeltaXYWHBBoxCoder without add_ctr_clamp', coder)


def check_nms(cfg: Any, place: str) -> None:
    known = {'type', 'iou_threshold'}
    is_plain = cfg.nms.get('type', 'nms') == 'nms' and set(cfg.nms) <= known
    wanted = "dict(type='nms', iou_threshold=...)"
    require(is_plain, f'test_cfg.nms of {place}', wanted, dict(cfg.nms))
    # MMDetection's parts differ in what a negative number means
    limit = cfg.max_per_img
    require(limit > 0, f'test_cfg.max_per_img of {place}', 'positive', str(limit))


def check_extractor(extractor: Any) -> None:
    layers = extractor.roi_layers
    is_known = type(extractor) is SingleRoIExtractor and all(
        isinstance(layer, RoIAlign) and layer.aligned and layer.pool_mode == 'avg'
        for layer in layers
    )
    wanted = 'SingleRoIExtractor with an aligned RoIAlign'
    require(is_known, 'roi_extractor', wanted, extractor)
