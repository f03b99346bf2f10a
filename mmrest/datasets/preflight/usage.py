"""What a run will do with each annotation and image: used, skipped or left out.

MMDetection's ``CocoDataset`` leaves out silently what it cannot use. The rules here
are its own, in its order, so that the numbers can be said before the run.
"""

from collections import Counter, defaultdict

# Boxes of COCO itself reach past the border by rounding.
BEYOND = 1.0

SKIPPED = dict(
    ignore='{} annotations are marked "ignore"',
    size='{} boxes have no width or height, or a negative one',
    outside='{} boxes lie outside of their image',
    area='{} annotations have an area of 0 or less',
    thin='{} boxes are narrower or lower than a pixel',
)
IN_TRAINING = dict(
    category='{} annotations are of categories that are no class, and are skipped',
    points='{} objects have no polygon of three points or more, and are ignored',
    crowd='{} crowd regions are no objects to learn',
    beyond='{} boxes reach beyond their image and are cut at its border',
)
IMAGES = dict(
    empty='{} images have no annotation of the classes and are left out',
    background='{} images have no annotation of the classes and are trained on as '
    'background',
    small='{} images have a side of less than {min_size} pixels and are left out',
    crowd='{} images have crowd regions alone and are trained on as background',
    lost='{} images have annotations that are all skipped or ignored, and are '
    'trained on as background',
)


def describe_use(dataset, content) -> list:
    """Count what is not used as it stands, by reason.

    Args:
        dataset (CocoDataset): From :func:`.datasets.find_coco_datasets`.
        content (dict): Its annotation file, checked.

    Returns:
        list[str]: One clause a reason, as ``'2 boxes lie outside of their image'``.
    """
    images = {item['id']: item for item in content['images']}
    classes = {
        item['id'] for item in content['categories'] if item['name'] in dataset.classes
    }
    reasons, uses = Counter(), defaultdict(Counter)
    for item in content.get('annotations', ()):
        image = images.get(item['image_id'])
        if image is None:
            continue
        use = _use(dataset, item, image, classes)
        reasons[use] += 1
        if use in ('object', 'crowd') and _reaches_beyond(item['bbox'], image):
            reasons['beyond'] += 1
        if item['category_id'] in classes:
            uses[item['image_id']][use] += 1
    clauses = [
        text.format(reasons[key]) + ' and are skipped'
        for key, text in SKIPPED.items()
        if reasons[key]
    ]
    if dataset.test_mode:
        if clauses:
            clauses.append('the metric counts all these, as objects to be found')
        return clauses
    clauses += [
        text.format(reasons[k]) for k, text in IN_TRAINING.items() if reasons[k]
    ]
    counts = Counter(_use_of_image(dataset, images[key], uses[key]) for key in images)
    return clauses + [
        text.format(counts[key], min_size=dataset.min_size)
        for key, text in IMAGES.items()
        if counts[key]
    ]


def _use(dataset, item, image, classes) -> str:
    """``object``, ``crowd``, or why an annotation is not used."""
    x, y, width, height = item['bbox']
    if item.get('ignore'):
        return 'ignore'
    if width <= 0 or height <= 0:
        return 'size'
    inside_x = min(x + width, image['width']) - max(x, 0)
    inside_y = min(y + height, image['height']) - max(y, 0)
    if inside_x <= 0 or inside_y <= 0:
        return 'outside'
    if item['area'] <= 0:
        return 'area'
    if width < 1 or height < 1:
        return 'thin'
    if item['category_id'] not in classes:
        return 'category'
    if item.get('iscrowd'):
        return 'crowd'
    if dataset.needs_masks and not has_polygon(item.get('segmentation')):
        return 'points'
    return 'object'


def has_polygon(segmentation) -> bool:
    """Whether a mask is RLE, or has a polygon of three points or more."""
    if not isinstance(segmentation, list):
        return True
    return any(len(part) >= 6 and len(part) % 2 == 0 for part in segmentation)


def _reaches_beyond(box, image) -> bool:
    x, y, width, height = box
    return (
        min(x, y) < -BEYOND
        or x + width > image['width'] + BEYOND
        or y + height > image['height'] + BEYOND
    )


def _use_of_image(dataset, image, uses) -> str:
    if not uses and dataset.filter_empty:
        return 'empty'
    if min(image['width'], image['height']) < dataset.min_size:
        return 'small'
    if not uses:
        return 'background'
    if uses['object']:
        return 'objects'
    return 'crowd' if set(uses) == {'crowd'} else 'lost'
