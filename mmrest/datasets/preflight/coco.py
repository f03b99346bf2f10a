"""An annotation file in COCO format: readable, consistent, with the right classes."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from mmengine.registry import DATASETS

from ...utils.config_types import find_type
from ...utils.text import shorten
from ..coco_fields import fields_are_filled
from .images import applies_exif_orientation
from .masks import check_masks, read_mask, shorten_polygons
from .reading import bases, find_classes, find_datasets, find_steps, is_remote, join

FORMAT = (
    ' It must be an object with the lists images (id, file_name, width, height), '
    'annotations (id, image_id, category_id, bbox, area) and categories (id, name).'
)


@dataclass(frozen=True)
class CocoDataset:
    """A COCO-format dataset of a config."""

    where: str  # its place in the config, e.g. ``train_dataloader.dataset``
    ann_file: str  # path of the annotation file, ``data_root`` included
    data_root: str = ''  # as in the config
    image_folder: str = ''  # folder that the file names are relative to
    classes: tuple[str, ...] = ()  # class names that the run uses, in its order
    things: tuple[str, ...] = ()  # classes with boxes; fewer in a panoptic dataset
    test_mode: bool = True  # whether all images are used
    min_size: int = 0  # training ignores images with a smaller side
    filter_empty: bool = False  # whether it ignores images without annotations
    apply_exif_orientation: bool = True
    loads_files: bool = True  # whether mmcv loads the images
    needs_masks: bool = False  # whether the pipeline or the metric uses masks
    polygons_only: bool = False  # whether the pipeline ignores RLE
    panoptic: bool = False  # whether annotations are lists of segments
    labelled: bool = True  # whether annotations are used at all
    evaluated: bool = False  # whether COCO's evaluation reads the file


@dataclass
class Content:
    """The content of an annotation file, with N annotations as columns."""

    images: list[dict]  # as in the file
    categories: list[dict]  # as in the file
    sides: np.ndarray  # (I, 2) widths and heights of the images in pixels
    ids: list  # N ids
    category_ids: list  # N ids of categories
    image: np.ndarray  # (N,) index of the image in ``images``; -1 if there is none
    category: np.ndarray  # (N,) index of the category, likewise
    of_classes: np.ndarray  # (N,) bool, whether it is one of the dataset's classes
    box: np.ndarray  # (N, 4) x, y, width and height in pixels
    area: np.ndarray  # (N,) in square pixels; of the box if the file has none
    crowd: np.ndarray  # (N,) bool, ``iscrowd``
    ignore: np.ndarray  # (N,) bool
    masks: list  # N masks, see masks.read_mask
    missing_fields: dict[str, int]  # number of annotations without a required field


class FormatError(ValueError):
    """A file that is not in COCO format."""


def find_coco_datasets(cfg: Any, split: str) -> list[CocoDataset]:
    """List the datasets of a split whose files are local and in COCO format."""
    return [
        _describe(where, leaf)
        for where, leaf in find_datasets(cfg, split)
        if leaf.get('ann_file') and not is_remote(leaf) and _reads_coco(leaf)
    ]


def _reads_coco(leaf: dict) -> bool:
    """Whether a dataset class reads its file like mmdet, for instances or panoptic."""
    kinds = bases(leaf, DATASETS)
    coco: Any = kinds.get('CocoDataset')
    panoptic: Any = kinds.get('CocoPanopticDataset', coco)
    kind: Any = find_type(leaf, DATASETS)
    return (
        coco is not None
        and kind.load_data_list is coco.load_data_list
        and kind.parse_data_info is panoptic.parse_data_info
    )


def _describe(where: str, leaf: dict) -> CocoDataset:
    filters = leaf.get('filter_cfg') or {}
    folder = (leaf.get('data_prefix') or {}).get('img')
    steps = find_steps(leaf, 'LoadAnnotations')
    masks = [step for step in steps if step.get('with_mask')]
    panoptic = 'CocoPanopticDataset' in bases(leaf, DATASETS)
    classes = find_classes(leaf)
    return CocoDataset(
        where=where,
        ann_file=join(leaf.get('data_root'), leaf['ann_file']),
        data_root=leaf.get('data_root') or '',
        image_folder=join(leaf.get('data_root'), folder),
        classes=classes,
        things=find_classes(leaf, 'thing_classes') if panoptic else classes,
        test_mode=leaf.get('test_mode', False),
        min_size=filters.get('min_size', 0),
        filter_empty=filters.get('filter_empty_gt', False),
        apply_exif_orientation=applies_exif_orientation(leaf),
        loads_files=bool(find_steps(leaf, 'LoadImageFromFile')),
        needs_masks=bool(masks) and not panoptic,
        polygons_only=any(not step.get('poly2mask', True) for step in masks),
        panoptic=panoptic,
        labelled=not find_steps(leaf, 'LoadEmptyAnnotations'),
    )


def check_annotations(
    dataset: CocoDataset, unused_categories: bool = False
) -> tuple[Optional[Content], list[str]]:
    """Find problems that make a dataset fail or lose annotations.

    ``unused_categories`` allows annotations with categories that are not classes of the
    dataset. Returns the content, or None if the file cannot be used at all, and
    findings.
    """
    path = dataset.ann_file
    try:
        with open(path, 'rb') as file:
            text = shorten_polygons(file.read()).decode()
        content = _parse(json.loads(text), dataset)
    except FormatError as error:
        return None, [
            f'{dataset.where}: the annotation file {path} is not in COCO format: '
            f'{error}'
        ]
    except (ValueError, RecursionError, OverflowError) as error:  # UTF-8 errors too
        return None, [
            f'{dataset.where}: the annotation file {path} is not valid JSON ({error}). '
            'It may be damaged, cut off, or another kind of file; fetch it again.'
        ]
    found = [
        *_check_ids(dataset, content),
        *_check_classes(dataset, content, unused_categories),
        *_check_use(dataset, content),
        *(check_masks(dataset, content) if dataset.needs_masks else ()),
    ]
    return content, [f'{dataset.where}: {path} {text}' for text in found]


def _parse(content: Any, dataset: CocoDataset) -> Content:
    """Convert a JSON object to columns, or raise a ``FormatError``."""
    if not isinstance(content, dict):
        raise FormatError(f'it holds a {type(content).__name__}.{FORMAT}')
    images = _objects(content, 'images', ('id', 'file_name', 'width', 'height'))
    categories = _objects(content, 'categories', ('id', 'name'))
    items: list[dict] = []
    if 'annotations' in content or (dataset.labelled and not dataset.test_mode):
        if dataset.panoptic:
            content = dict(annotations=list(_segments(content)))
        fields = ('id', 'image_id', 'category_id', 'bbox')
        items = _objects(content, 'annotations', fields)

    sides = [[item['width'], item['height']] for item in images]
    sizes = _numbers(sides, 2)
    for item, (width, height), sound in zip(images, sides, (sizes > 0).all(1)):
        if not isinstance(item['file_name'], str):
            raise FormatError(f'image {item["id"]} is named {item["file_name"]!r}.')
        if not sound:
            raise FormatError(f'image {item["id"]} is {width!r}x{height!r} pixels.')
    ids = [item['id'] for item in items]
    boxes = [item['bbox'] for item in items]
    areas = [item.get('area', 0) for item in items]
    crowds = [item.get('iscrowd', 0) for item in items]
    box, area = _numbers(boxes, 4), _numbers([[value] for value in areas], 1)[:, 0]
    for name, values, sound, meaning in (
        ('bbox', boxes, ~np.isnan(box).any(1), '[x, y, width, height] in pixels'),
        ('area', areas, ~np.isnan(area), 'a number of pixels'),
        ('iscrowd', crowds, [value in (0, 1) for value in crowds], '0 or 1'),
    ):
        for row in np.flatnonzero(~np.array(sound, bool)):
            raise FormatError(
                f'the {name} of annotation {ids[row]} is {values[row]!r}, not '
                f'{meaning}.'
            )
    category_ids = [item['category_id'] for item in items]
    category = _places(category_ids, categories)
    known = [item['name'] in dataset.classes for item in categories]
    needed = [] if dataset.panoptic else ['area']  # by mmdet's loader
    needed += ['iscrowd'] if dataset.evaluated else []
    missing = {name: sum(name not in item for item in items) for name in needed}
    without_area = np.array(['area' not in item for item in items], bool)
    return Content(
        images=images,
        categories=categories,
        sides=sizes,
        ids=ids,
        category_ids=category_ids,
        image=_places([item['image_id'] for item in items], images),
        category=category,
        of_classes=np.array([*known, False])[category],  # -1 finds the last
        box=box,
        area=np.where(without_area, box[:, 2] * box[:, 3], area),
        crowd=np.array(crowds, bool),
        ignore=np.array([bool(item.get('ignore')) for item in items], bool),
        masks=[read_mask(item) for item in items],
        missing_fields={name: count for name, count in missing.items() if count},
    )


def _segments(content: dict) -> Iterator[dict]:
    """Yield the segments of a panoptic file as annotations of their images."""
    fields = ('image_id', 'file_name', 'segments_info')
    for index, item in enumerate(_objects(content, 'annotations', fields)):
        segments = item['segments_info']
        if not isinstance(segments, list) or not all(
            isinstance(segment, dict) for segment in segments
        ):
            raise FormatError(
                f'segments_info of annotations[{index}] is no list of objects.'
            )
        for segment in segments:
            yield {**segment, 'image_id': item['image_id']}


def _objects(content: dict, part: str, fields: tuple[str, ...]) -> list[dict]:
    """Return a list of objects, after checking that they have certain fields."""
    items, wanted = content.get(part), set(fields)
    if not isinstance(items, list):
        raise FormatError(f'it has no list "{part}".{FORMAT}')
    keys = [field for field in fields if field == 'name' or field.endswith('id')]
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise FormatError(f'{part}[{index}] is not an object.{FORMAT}')
        if not wanted <= item.keys():
            missing = ', '.join(field for field in fields if field not in item)
            raise FormatError(f'{part}[{index}] has no {missing}.{FORMAT}')
        for key in keys:
            if not isinstance(item[key], (int, str, float)):
                raise FormatError(
                    f'the {key} of {part}[{index}] is {item[key]!r}, neither a number '
                    'nor text.'
                )
    return items


def _numbers(rows: list, length: int) -> np.ndarray:
    """Make an array (N, length), with NaN for rows that are not finite numbers."""
    nothing, numbers = [math.nan] * length, {int, float, bool}
    sound = (
        type(row) is list and len(row) == length and numbers.issuperset(map(type, row))
        for row in rows
    )
    plain = [row if fits else nothing for row, fits in zip(rows, sound)]
    values = np.array(plain, float).reshape(-1, length)
    return np.where(np.isfinite(values).all(1, keepdims=True), values, math.nan)


def _places(keys: list, items: list[dict]) -> np.ndarray:
    """Return the indices of items by their ids; -1 for an unknown id."""
    places = {item['id']: row for row, item in enumerate(items)}
    return np.array([places.get(key, -1) for key in keys], int)


def _check_ids(dataset: CocoDataset, content: Content) -> Iterator[str]:
    parts = dict(
        images=[item['id'] for item in content.images],
        categories=[item['id'] for item in content.categories],
        # ids of segments are colours
        annotations=[] if dataset.panoptic else content.ids,
    )
    for part, ids in parts.items():
        twice = [key for key, count in Counter(ids).items() if count > 1]
        if twice:
            yield (
                f'uses an id of {part} more than once: {shorten(twice)}. Renumber them.'
            )
    rows = np.flatnonzero(content.image < 0)
    if len(rows):
        yield (
            f'has {len(rows)} annotations of images that it does not list: annotation '
            f'{shorten(content.ids[row] for row in rows)}. Remove them or add their '
            'images.'
        )
    rows = np.flatnonzero(content.category < 0)
    if len(rows):
        keys = sorted({str(content.category_ids[row]) for row in rows})
        yield (
            f'has {len(rows)} annotations of categories that it does not list: '
            f'category_id {shorten(keys)} in annotation '
            f'{shorten(content.ids[row] for row in rows)}. Remove them or add the '
            'categories.'
        )
    if not fields_are_filled():
        for field, count in content.missing_fields.items():
            yield (
                f'has {count} annotations without {field}, which is needed. Add it, or '
                'call mmrest.datasets.fill_coco_fields() before the run, as '
                'tools/train.py does.'
            )


def _check_classes(
    dataset: CocoDataset, content: Content, unused_categories: bool
) -> Iterator[str]:
    """Report the first problem with the names of the categories."""
    names = [item['name'] for item in content.categories]
    if not dataset.classes:  # the dataset class reads them from elsewhere
        return
    field = f'{dataset.where}.metainfo.classes'
    advice = (
        f'Set {field}={tuple(names[:80])} and num_classes={len(names)} of the '
        'heads, or correct the file.'
    )
    twice = [name for name, count in Counter(names).items() if count > 1]
    unknown = [name for name in dataset.classes if name not in names]
    others = ~content.of_classes & (content.category >= 0)
    order = tuple(name for name in names if name in dataset.classes)
    if twice:
        yield f'names categories twice: {shorten(twice)}. Names must be unique.'
    elif unknown:
        yield (
            f'has the categories {shorten(names)} ({len(names)}), but the config has '
            f'{len(dataset.classes)} classes, of which {len(unknown)} are not in the '
            f'file: {shorten(unknown)}. {advice}'
        )
    elif others.any() and not unused_categories:
        unused = [names[row] for row in np.unique(content.category[others])]
        yield (
            f'has {others.sum()} annotations of categories that are not among the '
            f'{len(dataset.classes)} classes of the config: {shorten(unused)}. '
            f'{advice} To leave them out on purpose: --cfg-options '
            'preflight.unused_categories=True.'
        )
    elif order != dataset.classes:
        yield (
            'lists the categories in another order than the config, and labels follow '
            f'the file, so classes would be called by wrong names. Set {field}='
            f'{order}.'
        )


def _check_use(dataset: CocoDataset, content: Content) -> Iterator[str]:
    if not content.images:
        yield 'lists no images. Give a file with images.'
    elif dataset.labelled and not dataset.test_mode:
        use = content.of_classes | (not dataset.classes)
        use &= content.image >= 0
        sides = content.sides.min(1)[content.image[use]]
        if not (sides >= dataset.min_size).any():
            limit = (
                f' and sides of {dataset.min_size} pixels' if dataset.min_size else ''
            )
            yield (
                f'lists {len(content.images)} images, none of which can be trained on: '
                f'an image needs at least one annotation of the classes{limit}.'
            )
