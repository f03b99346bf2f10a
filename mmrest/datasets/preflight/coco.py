"""An annotation file: readable, in COCO format, consistent, with the right classes."""

import json
import math
import os.path as osp
from collections import Counter

IMAGE_FIELDS = ('id', 'file_name', 'width', 'height')
ANNOTATION_FIELDS = ('id', 'image_id', 'category_id', 'bbox', 'area')
CATEGORY_FIELDS = ('id', 'name')
SHOWN = 5


def check_annotations(dataset, unused_categories: bool = False):
    """Look for what makes a dataset fail or lose annotations.

    Args:
        dataset (CocoDataset): From :func:`.datasets.find_coco_datasets`.
        unused_categories (bool): Whether categories other than the dataset's
            classes may have annotations. Defaults to False.

    Returns:
        tuple[dict | None, list[str]]: The file's content, or None if it cannot be
        used at all, and the findings.
    """
    content, finding = _read(dataset)
    if finding is None:
        finding = _check_format(dataset, content)
    if finding is not None:
        return None, [f'{dataset.where}: {finding}']
    found = [
        *_check_ids(content),
        *_check_classes(dataset, content, unused_categories),
        *_check_use(dataset, content),
    ]
    place = f'{dataset.where}: {dataset.ann_file}'
    return content, [f'{place} {text}' for text in found]


def shown(items) -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    text = ', '.join(str(item) for item in items[:SHOWN])
    more = len(items) - SHOWN
    return f'{text} and {more} more' if more > 0 else text


def _read(dataset):
    path = dataset.ann_file
    if not osp.isfile(path):
        place = f'{osp.abspath(path)} does not exist'
        if dataset.data_root and not osp.isdir(dataset.data_root):
            place += f', nor does its data_root {dataset.data_root}'
        elif osp.isdir(path):
            place = f'{osp.abspath(path)} is a folder'
        return None, (
            f'the annotation file {place}. Put the data there, or set '
            f'{dataset.where}.data_root, .ann_file and .data_prefix.img (relative '
            'paths start at the current folder).'
        )
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file), None
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors alike
        return None, (
            f'the annotation file {path} is not valid JSON ({error}). It may be '
            'damaged, cut off, or another kind of file; fetch it again.'
        )


def _check_format(dataset, content):
    start = f'the annotation file {dataset.ann_file} is not in COCO format: '
    end = (
        ' It must be an object with the lists images (id, file_name, width, height), '
        'annotations (id, image_id, category_id, bbox, area) and categories (id, name).'
    )
    if not isinstance(content, dict):
        return f'{start}it holds a {type(content).__name__}.{end}'
    parts = dict(images=IMAGE_FIELDS, categories=CATEGORY_FIELDS)
    if 'annotations' in content or not dataset.test_mode:
        parts['annotations'] = ANNOTATION_FIELDS
    for part, fields in parts.items():
        if not isinstance(content.get(part), list):
            return f'{start}it has no list "{part}".{end}'
        for index, item in enumerate(content[part]):
            if not isinstance(item, dict):
                return f'{start}{part}[{index}] is not an object.{end}'
            missing = [field for field in fields if field not in item]
            if missing:
                return f'{start}{part}[{index}] has no {", ".join(missing)}.{end}'
    for item in content.get('annotations', ()):
        if not _is_box(item['bbox']):
            return (
                f'{start}the bbox of annotation {item["id"]} is {item["bbox"]!r}, '
                'not [x, y, width, height] in pixels.'
            )
        if not _is_number(item['area']):
            return (
                f'{start}the area of annotation {item["id"]} is {item["area"]!r}, not '
                'a number of pixels.'
            )
    for item in content['images']:
        sides = item['width'], item['height']
        if not all(_is_number(side) and side > 0 for side in sides):
            return f'{start}image {item["id"]} is {sides[0]!r}x{sides[1]!r} pixels.'
        if not isinstance(item['file_name'], str):
            return f'{start}image {item["id"]} is named {item["file_name"]!r}.'
    return None


