"""Folders of images and annotations in COCO format, of every kind of dirt.

A picture is dark with one bright box, so that a test can see whether a box still
lies on it after loading, rotating and resizing.
"""

import io
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

DARK, BRIGHT = 50, 210
WIDTH, HEIGHT = 96, 64
BOX = (60, 8, 28, 24)  # x, y, width, height: not symmetric in any direction
CLASSES = ('box', 'other')
ORIENTATION = 0x0112


def picture(width=WIDTH, height=HEIGHT, box=BOX):
    """Grey levels, uint8 of (height, width)."""
    pixels = np.full((height, width), DARK, np.uint8)
    x, y, w, h = box
    pixels[y : y + h, x : x + w] = BRIGHT
    return pixels


def polygon(box=BOX):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def encode(image, form='JPEG', **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb(**size):
    return Image.fromarray(picture(**size)).convert('RGB')


def rotated(orientation, form='JPEG'):
    """Stored rotated; its EXIF orientation, applied, gives ``picture`` back."""
    back = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(rgb().transpose(back[orientation]), form, exif=exif)


def grey_alpha():
    image = rgb().convert('LA')
    image.putalpha(Image.fromarray(np.full((HEIGHT, WIDTH), 128, np.uint8)))
    return encode(image, 'PNG')


def sixteen_bits():
    return cv2.imencode('.png', picture().astype(np.uint16) * 257)[1].tobytes()


# What is used as it is loaded: name of the file, bytes.
USED = {
    'plain': ('plain.jpg', lambda: encode(rgb())),
    'progressive': ('progressive.jpg', lambda: encode(rgb(), progressive=True)),
    'grey': ('grey.jpg', lambda: encode(rgb().convert('L'))),
    'grey-alpha': ('grey alpha.png', grey_alpha),
    'rgba': ('rgba.png', lambda: encode(rgb().convert('RGBA'), 'PNG')),
    'palette': ('palette.png', lambda: encode(rgb().convert('P'), 'PNG')),
    'black-white': (
        'bits.png',
        lambda: encode(Image.fromarray(picture() > 99), 'PNG'),
    ),
    'cmyk': ('cmyk.jpg', lambda: encode(rgb().convert('CMYK'))),
    '16-bit': ('sixteen.png', sixteen_bits),
    'exif-180': ('exif3.jpg', lambda: rotated(3)),
    'exif-90': ('exif6.jpg', lambda: rotated(6)),
    'exif-270': ('exif8.jpg', lambda: rotated(8)),
    'exif-png': ('exif6.png', lambda: rotated(6, 'PNG')),
    'exif-tiff': ('exif6.tif', lambda: rotated(6, 'TIFF')),
    'space': ('a folder/with a space.jpg', lambda: encode(rgb())),
    'unicode': ('bäume/木 🌳.jpg', lambda: encode(rgb())),
    'metacharacters': ("100% [x]/it's #1 & $HOME;*.jpg", lambda: encode(rgb())),
    'wrong-suffix': ('a png.jpg', lambda: encode(rgb(), 'PNG')),
}


def cut(content, part=0.6):
    return content[: int(len(content) * part)]


# What stops a run: name of the file, bytes (None: no file).
REFUSED = {
    'cut-jpeg': ('cut.jpg', lambda: cut(encode(rgb(), quality=95))),
    'cut-progressive': ('cutp.jpg', lambda: cut(encode(rgb(), progressive=True))),
    'cut-png': ('cut.png', lambda: cut(encode(rgb(), 'PNG'))),
    'cut-bmp': ('cut.bmp', lambda: cut(encode(rgb(), 'BMP'))),
    'float-tiff': ('float.tif', lambda: floats()),
    'no-bytes': ('nothing.jpg', lambda: b''),
    'page': ('page.jpg', lambda: b'<html>Not found</html>'),
    'missing': ('missing.jpg', lambda: None),
    'small-copy': ('small.jpg', lambda: encode(rgb().resize((48, 32)))),
    # drawn on the stored image, but the loader applies the EXIF orientation
    'exif-as-stored': ('stored.jpg', lambda: exif_on_upright()),
}


def floats():
    return encode(Image.fromarray(picture().astype(np.float32)), 'TIFF')


def exif_on_upright():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encode(rgb(), exif=exif)


TWO_POINTS = [[1, 1, 9, 9]]

# fields of an annotation, what is said in training, in validation (or None)
SKIPPED = {
    'no-width': (dict(bbox=[5, 5, 0, 9]), '1 boxes have no width or height'),
    'no-area': (dict(bbox=[5, 5, 0, 0]), '1 boxes have no width or height'),
    'negative': (dict(bbox=[50, 50, -20, -9]), '1 boxes have no width or height'),
    'left-of': (dict(bbox=[-50, 5, 40, 20]), '1 boxes lie outside of their image'),
    'below': (dict(bbox=[5, HEIGHT, 9, 9]), '1 boxes lie outside of their image'),
    'zero-area': (dict(area=0), '1 annotations have an area of 0 or less'),
    'thin': (dict(bbox=[5, 5, 0.5, 20], area=10), '1 boxes are narrower or lower'),
    'ignore': (dict(ignore=1), '1 annotations are marked "ignore"'),
}
# left out by the loader of masks and not by the dataset
IGNORED = {
    'two-points': (TWO_POINTS, '1 objects have no polygon of three points or more'),
    'one-point': ([[1, 1]], '1 objects have no polygon of three points or more'),
    'no-points': ([[]], '1 objects have no polygon of three points or more'),
    'odd': ([[1, 1, 9, 1, 9]], '1 objects have no polygon of three points or more'),
}


class Dataset:
    """A data set that is written as a folder; ids are neither dense nor in order."""

    def __init__(self, root: Path, ids=(3, 9), names=CLASSES) -> None:
        self.root, self.categories = root, dict(zip(ids, names))
        self.images, self.annotations = [], []

    def add_image(self, name, content, width=WIDTH, height=HEIGHT):
        """Add an image file (None: only its entry) and return its id."""
        key = 1000 - 7 * len(self.images)
        if content is not None:
            path = self.root / 'images' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.images.append(dict(id=key, file_name=name, width=width, height=height))
        return key

    def add_object(self, image, /, bbox=BOX, **fields):
        """Add an annotation; ``fields`` replace what a sound one has."""
        item = dict(
            id=len(self.annotations) + 1,
            image_id=image,
            category_id=3,
            bbox=list(bbox),
            area=BOX[2] * BOX[3],
            segmentation=[polygon()],
            iscrowd=0,
        )
        item.update(fields)
        self.annotations.append({k: v for k, v in item.items() if v is not ...})

    def write(self, name):
        (self.root / 'images').mkdir(parents=True, exist_ok=True)
        categories = [dict(id=n, name=name) for n, name in self.categories.items()]
        content = dict(
            images=self.images, annotations=self.annotations, categories=categories
        )
        (self.root / name).write_text(json.dumps(content))
