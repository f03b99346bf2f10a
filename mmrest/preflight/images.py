"""The images that an annotation file lists: there, and decodable."""

import os
import os.path as osp
import warnings

import cv2
import mmcv
from PIL import Image, UnidentifiedImageError

from .coco import shown

# Decoding all of a large set takes minutes; the loader names a file that fails.
ALL_UP_TO = 500
SAMPLE = 100


def check_images(dataset, images: list, decode=None) -> list:
    """Check that images exist, and that some of them can be decoded.

    Args:
        dataset (CocoDataset): From :func:`.datasets.find_coco_datasets`.
        images (list[dict]): The list of that name in the annotation file.
        decode (int | None): How many to decode, evenly spread. Defaults to None:
            all where there are at most 500, else 100.

    Returns:
        list[str]: Findings.
    """
    folder = dataset.image_folder
    if not osp.isdir(folder):
        return [
            f'{dataset.where}: the image folder {osp.abspath(folder)} does not exist. '
            f'Put the images there, or set {dataset.where}.data_prefix.img.'
        ]
    present, missing = _split(folder, images)
    found = []
    if missing:
        names = shown(item['file_name'] for item in missing)
        found.append(
            f'{dataset.where}: {len(missing)} of {len(images)} images listed in '
            f'{dataset.ann_file} are not in {folder}: {names}. Fetch them, or remove '
            'them and their annotations from the file.'
        )
    if decode is None:
        decode = len(present) if len(present) <= ALL_UP_TO else SAMPLE
    bad = [text for text in map(_decode, _spread(present, decode)) if text]
    if bad:
        found.append(
            f'{dataset.where}: {len(bad)} of {min(decode, len(present))} decoded '
            f'images in {folder} are unusable: {"; ".join(bad[:5])}. Fetch them '
            'again, or remove them and their annotations from the file.'
        )
    return found


def _split(folder, images):
    """Images that are there, as (path, item), and those that are not."""
    listings, present, missing = {}, [], []
    for item in images:
        path = osp.join(folder, item['file_name'])
        parent, name = osp.split(path)
        if parent not in listings:
            # One listing a folder: asking for every file is slow on network disks.
            listings[parent] = set(os.listdir(parent)) if osp.isdir(parent) else set()
        if name in listings[parent]:
            present.append((path, item))
        else:
            missing.append(item)
    return present, missing


def _spread(items, count):
    if count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]


def _decode(entry):
    """What is wrong with an image file, or None."""
    path, item = entry
    name, stated = item['file_name'], (item['width'], item['height'])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about metadata
            with Image.open(path) as image:
                size = image.size
                # A JPEG is read to its end at an eighth of the size, much faster.
                image.draft('RGB', (size[0] // 8, size[1] // 8))
                image.load()
    except UnidentifiedImageError:
        image = _opencv(path)
        if image is None:
            return f'{name} ({os.stat(path).st_size} bytes) is not an image'
        size = image.shape[1::-1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f'{name} cannot be decoded ({error})'
    # EXIF may turn the picture by 90 degrees.
    if stated not in (size, size[::-1]):
        return (
            f'{name} is {size[0]}x{size[1]} pixels, but the annotation file says '
            f'{stated[0]}x{stated[1]}'
        )
    return None


def _opencv(path):
    """Formats that OpenCV alone can read."""
    try:
        return mmcv.imread(path)
    except cv2.error:  # an empty file
        return None
