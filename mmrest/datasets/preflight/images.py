"""Check images of an annotation file: present and decodable."""

import os
import os.path as osp
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import cv2
import mmcv
from PIL import Image, UnidentifiedImageError

from ...utils.text import shorten
from .reading import find_steps

if TYPE_CHECKING:
    from .coco import CocoDataset

# Decoding all images of a large set would take minutes
ALL_UP_TO = 500
SAMPLE = 100

EXIF_ORIENTATION, SWAPS_SIDES = 0x0112, (5, 6, 7, 8)
WIDTH_TAG, HEIGHT_TAG = 0x0100, 0x0101
# Formats that OpenCV, the loader, can decode whenever Pillow can
SHARED = ('JPEG', 'MPO', 'PNG', 'BMP', 'PPM', 'WEBP')
# Pillow's modes other than plain RGB, and how such images are loaded
MODES = {
    '1': 'of black and white',
    'L': 'grey',
    'LA': 'grey with transparency, which is dropped',
    'RGBA': 'with transparency, which is dropped',
    'P': 'of a palette',
    'CMYK': 'CMYK, converted by OpenCV without a colour profile',
    'I': 'of more than 8 bits, of which the upper 8 are kept',
}
DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageError(ValueError):
    """An image that cannot be used; the message continues its name."""


class ImageFacts(NamedTuple):
    """Facts about a valid image file when it is loaded."""

    size: tuple[int, int]  # width and height in pixels, as loaded
    kind: Optional[str]  # the kind of image, if not plain RGB
    note: str = ''  # how its EXIF orientation affects the size
    # whether the loader applies its EXIF orientation; None if it has none
    applied: Optional[bool] = None


def applies_exif_orientation(dataset: dict) -> bool:
    """Whether the pipeline of a dataset applies the EXIF orientation of images."""
    return all(
        step.get('color_type', 'color') in ('color', 'grayscale')
        and step.get('imdecode_backend', 'cv2') in ('cv2', 'pillow')
        for step in find_steps(dataset, 'LoadImageFromFile')
    )


def inspect_image(path: str, apply_exif_orientation: bool = True) -> ImageFacts:
    """Decode an image file, with or without applying its EXIF orientation.

    Raises:
        ImageError: If it is not an image, is damaged, or OpenCV cannot read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about metadata
            with Image.open(path) as image:
                size, kind = image.size, MODES.get(image.mode.partition(';')[0])
                form = image.format
                orientation = image.getexif().get(EXIF_ORIENTATION, 1)
                if form == 'TIFF':  # Pillow applies the orientation itself
                    tags: Any = image.tag_v2  # type: ignore[attr-defined]
                    size = tags[WIDTH_TAG], tags[HEIGHT_TAG]
                # a JPEG is read to its end, but faster at an eighth of the size
                image.draft('RGB', (size[0] // 8, size[1] // 8))
                image.load()
    except UnidentifiedImageError:
        pixels = _read_opencv(path)
        if pixels is None:
            raise ImageError(
                f'({os.stat(path).st_size} bytes) is not an image'
            ) from None
        return ImageFacts(pixels.shape[1::-1], None)
    except DECODE_ERRORS as error:
        raise ImageError(f'cannot be decoded ({error})') from error
    if form not in SHARED and _read_opencv(path) is None:
        raise ImageError(f'is a {form} image of a kind that OpenCV cannot decode')
    if orientation == 1:
        return ImageFacts(size, kind)
    applied, note = apply_exif_orientation, ''
    if orientation in SWAPS_SIDES:
        if applied:  # the formats depend on the version of OpenCV
            pixels = _read_opencv(path)
            applied = pixels is None or pixels.shape[1::-1] != size
        note = ' (the loader does not apply its EXIF orientation)'
        if applied:
            size = size[::-1]
            note = ' when its EXIF orientation is applied, which the loader does'
    return ImageFacts(size, kind, note, applied)


def check_images(
    dataset: 'CocoDataset', images: list[dict], decode: Optional[int] = None
) -> tuple[list[str], list[str]]:
    """Check that the images of an annotation file exist, and decode some of them.

    Returns:
        tuple[list[str], list[str]]: Findings, and a clause for each kind of image that
        is converted when it is loaded, such as ``'2 of 90 decoded images are grey'``.
    """
    folder = dataset.image_folder
    names = [item['file_name'] for item in images]
    sizes = file_sizes([osp.join(folder, name) for name in names])
    missing = [name for name, size in zip(names, sizes) if size is None]
    empty = [name for name, size in zip(names, sizes) if size == 0]
    present = [item for item, size in zip(images, sizes) if size]
    sample = spread(present, decode if dataset.loads_files else 0)
    bad: list[str] = []
    kinds: Counter = Counter()
    for item in sample:
        name, stated = item['file_name'], (item['width'], item['height'])
        try:
            facts = inspect_image(
                osp.join(folder, name), dataset.apply_exif_orientation
            )
        except ImageError as error:
            bad.append(f'{name} {error}')
            continue
        if stated != facts.size:
            bad.append(
                f'{name} is {facts.size[0]}x{facts.size[1]} pixels{facts.note}, but '
                f'the annotation file says {stated[0]}x{stated[1]}'
            )
            continue
        if facts.kind:
            kinds[f'are {facts.kind}'] += 1
        if facts.applied is not None:
            done = 'applied' if facts.applied else 'not applied'
            kinds[
                f'have an EXIF orientation, which is {done}; boxes must be drawn '
                'accordingly'
            ] += 1
    remove = 'remove them and their annotations from the file.'
    found = []
    if missing:
        found.append(
            f'{len(missing)} of {len(images)} images listed in {dataset.ann_file} are '
            f'not in {folder}: {shorten(missing)}. Fetch them, or {remove}'
        )
    if empty:
        found.append(
            f'{len(empty)} of {len(images)} images in {folder} are empty files (0 '
            f'bytes): {shorten(empty)}. Fetch them again, or {remove}'
        )
    if bad:
        found.append(
            f'{len(bad)} of {len(sample)} decoded images in {folder} are unusable: '
            f'{"; ".join(bad[:5])}. Fetch them again, or {remove}'
        )
    return [f'{dataset.where}: {text}' for text in found], [
        f'{count} of {len(sample)} decoded images {kind}'
        for kind, count in sorted(kinds.items())
    ]


def spread(items: list, count: Optional[int]) -> list:
    """Choose ``count`` items, evenly spread.

    None means all of up to 500 items, else 100.
    """
    if count is None:
        count = len(items) if len(items) <= ALL_UP_TO else SAMPLE
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def file_sizes(paths: list[str]) -> list[Optional[int]]:
    """Return the sizes of files in bytes; None for a missing file.

    Each folder is listed once, since asking for each file is slow on network disks.
    """
    listings: dict[str, dict[str, Optional[int]]] = {}
    sizes = []
    for path in paths:
        folder, name = osp.split(path)
        if folder not in listings:
            listings[folder] = {}
            if osp.isdir(folder):
                with os.scandir(folder) as entries:
                    listings[folder] = {entry.name: _size(entry) for entry in entries}
        sizes.append(listings[folder].get(name))
    return sizes


def _size(entry: os.DirEntry) -> Optional[int]:
    try:
        return entry.stat().st_size
    except OSError:  # a dangling link
        return None


def _read_opencv(path: str) -> Any:
    """Pixels of shape (height, width, 3), or None."""
    try:
        return mmcv.imread(path)
    except cv2.error:  # an empty file
        return None
