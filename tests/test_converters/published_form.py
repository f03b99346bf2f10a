"""The published detectors in plain PyTorch, as the detectron2 recipe defines them.

This is what the converted checkpoints are compared with on other inputs than
the golden ones: FPN, heads, inference and losses written from their formulas on
a state dict under detectron2's names, with torchvision's NMS and RoIAlign and
without any part of mmdet. Only the backbone is mmrest's, which is checked
against golden arrays of its own.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_utils
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, roi_align

MEAN_BGR = (103.53, 116.28, 123.675)
MAX_LOG_SCALE = math.log(1000 / 16)
RATIOS = (0.5, 1.0, 2.0)
# the detectors that were published
PUBLISHED = [
    (kind, arch) for kind in ('mask_rcnn', 'retinanet') for arch in ('small', 'base')
]


def empty(shapes):
    """Zeros under the given names, with integers for the counters."""
    return {
        name: torch.zeros(
            shape, dtype=torch.long if name.endswith('tracked') else torch.float32
        )
        for name, shape in shapes.items()
    }


def preprocess(image_bgr) -> Tensor:
    """HxWx3 uint8 BGR to a normalised 1x3xH'xW' tensor, sides multiples of 32."""
    image = torch.as_tensor(image_bgr).permute(2, 0, 1).float()
    image = image - torch.tensor(MEAN_BGR).view(3, 1, 1)
    h, w = image.shape[1:]
    return F.pad(image, (0, -w % 32, 0, -h % 32))[None]


def conv(x, sd, name, **kwargs):
    weight = sd[f'{name}.weight']
    if 'padding' not in kwargs:
        kwargs['padding'] = weight.shape[-1] // 2
    return F.conv2d(x, weight, sd[f'{name}.bias'], **kwargs)


def fpn(stages, sd):
    """Top-down pathway over the given stage outputs, finest first."""
    first = 6 - len(stages)
    outputs, above = {}, None
    for level in range(5, first - 1, -1):
        x = conv(stages[level - first], sd, f'backbone.fpn_lateral{level}')
        if above is not None:
            x = x + F.interpolate(above, scale_factor=2.0, mode='nearest')
        above = x
        outputs[f'p{level}'] = conv(x, sd, f'backbone.fpn_output{level}')
    if first == 3:
        p6 = conv(stages[-1], sd, 'backbone.top_block.p6', stride=2)
        p7 = conv(F.relu(p6), sd, 'backbone.top_block.p7', stride=2)
        outputs.update(p6=p6, p7=p7)
    else:
        outputs['p6'] = F.max_pool2d(outputs['p5'], 1, stride=2)
    return dict(sorted(outputs.items()))


def grid_anchors(levels, octaves):
    """Anchors of every level, (H * W * A, 4); A counts sizes, then ratios."""
    result = []
    for name, x in levels.items():
        stride = 2 ** int(name[1:])
        # RetinaNet's basic size is 4 strides, the RPN's 8: 32 at its first level
        base = stride * (4 if len(octaves) > 1 else 8)
        cell = []
        for octave in octaves:
            for ratio in RATIOS:
                w = base * octave / math.sqrt(ratio)
                cell.append((-w / 2, -w * ratio / 2, w / 2, w * ratio / 2))
        ys = torch.arange(x.shape[-2]) * float(stride)
        xs = torch.arange(x.shape[-1]) * float(stride)
        y, x = torch.meshgrid(ys, xs, indexing='ij')
        shift = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4)
        result.append((shift + torch.tensor(cell)).reshape(-1, 4))
    return result


def per_anchor(x, width):
    """(1, A * width, H, W) to (H * W * A, width)."""
    _, channels, h, w = x.shape
    x = x.reshape(channels // width, width, h, w)
    return x.permute(2, 3, 0, 1).reshape(-1, width)


def encode(anchors, boxes, weights=(1.0, 1.0, 1.0, 1.0)):
    size = anchors[:, 2:] - anchors[:, :2]
    centre = anchors[:, :2] + size / 2
    target = boxes[:, 2:] - boxes[:, :2]
    target_centre = boxes[:, :2] + target / 2
    delta = torch.cat(((target_centre - centre) / size, (target / size).log()), 1)
    return delta * torch.tensor(weights)


def decode(anchors, deltas, weights=(1.0, 1.0, 1.0, 1.0)):
    """Boxes from (N, 4 K) deltas to N anchors, as (N, K, 4)."""
    deltas = deltas.reshape(len(anchors), -1, 4) / torch.tensor(weights)
    size = (anchors[:, 2:] - anchors[:, :2])[:, None]
    centre = anchors[:, None, :2] + size / 2
    new_centre = centre + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat((new_centre - half, new_centre + half), -1)


def clip(boxes, height, width):
    x = boxes[..., 0::2].clamp(0, width)
    y = boxes[..., 1::2].clamp(0, height)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)


def non_empty(boxes):
    return ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)


# RetinaNet


def retinanet_head(levels, sd):
    """Logits (H * W * 9, classes) and deltas (H * W * 9, 4) of every level."""
    num_classes = sd['head.cls_score.weight'].shape[0] // 9
    logits, deltas = [], []
    for x in levels.values():
        cls, reg = x, x
        for i in range(0, 8, 2):
            cls = F.relu(conv(cls, sd, f'head.cls_subnet.{i}'))
            reg = F.relu(conv(reg, sd, f'head.bbox_subnet.{i}'))
        logits.append(per_anchor(conv(cls, sd, 'head.cls_score'), num_classes))
        deltas.append(per_anchor(conv(reg, sd, 'head.bbox_pred'), 4))
    return logits, deltas


def retinanet_anchors(levels):
    return grid_anchors(levels, [2 ** (i / 3) for i in range(3)])


def rescale(boxes, size, output_size):
    """Boxes on an image of ``size`` (h, w) to boxes on one of ``output_size``."""
    ratio = torch.tensor([output_size[1] / size[1], output_size[0] / size[0]])
    return clip(boxes * ratio.repeat(2), *output_size)


def retinanet_inference(levels, sd, size, output_size=None):
    """Boxes, scores and labels. The boxes are clipped after the NMS."""
    logits, deltas = retinanet_head(levels, sd)
    boxes, scores, labels = [], [], []
    for anchor, logit, delta in zip(retinanet_anchors(levels), logits, deltas):
        score = logit.sigmoid().flatten()
        kept = (score > 0.05).nonzero().flatten()
        score, order = score[kept].sort(descending=True)
        kept, score = kept[order[:1000]], score[:1000]
        where = torch.div(kept, logit.shape[1], rounding_mode='floor')
        box = decode(anchor[where], delta[where])[:, 0]
        boxes.append(box)
        scores.append(score)
        labels.append(kept % logit.shape[1])
    boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    keep = batched_nms(boxes, scores, labels, 0.5)[:100]
    scores, labels = scores[keep], labels[keep]
    boxes = rescale(boxes[keep], size, output_size or size)
    keep = non_empty(boxes)
    return {'boxes': boxes[keep], 'scores': scores[keep], 'labels': labels[keep]}


# Mask R-CNN


def rpn_head(levels, sd):
    """Objectness logits (H * W * 3,) and deltas (H * W * 3, 4) of every level."""
    name = 'proposal_generator.rpn_head'
    logits, deltas = [], []
    for x in levels.values():
        x = F.relu(conv(x, sd, f'{name}.conv'))
        logits.append(per_anchor(conv(x, sd, f'{name}.objectness_logits'), 1)[:, 0])
        deltas.append(per_anchor(conv(x, sd, f'{name}.anchor_deltas'), 4))
    return logits, deltas


def proposals(levels, sd, size, pre_nms=1000, post_nms=1000):
    """Proposals (up to 1000, 4), ranked by logit."""
    logits, deltas = rpn_head(levels, sd)
    boxes, scores, numbers = [], [], []
    for number, (anchor, logit, delta) in enumerate(
        zip(grid_anchors(levels, [1.0]), logits, deltas)
    ):
        score, order = logit.sort(descending=True)
        order = order[:pre_nms]
        boxes.append(clip(decode(anchor[order], delta[order])[:, 0], *size))
        scores.append(score[:pre_nms])
        numbers.append(torch.full((len(order),), number))
    boxes, scores, numbers = torch.cat(boxes), torch.cat(scores), torch.cat(numbers)
    keep = non_empty(boxes)
    boxes, scores, numbers = boxes[keep], scores[keep], numbers[keep]
    return boxes[batched_nms(boxes, scores, numbers, 0.7)[:post_nms]]


def pool(levels, boxes, output_size):
    """RoIAlign of each box on the level that fits its size."""
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    level = (4 + torch.log2(side / 224 + 1e-8)).floor().clamp(2, 5).int()
    out = boxes.new_zeros(len(boxes), levels['p2'].shape[1], output_size, output_size)
    for number in range(2, 6):
        chosen = (level == number).nonzero().flatten()
        rois = torch.cat((torch.zeros(len(chosen), 1), boxes[chosen]), 1)
        out[chosen] = roi_align(
            levels[f'p{number}'], rois, output_size, 2.0**-number, 0, aligned=True
        )
    return out


def linear(x, sd, name):
    return F.linear(x, sd[f'{name}.weight'], sd[f'{name}.bias'])


def box_head(levels, sd, boxes):
    """Class logits (N, classes + 1) and deltas (N, 4 classes)."""
    x = pool(levels, boxes, 7).flatten(1)
    for i in (1, 2):
        x = F.relu(linear(x, sd, f'roi_heads.box_head.fc{i}'))
    name = 'roi_heads.box_predictor'
    return linear(x, sd, f'{name}.cls_score'), linear(x, sd, f'{name}.bbox_pred')


def mask_head(levels, sd, boxes):
    """Mask logits (N, classes, 28, 28)."""
    x = pool(levels, boxes, 14)
    for i in range(1, 5):
        x = F.relu(conv(x, sd, f'roi_heads.mask_head.mask_fcn{i}'))
    name = 'roi_heads.mask_head.deconv'
    x = F.conv_transpose2d(x, sd[f'{name}.weight'], sd[f'{name}.bias'], stride=2)
    return conv(F.relu(x), sd, 'roi_heads.mask_head.predictor')


def paste(mask, box, height, width):
    """Sample a 28x28 mask at the image's pixel centres; threshold 0.5."""
    x0, y0, x1, y1 = box.tolist()
    y = (torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1)
    return F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5


