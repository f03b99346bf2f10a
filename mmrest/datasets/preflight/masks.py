"""Masks of annotation files: there, of the image's size, and readable.

``pycocotools`` checks little: from run lengths that end too early it returns memory
that nobody wrote, and at a coordinate that is not a number it never returns.
"""

from .coco import shown

# In pixels; the time to fill a polygon grows with the length of its outline.
FAR = 1_000_000


def check_masks(dataset, content) -> list:
    """Look for masks that fail, or that mean something else than they say.

    Args:
        dataset (CocoDataset): One whose pipeline loads masks.
        content (dict): Its annotation file, of the right format.

    Returns:
        list[str]: Findings.
    """
    images = {item['id']: item for item in content['images']}
    annotations = content.get('annotations', ())
    if dataset.test_mode:
        # The metric reads the mask of every annotation, also of those that mmdet's
        # loader leaves out.
        classes = {
            item['id']
            for item in content['categories']
            if item['name'] in dataset.classes
        }
        real = [
            item
            for item in annotations
            if item['image_id'] in images and item['category_id'] in classes
        ]
    else:
        real = [item for item in annotations if _is_loaded(item, images)]
    return [
        *_check_presence(dataset, real),
        *_check_faults(real, images),
        *_check_polygons_only(dataset, real),
    ]


def _is_loaded(item, images) -> bool:
    # What mmdet leaves out anyway needs no mask.
    return (
        item['image_id'] in images
        and not item.get('ignore')
        and item['area'] > 0
        and min(item['bbox'][2:]) >= 1
    )


def _check_presence(dataset, real):
    lost = [item['id'] for item in real if not item.get('segmentation')]
    if lost:
        yield (
            f'has {len(lost)} annotations without segmentation, and the pipeline loads '
            f'masks: annotation {shown(lost)}. Add polygons, remove them, or train a '
            'detector without a mask head.'
        )
    if dataset.test_mode:
        short = [item['id'] for item in real if _fails_in_the_metric(item)]
        if short:
            yield (
                f'has {len(short)} annotations whose first polygon has fewer than '
                f'three points, at which the mask metric fails: annotation '
                f'{shown(short)}. Remove these polygons.'
            )


def _fails_in_the_metric(item) -> bool:
    mask = item.get('segmentation')
    return isinstance(mask, list) and bool(mask) and _points(mask[0]) <= 4


def _points(part) -> int:
    return len(part) if isinstance(part, list) else 0


def _check_faults(real, images):
    faults = [
        f'annotation {item["id"]} ({fault})'
        for item in real
        if (fault := mask_fault(item.get('segmentation'), images[item['image_id']]))
    ]
    if faults:
        yield (
            f'has {len(faults)} masks that are damaged or of another image: '
            f'{shown(faults)}. Export them again, or remove the annotations.'
        )


def _check_polygons_only(dataset, real):
    if not dataset.polygons_only:
        return
    coded = [
        item['id']
        for item in real
        if isinstance(item.get('segmentation'), dict) and not item.get('iscrowd')
    ]
    if coded:
        yield (
            f'has {len(coded)} objects whose mask is RLE, and the pipeline takes '
            f'polygons alone, so they would be ignored: annotation {shown(coded)}. '
            'Set poly2mask=True in LoadAnnotations of the training pipeline.'
        )


def mask_fault(mask, image):
    """What is wrong with a mask, or None.

    Args:
        mask (list | dict | None): The ``segmentation`` of an annotation: polygons
            or RLE, compressed (text) or not (a list of run lengths).
        image (dict): With its ``width`` and ``height`` in pixels.

    Returns:
        str | None: A few words.
    """
    if not mask:
        return None
    if isinstance(mask, dict):
        return _rle_fault(mask, image['height'], image['width'])
    if not isinstance(mask, list) or not all(isinstance(part, list) for part in mask):
        return 'neither a list of polygons nor RLE'
    for part in mask:
        if not all(isinstance(value, (int, float)) for value in part):
            return 'a coordinate is no number'
        # also true of NaN
        if part and not all(abs(value) < FAR for value in part):
            return 'a coordinate is NaN, infinite or far off'
    return None


def _rle_fault(mask, height, width):
    size, counts = mask.get('size'), mask.get('counts')
    if size != [height, width]:
        return f'RLE of size {size} for an image of [{height}, {width}]'
    if isinstance(counts, str):
        counts = _run_lengths(counts)
    if not isinstance(counts, list) or not all(
        isinstance(count, int) and count >= 0 for count in counts
    ):
        return 'run lengths that cannot be read'
    if sum(counts) != height * width:
        return f'run lengths for {sum(counts)} of {height * width} pixels'
    return None


def _run_lengths(text):
    """The run lengths of COCO's compressed form, or None.

    Five bits a character, from the lowest, and a sixth that says whether another
    follows; from the fourth on a length is the difference to the last but one.
    """
    lengths, value, shift = [], 0, 0
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