def _is_box(box):
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value):
    # JSON as Python reads and writes it knows NaN and Infinity.
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_ids(content):
    images = {item['id'] for item in content['images']}
    categories = {item['id'] for item in content['categories']}
    annotations = content.get('annotations', ())
    for part in ('images', 'annotations', 'categories'):
        counts = Counter(item['id'] for item in content.get(part, ()))
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            yield f'uses an id of {part} more than once: {shown(twice)}. Renumber them.'
    lost = [item['id'] for item in annotations if item['image_id'] not in images]
    if lost:
        yield (
            f'has {len(lost)} annotations of images that it does not list: annotation '
            f'{shown(lost)}. Remove them or add their images.'
        )
    lost = [item for item in annotations if item['category_id'] not in categories]
    if lost:
        names = sorted({str(item['category_id']) for item in lost})
        yield (
            f'has {len(lost)} annotations of categories that it does not list: '
            f'category_id {shown(names)} in annotation '
            f'{shown(item["id"] for item in lost)}. Remove them or add the categories.'
        )


def _check_classes(dataset, content, unused_categories):
    names = [item['name'] for item in content['categories']]
    field = f'{dataset.where}.metainfo.classes'
    advice = (
        f'Set {field}=({", ".join(map(repr, names[:80]))}) and num_classes='
        f'{len(names)} of the heads, or correct the file.'
    )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        yield f'names categories more than once: {shown(twice)}. Names must be unique.'
        return
    unknown = [name for name in dataset.classes if name not in names]
    if unknown:
        yield (
            f'has the categories {shown(names)} ({len(names)}), but the config has '
            f'{len(dataset.classes)} classes, of which {len(unknown)} are not in the '
            f'file: {shown(unknown)}. {advice}'
        )
        return
    ids = {item['id']: item['name'] for item in content['categories']}
    used = Counter(
        ids.get(item['category_id']) for item in content.get('annotations', ())
    )
    unused = [name for name in names if used[name] and name not in dataset.classes]
    if unused and not unused_categories:
        yield (
            f'has {sum(used[name] for name in unused)} annotations of categories that '
            f'are not among the {len(dataset.classes)} classes of the config: '
            f'{shown(unused)}. {advice} To leave them out on purpose: --cfg-options '
            'preflight.unused_categories=True.'
        )
        return
    order = tuple(name for name in names if name in dataset.classes)
    if order != dataset.classes:
        yield (
            'lists the categories in another order than the config, and labels follow '
            f'the file, so classes would be called by wrong names. Set {field}='
            f'({", ".join(map(repr, order))}).'
        )


def _check_use(dataset, content):
    if not content['images']:
        yield 'lists no images. Give a file with images.'
    elif not dataset.test_mode and not _trainable_images(dataset, content):
        sides = f' and sides of {dataset.min_size} pixels' if dataset.min_size else ''
        yield (
            f'lists {len(content["images"])} images, none of which can be trained on: '
            f'an image needs at least one annotation of the classes{sides}.'
        )


def _trainable_images(dataset, content):
    categories = {
        item['id'] for item in content['categories'] if item['name'] in dataset.classes
    }
    large = {
        item['id']
        for item in content['images']
        if min(item['width'], item['height']) >= dataset.min_size
    }
    return large & {
        item['image_id']
        for item in content['annotations']
        if item['category_id'] in categories
    }


def check_evaluator(evaluator, split: str, datasets) -> list:
    """Check that the evaluator judges by the annotations of the images it is given.

    Args:
        evaluator (dict | list[dict] | None): As in the config.
        split (str): ``val`` or ``test``.
        datasets (list[CocoDataset]): The split's datasets.

    Returns:
        list[str]: Findings.
    """
    found = []
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        path = (metric or {}).get('ann_file')
        if not path or metric.get('backend_args') or '://' in path:
            continue
        where = f'{split}_evaluator.ann_file'
        read = [dataset.ann_file for dataset in datasets]
        if not osp.isfile(path):
            # An absent dataset file of the same name is reported already.
            if osp.abspath(path) not in map(osp.abspath, read):
                found.append(
                    f'{where}: {osp.abspath(path)} does not exist. Set it to the '
                    f'annotation file of the {split} dataset: {shown(read) or "none"}.'
                )
        elif read and not any(
            osp.isfile(other) and osp.samefile(path, other) for other in read
        ):
            found.append(
                f'{where}: it judges by {path}, but the {split} dataset is '
                f'{shown(read)}. Set both to the same file.'
            )
    return found
