"""Operators of detectors that ONNX has too and ``torch.export`` does not trace.

An exported program contains them as single operators. PyTorch runs the functions below,
with MMCV's kernels, and ONNX the translations in
:mod:`mmrest.deployment.onnx_operators`.
"""

from collections.abc import Sequence

import torch
from mmcv.ops import nms as mmcv_nms
from mmcv.ops import roi_align as mmcv_roi_align
from torch import Tensor


@torch.library.custom_op('mmrest::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_boxes: int) -> Tensor:
    """Apply non-maximum suppression.

    Args:
        boxes (Tensor): Corners x1, y1, x2, y2, of shape (n, 4).
        scores (Tensor): Probabilities, of shape (n,). Boxes with negative ones are
            dropped.
        iou_threshold (float): Boxes that overlap a better one by more are dropped.
        max_boxes (int): Largest number of boxes to keep.

    Returns:
        Tensor: Indices of the boxes that are kept, by descending score.
    """
    valid = (scores >= 0).nonzero()[:, 0]
    if len(valid) == 0:
        return valid
    _, keep = mmcv_nms(boxes[valid], scores[valid], iou_threshold)
    return valid[keep[:max_boxes]]


@nms.register_fake
def _(boxes, scores, iou_threshold, max_boxes):  # noqa: ANN001
    count = torch.library.get_ctx().new_dynamic_size(min=0)
    return boxes.new_empty(count, dtype=torch.int64)


@torch.library.custom_op('mmrest::pyramid_roi_align', mutates_args=())
def pyramid_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
) -> Tensor:
    """Apply RoIAlign to each box, on its level of the feature pyramid of an image.

    Args:
        features (Sequence[Tensor]): Maps of shape (1, C, H_i, W_i).
        boxes (Tensor): Corners in pixels of the image, of shape (n, 4).
        levels (Tensor): Index of the map of each box, of shape (n,).
        scales (Sequence[float]): Size of each map relative to the image.
        size (int): Height and width of the result.
        sampling_ratio (int): Samples per cell along an axis; 0 for one per pixel.

    Returns:
        Tensor: Of shape (n, C, size, size).
    """
    result = boxes.new_zeros(len(boxes), features[0].shape[1], size, size)
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
    for i, (feature, scale) in enumerate(zip(features, scales)):
        index = (levels == i).nonzero()[:, 0]
        if len(index) > 0:
            # contiguous, since mmcv's kernel misreads channels_last maps on CPUs
            feature, shape = feature.contiguous(), (size, size)
            result[index] = mmcv_roi_align(
                feature, rois[index], shape, scale, sampling_ratio, 'avg', True
            )
    return result


@pyramid_roi_align.register_fake
def _(features, boxes, levels, scales, size, sampling_ratio):  # noqa: ANN001
    return boxes.new_empty(boxes.shape[0], features[0].shape[1], size, size)


@torch.library.custom_op('mmrest::paste_masks', mutates_args=())
def paste_masks(
    masks: Tensor, boxes: Tensor, rows: Tensor, columns: Tensor, threshold: float
) -> Tensor:
    """Paste masks of boxes into masks of the image.

    A mask is interpolated linearly along both axes and is 0 outside its box. This is a
    product with weights of the rows and one with weights of the columns.

    Args:
        masks (Tensor): Probabilities, of shape (n, S, S).
        boxes (Tensor): Corners in pixels of the image, of shape (n, 4).
        rows (Tensor): Centres of the image's rows, 0.5 to H - 0.5, of shape (H,).
        columns (Tensor): Centres of its columns, of shape (W,).
        threshold (float): Lowest probability of pixels in the mask.

    Returns:
        Tensor: Of type bool and shape (n, H, W).
    """
    result = masks.new_empty(len(masks), len(rows), len(columns), dtype=torch.bool)
    cells = torch.arange(masks.shape[-1], dtype=masks.dtype, device=masks.device) + 0.5

    def weights(centres: Tensor, start: Tensor, end: Tensor) -> Tensor:
        places = (centres - start) / (end - start) * len(cells)
        return (1 - (places[:, None] - cells).abs()).clamp(min=0)

    for i, (mask, box) in enumerate(zip(masks, boxes)):
        vertical = weights(rows, box[1], box[3])
        horizontal = weights(columns, box[0], box[2])
        result[i] = vertical @ mask @ horizontal.t() >= threshold
    return result


@paste_masks.register_fake
def _(masks, boxes, rows, columns, threshold):  # noqa: ANN001
    shape = (masks.shape[0], rows.shape[0], columns.shape[0])
    return masks.new_empty(shape, dtype=torch.bool)
