"""Report how a run uses each annotation and image: used, skipped or ignored.

MMDetection's ``CocoDataset`` silently skips what it cannot use. The rules here are the
same, in the same order, so that the numbers are known before the run.
"""

import numpy as np

from .coco import CocoDataset, Content
from .masks import Polygons

# Boxes of COCO exceed the border by rounding
BEYOND = 1.0


def describe_use(dataset: CocoDataset, content: Content) -> list[str]:
    """Count annotations and images that are not used, by reason."""
    limits = content.sides[content.image]
    start, size = content.box[:, :2], content.box[:, 2:]
    inside = np.minimum(start + size, limits) - np.maximum(start, 0)
    counts, left = _sort_out(
        np.ones(len(content.ids), bool),
        (content.ignore, 'annotations are marked "ignore"'),
        ((size <= 0).any(1), 'boxes have no width or height, or a negative one'),
        ((inside <= 0).any(1), 'boxes lie outside of their image'),
        (content.area <= 0, 'annotations have an area of 0 or less'),
        ((size < 1).any(1), 'boxes are narrower or lower than a pixel'),
    )
    skipped = [f'{text} and are skipped' for text in counts]
    filled = [
        f'{count} annotations have no {field}, which is filled in'
        for field, count in content.missing_fields.items()
    ]
    if not dataset.test_mode:
        return [*skipped, *filled, *_describe_training(dataset, content, left)]
    if skipped:
        skipped.append('the metric counts all these, as objects to be found')
    if dataset.evaluated and not content.ids:
        filled.append(
            'there are no annotations to evaluate with, so the metric will be -1 '
            '(format_only=True in the evaluator only writes the results)'
        )
    return skipped + filled


def _describe_training(
    dataset: CocoDataset, content: Content, left: np.ndarray
) -> list[str]:
    """Describe the use of the annotations that are left, and of the images."""
    of_classes = content.of_classes | (not dataset.classes)
    others, left = _sort_out(
        left,
        (
            ~of_classes,
            'annotations are of categories that are no class, and are skipped',
        ),
    )
    crowd, objects = left & content.crowd, left & ~content.crowd
    unusable = np.zeros(len(left), bool)
    if dataset.needs_masks:
        polygons = [isinstance(m, Polygons) and not m.usable for m in content.masks]
        unusable = objects & np.array(polygons, bool)
        objects &= ~unusable
    limits = content.sides[content.image]
    start, end = content.box[:, :2], content.box[:, :2] + content.box[:, 2:]
    beyond = ((start < -BEYOND) | (end > limits + BEYOND)).any(1)

    # of each image, how many annotations there are, how many are learnt, and crowds
    total, learnt, crowds = (
        np.bincount(content.image[rows], minlength=len(content.images))
        for rows in (of_classes, objects, crowd)
    )
    empty = total == 0
    dropped = empty & dataset.filter_empty
    small = (content.sides.min(1) < dataset.min_size) & ~dropped
    used = ~dropped & ~small
    background = used & (learnt == 0) & ~empty
    only_crowds = background & (crowds == total)
    none = 'images have no annotation of the classes and are'
    reasons = (
        (
            unusable,
            'objects have no polygon of three points or more, and are ignored',
        ),
        (crowd, 'crowd regions are no objects to learn'),
        (
            beyond & (objects | crowd),
            'boxes reach beyond their image and are cut at its border',
        ),
        (dropped, f'{none} left out'),
        (used & empty, f'{none} trained on as background'),
        (
            small,
            f'images have a side of less than {dataset.min_size} pixels and are left '
            'out',
        ),
        (
            only_crowds,
            'images only have crowd regions and are trained on as background',
        ),
        (
            background & ~only_crowds,
            'images have annotations that are all skipped or ignored, and are trained '
            'on as background',
        ),
    )
    return others + [f'{rows.sum()} {text}' for rows, text in reasons if rows.any()]


def _sort_out(
    left: np.ndarray, *reasons: tuple[np.ndarray, str]
) -> tuple[list[str], np.ndarray]:
    """Count annotations by the first reason that applies; return the others too."""
    counts = []
    for rows, text in reasons:
        if (left & rows).any():
            counts.append(f'{(left & rows).sum()} {text}')
        left = left & ~rows
    return counts, left
