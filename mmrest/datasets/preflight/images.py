"""The images that an annotation file lists: there, and decodable."""

import os
import os.path as osp
import warnings
from collections import Counter

import cv2
import mmcv
from PIL import Image, UnidentifiedImageError

from .coco import shown

# Decoding all of a large set takes minutes; the loader names a file that fails.
ALL_UP_TO = 500
SAMPLE = 100

EXIF_ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
WIDTH_TAG, HEIGHT_TAG = 0x0100, 0x0101
# What OpenCV, the loader, decodes whenever Pillow does.
SHARED = ('JPEG', 'MPO', 'PNG', 'BMP', 'PPM', 'WEBP')
# What Pillow calls an image that is no plain RGB, and what is loaded of it.
MODES = {
    '1': 'of black and white',
    'L': 'grey',
    'LA': 'grey with transparency, which is dropped',
    'RGBA': 'with transparency, which is dropped',
    'P': 'of a palette',
    'CMYK': 'CMYK, converted by OpenCV without a colour profile',
    'I': 'of more than 8 bits, of which the upper 8 are kept',
}


def check_images(dataset, images: list, decode=None):
    """Check that images exist, and that some of them can be decoded.

    Args:
        dataset (CocoDataset): From :func:`.datasets.find_coco_datasets`.
        images (list[dict]): The list of that name in the annotation file.
        decode (int | None): How many to decode, evenly spread. Defaults to None:
            all where there are at most 500, else 100.

    Returns:
        tuple[list[str], list[str]]: Findings, and one clause a kind of image that
        is converted when it is loaded, as ``'2 of 90 decoded images are grey'``.
    """
    folder = dataset.image_folder
    if not osp.isdir(folder):
        return [
            f'{dataset.where}: the image folder {osp.abspath(folder)} does not exist. '
            f'Put the images there, or set {dataset.where}.data_prefix.img.'
        ], []
    present, missing, empty = _split(folder, images)
    found = []
    if missing:
        names = shown(item['file_name'] for item in missing)
        found.append(
            f'{dataset.where}: {len(missing)} of {len(images)} images listed in '
            f'{dataset.ann_file} are not in {folder}: {names}. Fetch them, or remove '
            'them and their annotations from the file.'
        )
    if empty:
        names = shown(item['file_name'] for item in empty)
        found.append(
            f'{dataset.where}: {len(empty)} of {len(images)} images in {folder} are '
            f'empty files (0 bytes): {names}. Fetch them again, or remove them and '
            'their annotations from the file.'
        )
    if decode is None:
        decode = len(present) if len(present) <= ALL_UP_TO else SAMPLE
    sample = _spread(present, decode)
    bad, kinds = [], Counter()
    for path, item in sample:
        fault = _decode(path, item, dataset.turned, kinds)
        if fault:
            bad.append(fault)
    if bad:
        found.append(
            f'{dataset.where}: {len(bad)} of {len(sample)} decoded '
            f'images in {folder} are unusable: {"; ".join(bad[:5])}. Fetch them '
            'again, or remove them and their annotations from the file.'
        )
    return found, [
        f'{count} of {len(sample)} decoded images are {kind}'
        for kind, count in sorted(kinds.items())
    ]


def _split(folder, images):
    """Images that are there, as (path, item), that are not, and of no bytes."""
    listings, present, missing, empty = {}, [], [], []
    for item in images:
        path = osp.join(folder, item['file_name'])
        parent, name = osp.split(path)
        if parent not in listings:
            # One listing a folder: asking for every file is slow on network disks.
            listings[parent] = _sizes(parent)
        size = listings[parent].get(name)
        if size is None:
            missing.append(item)
        elif size == 0:
            empty.append(item)
        else:
            present.append((path, item))
    return present, missing, empty


def _sizes(folder):
    """The files of a folder and their sizes in bytes."""
    if not osp.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: _size(entry) for entry in entries}


def _size(entry):
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere
        return None


def _spread(items, count):
    if count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]


def _decode(path, item, turned, kinds):
    """What is wrong with an image file, or None; counts what kind it is."""
    name, stated = item['file_name'], (item['width'], item['height'])
    note = ''
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about metadata
            with Image.open(path) as image:
                size, kind = image.size, MODES.get(image.mode.partition(';')[0])
                form = image.format
                orientation = image.getexif().get(EXIF_ORIENTATION, 1)
                if form == 'TIFF':  # which Pillow turns by itself
                    size = image.tag_v2[WIDTH_TAG], image.tag_v2[HEIGHT_TAG]
                # A JPEG is read to its end at an eighth of the size, much faster.
                image.draft('RGB', (size[0] // 8, size[1] // 8))
                image.load()
    except UnidentifiedImageError:
        image = _opencv(path)
        if image is None:
            return f'{name} ({os.stat(path).st_size} bytes) is not an image'
        size, kind, orientation, form = image.shape[1::-1], None, 1, SHARED[0]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f'{name} cannot be decoded ({error})'
    if form not in SHARED and _opencv(path) is None:
        return f'{name} is a {form} image of a kind that OpenCV cannot decode'
    if orientation in TURNED and turned:
        # the version of OpenCV decides for which formats
        loaded = _opencv(path)
        turned = loaded is None or loaded.shape[1::-1] != size
    if orientation in TURNED and turned:
        size = size[::-1]
        note = ' when it is turned as its EXIF data say, which the loader does'
    elif orientation in TURNED:
        note = ' (the loader does not turn it as its EXIF data say)'
    if stated != size:
        return (
            f'{name} is {size[0]}x{size[1]} pixels{note}, but the annotation file says '
            f'{stated[0]}x{stated[1]}'
        )
    if kind:
        kinds[kind] += 1
    if orientation != 1:
        done = 'turned' if turned else 'not turned'
        kinds[f'{done} as their EXIF data say; boxes must be drawn accordingly'] += 1
    return None


def _opencv(path):
    """Formats that OpenCV alone can read."""
    try:
        return mmcv.imread(path)
    except cv2.error:  # an empty file
        return None
