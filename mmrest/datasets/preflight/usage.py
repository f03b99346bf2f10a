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
    left = np.ones(len(content.ids), bool)

    def take(reason: np.ndarray) -> int:
        """Count and remove the remaining annotations with a reason."""
        nonlocal left
        count = int((left & reason).sum())
        left = left & ~reason
        return count

    skipped = _count(
        (take(content.ignore), 'annotations are marked "ignore"'),
        (take((size <= 0).any(1)), 'boxes have no width or height, or a negative one'),
        (take((inside <= 0).any(1)), 'boxes lie outside of their image'),
        (take(content.area <= 0), 'annotations have an area of 0 or less'),
        (take((size < 1).any(1)), 'boxes are narrower or lower than a pixel'),
    )
    skipped = [f'{text} and are skipped' for text in skipped]
    filled = [
        f'{count} annotations have no {field}, which is filled in'
        for field, count in content.missing_fields.items()
    ]
    if dataset.test_mode:
        if skipped:
            skipped.append('the metric counts all these, as objects to be found')
        if dataset.evaluated and not content.ids:
            filled.append(
                'there are no annotations to evaluate with, so the metric will be -1 '
                '(format_only=True in the evaluator only writes the results)'
            )
        return skipped + filled

    of_classes = content.of_classes | (not dataset.classes)
    others = take(~of_classes)
    crowd, objects = left & content.crowd, left & ~content.crowd
    unusable = np.zeros(len(left), bool)
    if dataset.needs_masks:
        polygons = [isinstance(m, Polygons) and not m.usable for m in content.masks]
        unusable = objects & np.array(polygons, bool)
        objects &= ~unusable
    beyond = ((start < -BEYOND) | (start + size > limits + BEYOND)).any(1)
    beyond &= objects | crowd

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
    return [
        *skipped,
        *filled,
        *_count(
            (
                others,
                'annotations are of categories that are no class, and are skipped',
            ),
            (
                unusable.sum(),
                'objects have no polygon of three points or more, and are ignored',
            ),
            (crowd.sum(), 'crowd regions are no objects to learn'),
            (
                beyond.sum(),
                'boxes reach beyond their image and are cut at its border',
            ),
            (dropped.sum(), f'{none} left out'),
            ((used & empty).sum(), f'{none} trained on as background'),
            (
                small.sum(),
                f'images have a side of less than {dataset.min_size} pixels and are '
                'left out',
            ),
            (
                only_crowds.sum(),
                'images only have crowd regions and are trained on as background',
            ),
            (
                (background & ~only_crowds).sum(),
                'images have annotations that are all skipped or ignored, and are '
                'trained on as background',
            ),
        ),
    ]


def _count(*reasons: tuple[int, str]) -> list[str]:
    """Return a clause for each reason with a count above 0."""
    return [f'{count} {text}' for count, text in reasons if count]
