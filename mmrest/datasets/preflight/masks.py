"""Masks of annotation files: there, of the image's size, and readable.

``pycocotools`` checks little: from run lengths that end too early it returns memory
that nobody wrote, and at a coordinate that is not a number it never returns.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from ...utils.text import shorten
from ..coco_fields import run_lengths

if TYPE_CHECKING:
    from .coco import CocoDataset, Content

# In pixels; the time to fill a polygon grows with the length of its outline.
FAR = 1_000_000


class Polygons(NamedTuple):
    """What is to know of a list of polygons, in place of its coordinates.

    Attributes:
        first (int): How many numbers the first polygon has.
        usable (bool): Whether a polygon has three points or more.
        fault (str | None): What is wrong with the coordinates.
    """

    first: int
    usable: bool
    fault: Optional[str]


def summarise(mask: Any) -> Any:
    """Put :class:`Polygons` in the place of a list of polygons.

    Args:
        mask (list | dict | None): The ``segmentation`` of an annotation: polygons
            or RLE, compressed (text) or not (a list of run lengths).

    Returns:
        Polygons | dict | None: RLE as it is, and None for an empty list.
    """
    if not isinstance(mask, list) or not mask:
        return mask or None
    if not all(isinstance(part, list) for part in mask):
        return Polygons(0, True, 'neither a list of polygons nor RLE')
    fault = None
    for part in mask:
        try:
            # the sum is NaN if one coordinate is, to which min and max are blind
            if part and not (
                min(part) > -FAR and max(part) < FAR and math.isfinite(sum(part))
            ):
                fault = 'a coordinate is NaN, infinite or far off'
        except TypeError:
            fault = 'a coordinate is no number'
    usable = any(len(part) >= 6 and len(part) % 2 == 0 for part in mask)
    return Polygons(len(mask[0]), usable, fault)


def check_masks(dataset: 'CocoDataset', content: 'Content') -> Iterator[str]:
    """Look for masks that fail, or that mean something else than they say.

    Args:
        dataset (CocoDataset): One whose masks are used.
        content (Content): Its annotation file, from :func:`.coco.check_annotations`.

    Yields:
        str: Findings.
    """
    read = content.of_classes(dataset) & (content.image >= 0)
    if not dataset.test_mode:  # in a test the metric reads what mmdet leaves out
        read = (content.image >= 0) & ~content.ignore & (content.area > 0)
        read &= content.box[:, 2:].min(1) >= 1
    rows = np.flatnonzero(read).tolist()
    masks, ids = content.masks, content.ids
    lost = [ids[row] for row in rows if not masks[row]]
    if lost:
        yield (
            f'has {len(lost)} annotations without segmentation, and masks are used: '
            f'annotation {shorten(lost)}. Add polygons, remove them, or train a '
            'detector without a mask head.'
        )
    short = [
        ids[row]
        for row in rows
        if isinstance(masks[row], Polygons) and masks[row].first <= 4
    ]
    if short and dataset.test_mode:
        yield (
            f'has {len(short)} annotations whose first polygon has fewer than three '
            f'points, at which the mask metric fails: annotation {shorten(short)}. '
            'Remove these polygons.'
        )
    faults = [
        f'annotation {ids[row]} ({fault})'
        for row in rows
        if (fault := mask_fault(masks[row], content.images[content.image[row]]))
    ]
    if faults:
        yield (
            f'has {len(faults)} masks that are damaged or of another image: '
            f'{shorten(faults)}. Export them again, or remove the annotations.'
        )
    coded = [
        ids[row]
        for row in rows
        if dataset.polygons_only
        and isinstance(masks[row], dict)
        and not content.crowd[row]
    ]
    if coded:
        yield (
            f'has {len(coded)} objects whose mask is RLE, and the pipeline takes '
            f'polygons alone, so they would be ignored: annotation {shorten(coded)}. '
            'Set poly2mask=True in LoadAnnotations of the training pipeline.'
        )


def mask_fault(mask: Any, image: dict) -> Optional[str]:
    """Say what is wrong with a mask.

    Args:
        mask (Polygons | dict | None): From :func:`summarise`.
        image (dict): With its ``width`` and ``height`` in pixels.

    Returns:
        str | None: A few words, or None.
    """
    if not mask:
        return None
    if isinstance(mask, Polygons):
        return mask.fault
    if not isinstance(mask, dict):
        return 'neither a list of polygons nor RLE'
    height, width = image['height'], image['width']
    size, counts = mask.get('size'), mask.get('counts')
    if size != [height, width]:
        return f'RLE of size {size} for an image of [{height}, {width}]'
    if isinstance(counts, str):
        counts = run_lengths(counts)
    if not isinstance(counts, list) or not all(
        isinstance(count, int) and count >= 0 for count in counts
    ):
        return 'run lengths that cannot be read'
    if sum(counts) != height * width:
        return f'run lengths for {sum(counts)} of {height * width} pixels'
    return None