def mask_rcnn_inference(levels, sd, size, output_size=None):
    """Boxes, scores, labels and masks, scaled to ``output_size`` (h, w)."""
    rois = proposals(levels, sd, size)
    logits, deltas = box_head(levels, sd, rois)
    scores = logits.softmax(1)[:, :-1]
    boxes = clip(decode(rois, deltas, (10.0, 10.0, 5.0, 5.0)), *size)
    where, labels = (scores > 0.05).nonzero().unbind(1)
    boxes, scores = boxes[where, labels], scores[where, labels]
    keep = batched_nms(boxes, scores, labels, 0.5)[:100]
    boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    masks = mask_head(levels, sd, boxes)[torch.arange(len(keep)), labels].sigmoid()
    height, width = output_size or size
    boxes = rescale(boxes, size, (height, width))
    keep = non_empty(boxes)
    boxes, scores, labels, masks = (t[keep] for t in (boxes, scores, labels, masks))
    pasted = [paste(m, b, height, width) for m, b in zip(masks, boxes)]
    pasted = torch.stack(pasted) if pasted else torch.zeros(0, height, width).bool()
    return {'boxes': boxes, 'scores': scores, 'labels': labels, 'masks': pasted}


# Training


def match(anchors, gt_boxes, low, high, low_quality):
    """Matched ground truth and 1 (object), 0 (background) or -1 (ignored)."""
    iou = box_iou(gt_boxes, anchors)
    best, index = iou.max(0)
    label = torch.full_like(index, -1)
    label[best < low] = 0
    label[best >= high] = 1
    if low_quality:
        label[(iou == iou.max(1, keepdim=True).values).any(0)] = 1
    return index, label


def focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """Sum of the focal loss."""
    p = logits.sigmoid()
    p_true = p * targets + (1 - p) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction='none')
    return (weight * (1 - p_true) ** gamma * entropy).sum()


def retinanet_losses(levels, sd, gt_boxes, gt_labels, normalizer=None):
    """Focal and L1 loss of one image over the number of positive anchors.

    The published recipe divides by a running mean of that number; pass it as
    ``normalizer``.
    """
    logits, deltas = retinanet_head(levels, sd)
    logits, deltas = torch.cat(logits), torch.cat(deltas)
    anchors = torch.cat(retinanet_anchors(levels))
    index, label = match(anchors, gt_boxes, 0.4, 0.5, low_quality=True)
    positive, valid = label == 1, label >= 0
    targets = torch.zeros_like(logits)
    targets[positive, gt_labels[index[positive]]] = 1
    normalizer = normalizer or max(1, int(positive.sum()))
    wanted = encode(anchors[positive], gt_boxes[index[positive]])
    return {
        'loss_cls': focal_loss(logits[valid], targets[valid]) / normalizer,
        'loss_bbox': (deltas[positive] - wanted).abs().sum() / normalizer,
    }


def rpn_losses(levels, sd, gt_boxes, sampled):
    """RPN losses of one image over the given choice of anchors.

    Args:
        sampled (Tensor): indices of the sampled anchors, all levels in a row.
    """
    logits, deltas = rpn_head(levels, sd)
    logits, deltas = torch.cat(logits), torch.cat(deltas)
    anchors = torch.cat(grid_anchors(levels, [1.0]))
    index, label = match(anchors, gt_boxes, 0.3, 0.7, low_quality=True)
    positive = sampled[label[sampled] == 1]
    wanted = encode(anchors[positive], gt_boxes[index[positive]])
    entropy = F.binary_cross_entropy_with_logits(
        logits[sampled], label[sampled].float(), reduction='sum'
    )
    return {
        'loss_rpn_cls': entropy / len(sampled),
        'loss_rpn_bbox': (deltas[positive] - wanted).abs().sum() / len(sampled),
    }


