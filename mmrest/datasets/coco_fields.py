"""Fields of COCO annotations that some tools omit."""

import functools
from typing import Any, Optional


def fill_coco_fields() -> None:
    """Let ``pycocotools`` fill in missing fields whenever it reads a file.

    Without ``iscrowd``, COCO's evaluation ends with a ``KeyError`` at the first
    validation. Without ``area``, mmdet's dataset does at the start. Files are not
    changed. The tools of this repository call this function; in other programs, call
    it before the Runner is built. It changes ``pycocotools.coco.COCO`` for the whole
    process, unlike ``import mmrest``. Without pycocotools, it does nothing.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError:
        return
    if fields_are_filled():
        return
    create_index = COCO.createIndex

    @functools.wraps(create_index)
    def fill_and_index(coco: Any) -> None:
        fill_fields(coco.dataset)
        create_index(coco)

    fill_and_index.fills_fields = True  # type: ignore[attr-defined]
    COCO.createIndex = fill_and_index


def fields_are_filled() -> bool:
    """Whether :func:`fill_coco_fields` was called in this process."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        return False
    return getattr(COCO.createIndex, 'fills_fields', False)


def fill_fields(content: dict) -> None:
    """Fill in missing fields in the content of an annotation file.

    - ``info``: empty.
    - ``iscrowd``: 0.
    - ``area``: that of the mask, or else of the box, in square pixels.
    - ``id`` of annotations: numbers from 1, if they are not all positive integers.
      The evaluation treats a match with annotation 0 as none, and fails with strings.

    Args:
        content (dict): Changed in place.
    """
    content.setdefault('info', {})
    items = content.get('annotations', ())
    for item in items:
        item.setdefault('iscrowd', 0)
        if 'area' not in item and ('bbox' in item or item.get('segmentation')):
            item['area'] = _area(item)
    if not all(isinstance(item['id'], int) and item['id'] > 0 for item in items):
        for number, item in enumerate(items, 1):
            item['id'] = number


def _area(item: dict) -> float:
    mask = item.get('segmentation')
    area = 0.0
    if isinstance(mask, dict):
        counts = mask.get('counts')
        counts = run_lengths(counts) if isinstance(counts, str) else counts
        area = float(sum((counts or ())[1::2]))
    elif mask:
        area = sum(map(_polygon_area, mask))
    if not area and 'bbox' in item:
        area = float(item['bbox'][2] * item['bbox'][3])
    return area


def _polygon_area(points: list[float]) -> float:
    """The shoelace formula."""
    x, y = points[0::2], points[1::2]
    following = zip(x, y, x[1:] + x[:1], y[1:] + y[:1])
    return abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in following)) / 2


def run_lengths(text: str) -> Optional[list[int]]:
    """Decode the run lengths in COCO's compressed form; None if they are invalid.

    Each character holds five bits, the lowest first, and a sixth one that says whether
    another character follows. From the fourth one on, a length is stored as the
    difference from the last but one.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return None if shift else lengths
