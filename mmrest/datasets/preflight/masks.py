"""Check masks of annotation files: present, of the image's size, and readable.

``pycocotools`` checks little. For run lengths that end too early it returns
uninitialised memory, and with a coordinate that is not a number it never returns.
"""

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from ...utils.text import shorten
from ..coco_fields import run_lengths

if TYPE_CHECKING:
    from .coco import CocoDataset, Content

# In pixels; the time to fill a polygon grows with the length of its outline
FAR = 1_000_000

# Polygons are four fifths of a file. As Python's numbers they would take most of the
# time and memory, so plain ones are replaced by their lengths before parsing.
_PART = rb'\[[-+.,\d\s]*\]'
_POLYGONS = re.compile(
    rb'"segmentation"\s*:\s*(\[\s*%b\s*(?:,\s*%b\s*)*\])' % (_PART, _PART)
)
_LENGTHS = 'mmrest_polygon_lengths'
_ZEROS = bytes.maketrans(b'123456789', b'000000000')


class Polygons(NamedTuple):
    """Facts about a list of polygons, in place of its coordinates."""

    first: int  # how many numbers the first polygon has
    usable: bool  # whether a polygon has three points or more
    fault: Optional[str] = None  # what is wrong with the coordinates


@functools.lru_cache(4096)
def _summarise(lengths: tuple[int, ...], fault: Optional[str] = None) -> Polygons:
    usable = any(length >= 6 and length % 2 == 0 for length in lengths)
    return Polygons(lengths[0], usable, fault)


def shorten_polygons(content: bytes) -> bytes:
    """Replace the numbers of polygons in a JSON text by the lengths of the polygons.

    Polygons with anything but plain numbers below a million are kept.
    """
    return _POLYGONS.sub(_shorten, content)


def _shorten(match: 're.Match[bytes]') -> bytes:
    text = match[1].translate(_ZEROS)
    if b'0' * 7 in text:  # large, or with many decimals
        return match[0]
    lengths = [
        part.count(b',', part.rfind(b'[')) + (b'0' in part)
        for part in text.split(b']')[:-2]
    ]
    return f'"{_LENGTHS}":{lengths}'.encode()


def read_mask(item: dict) -> Any:
    """Read the ``segmentation`` of an annotation: polygons, RLE, or nothing.

    Returns:
        Polygons | dict | None: RLE unchanged, compressed (a string) or not (a list of
        run lengths), and None if there is no mask.
    """
    if _LENGTHS in item:
        return _summarise(tuple(item[_LENGTHS]))
    mask = item.get('segmentation')
    if not isinstance(mask, list) or not mask:
        return mask or None
    if not all(isinstance(part, list) for part in mask):
        return Polygons(0, True, 'neither a list of polygons nor RLE')
    fault = None
    for part in mask:
        if not all(isinstance(value, (int, float)) for value in part):
            fault = 'a coordinate is no number'
        elif not all(abs(value) < FAR for value in part):  # also true of NaN
            fault = 'a coordinate is NaN, infinite or far off'
    return _summarise(tuple(map(len, mask)), fault)


def check_masks(dataset: 'CocoDataset', content: 'Content') -> Iterator[str]:
    """Find masks that would fail or be misread."""
    read = content.of_classes & (content.image >= 0)
    if not dataset.test_mode:  # in a test, the metric also reads what mmdet ignores
        read = (content.image >= 0) & ~content.ignore & (content.area > 0)
        read &= content.box[:, 2:].min(1) >= 1
    lost, short, faults, coded = [], [], [], []
    for row in np.flatnonzero(read).tolist():
        key, mask = content.ids[row], content.masks[row]
        if not mask:
            lost.append(key)
            continue
        if isinstance(mask, Polygons) and mask.first <= 4 and dataset.test_mode:
            short.append(key)
        if isinstance(mask, dict) and dataset.polygons_only and not content.crowd[row]:
            coded.append(key)
        fault = mask_fault(mask, content.images[content.image[row]])
        if fault:
            faults.append(f'annotation {key} ({fault})')
    if lost:
        yield (
            f'has {len(lost)} annotations without segmentation, and masks are used: '
            f'annotation {shorten(lost)}. Add polygons, remove them, or train a '
            'detector without a mask head.'
        )
    if short:
        yield (
            f'has {len(short)} annotations whose first polygon has fewer than three '
            f'points, at which the mask metric fails: annotation {shorten(short)}. '
            'Remove these polygons.'
        )
    if faults:
        yield (
            f'has {len(faults)} masks that are damaged or of another image: '
            f'{shorten(faults)}. Export them again, or remove the annotations.'
        )
    if coded:
        yield (
            f'has {len(coded)} objects whose mask is RLE, and the pipeline only takes '
            f'polygons, so they would be ignored: annotation {shorten(coded)}. '
            'Set poly2mask=True in LoadAnnotations of the training pipeline.'
        )


def mask_fault(mask: Any, image: dict) -> Optional[str]:
    """Describe briefly what is wrong with a result of :func:`read_mask`, or None."""
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