def roi_losses(levels, sd, rois, gt_boxes, gt_labels):
    """Box losses of one image over the given proposals."""
    num_classes = len(sd['roi_heads.box_predictor.cls_score.bias']) - 1
    logits, deltas = box_head(levels, sd, rois)
    index, label = match(rois, gt_boxes, 0.5, 0.5, low_quality=False)
    classes = gt_labels[index].where(label == 1, torch.tensor(num_classes))
    positive = label == 1
    wanted = encode(rois[positive], gt_boxes[index[positive]], (10.0, 10.0, 5.0, 5.0))
    own = deltas.reshape(len(rois), num_classes, 4)[positive, classes[positive]]
    return {
        'loss_cls': F.cross_entropy(logits, classes),
        'loss_bbox': (own - wanted).abs().sum() / len(rois),
    }


def mask_loss(levels, sd, rois, labels, targets):
    """Mask loss over positive proposals and their (N, 28, 28) targets."""
    logits = mask_head(levels, sd, rois)[torch.arange(len(rois)), labels]
    return F.binary_cross_entropy_with_logits(logits, targets)


def rasterize(polygon, box, side=28):
    """Target of the mask head: the polygon on a grid over the box."""
    # single precision as NumPy has it: the rasterizer feels the last digit
    box = box.numpy()
    points = np.array(polygon, dtype=np.float64)
    for axis in (0, 1):
        scale = side / max(box[axis + 2] - box[axis], 0.1)
        points[axis::2] = (points[axis::2] - box[axis]) * scale
    rle = mask_utils.frPyObjects([points.tolist()], side, side)
    return torch.from_numpy(mask_utils.decode(rle)[..., 0]).float()
