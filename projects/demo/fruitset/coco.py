"""Writes the generated scenes as a data set in COCO's format.

::

    out_dir/
    |- annotations/instances_train.json
    |- annotations/instances_val.json
    |- train/000000.png ...
    |- val/000000.png ...
    `- generated.json      what the set was made from; written last
"""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from .fruits import FRUITS
from .scene import SUPERSAMPLE, render_scene

VERSION = 1  # raise it whenever a change alters pixels or annotations
SPLITS = ('train', 'val')
CLASSES = tuple(fruit.name for fruit in FRUITS)
MIN_AREA = 20  # square pixels; smaller visible parts are not annotated
_LICENCE = dict(id=1, name='Apache-2.0', url='http://www.apache.org/licenses/')


def generate(out_dir, num_train=600, num_val=100, size=160, seed=0, workers=2):
    """Generate the data set, unless exactly this one is there already.

    Args:
        out_dir (str | Path): Folder to create.
        num_train (int): Number of training images. Default: 600.
        num_val (int): Number of held-back images. Default: 100.
        size (int): Side of the square images in pixels. Default: 160.
        seed (int): The same seed gives the same pixels. Default: 0.
        workers (int): Processes to render with; changes nothing but the time.

    Returns:
        Path: ``out_dir``.

    Raises:
        FileExistsError: ``out_dir`` holds something else; it is left alone.
    """
    out_dir = Path(out_dir)
    made_from = dict(
        version=VERSION, num_train=num_train, num_val=num_val, size=size, seed=seed
    )
    if _is_complete(out_dir, made_from):
        return out_dir
    partial = out_dir.with_name(f'.{out_dir.name}.partial-{os.getpid()}')
    try:
        for split, count in zip(SPLITS, (num_train, num_val)):
            _write_split(partial, split, count, size, seed, workers)
        (partial / 'generated.json').write_text(json.dumps(made_from))
        if out_dir.exists():
            out_dir.rmdir()  # empty: _is_complete has checked it
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _is_complete(out_dir, made_from):
    marker = out_dir / 'generated.json'
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found == made_from:
            return True
        raise FileExistsError(
            f'{out_dir} holds a data set generated from {found}, wanted is '
            f'{made_from}. Remove that folder or choose another one.'
        )
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(
            f'{out_dir} exists and was not written by this generator; nothing in '
            'it was touched. Choose another folder.'
        )
    return False


def _write_split(root, split, count, size, seed, workers):
    (root / split).mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    jobs = [(root, split, index, size, seed) for index in range(count)]
    if workers > 1 and count > 8:
        with multiprocessing.Pool(workers) as pool:
            results = pool.starmap(_write_image, jobs, chunksize=8)
    else:
        results = [_write_image(*job) for job in jobs]
    annotations = [ann for _, found in results for ann in found]
    for number, annotation in enumerate(annotations, start=1):
        annotation['id'] = number
    content = dict(
        info=dict(description='mmrest demo fruit', version=str(VERSION), year=2021),
        licenses=[_LICENCE],
        categories=[
            dict(id=number, name=name, supercategory='food')
            for number, name in enumerate(CLASSES, start=1)
        ],
        images=[image for image, _ in results],
        annotations=annotations,
    )
    path = root / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(content))


def _write_image(root, split, index, size, seed):
    """Render one scene, write its PNG, return its image and annotation dicts."""
    scene = render_scene((seed, SPLITS.index(split), index), size)
    name = f'{index:06d}.png'
    path = root / split / name
    if not cv2.imwrite(str(path), scene.image[:, :, ::-1]):
        raise OSError(f'Could not write {path}.')
    image = dict(id=index + 1, file_name=name, width=size, height=size, license=1)
    found = [annotate(thing, size) for thing in scene.things]
    found = [dict(image_id=index + 1, **ann) for ann in found if ann]
    return image, found


def annotate(thing, size):
    """COCO annotation of a thing, or None where too little of it is visible.

    Single objects get polygons, heaps a run-length encoding and ``iscrowd=1``.
    """
    if thing.crowd:
        small = cv2.resize(
            thing.mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA
        )
        segmentation = _uncompressed_rle(small >= 0.5)
        encoded = mask_utils.frPyObjects(segmentation, size, size)
        box = mask_utils.toBbox(encoded)
    else:
        segmentation = to_polygons(thing.mask)
        if not segmentation:
            return None
        encoded = mask_utils.merge(mask_utils.frPyObjects(segmentation, size, size))
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in segmentation])
        low, high = points.min(0), points.max(0)
        box = np.concatenate([low, high - low])
    area = int(mask_utils.area(encoded))
    if area < MIN_AREA:
        return None
    return dict(
        category_id=thing.label + 1,
        iscrowd=int(thing.crowd),
        segmentation=segmentation,
        area=area,
        bbox=[round(float(value), 2) for value in box],
    )


def to_polygons(mask):
    """Outlines of a fine mask in pixels, COCO style: ``[[x, y, x, y, ...], ...]``.

    A mask with a hole is cut in two through the hole, because polygons in COCO
    have none.
    """
    # Contours run through the centres of the outermost points; on a grid twice as
    # fine these are nearer to the true edge.
    finer = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    scale = 2 * SUPERSAMPLE
    contours, hierarchy = cv2.findContours(finer, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parents = [] if hierarchy is None else hierarchy[0, :, 3]
    holes = [c for c, p in zip(contours, parents) if p >= 0 and cv2.contourArea(c) > 36]
    if holes:
        column = int(holes[0][:, 0, 0].mean()) // 2
        left, right = mask.copy(), mask.copy()
        left[:, column:] = False
        right[:, :column] = False
        return to_polygons(left) + to_polygons(right)
    polygons = []
    for contour, parent in zip(contours, parents):
        contour = cv2.approxPolyDP(contour, 1.6, True)[:, 0]
        area = cv2.contourArea(contour) / scale**2
        if parent < 0 and len(contour) >= 3 and area >= MIN_AREA / 2:
            points = (contour + 0.5) / scale
            polygons.append([round(float(value), 2) for value in points.ravel()])
    return polygons


def _uncompressed_rle(mask):
    """COCO's run lengths: column by column, starting with a run of zeros."""
    flat = np.concatenate([[0], mask.ravel(order='F').astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    if counts[-1] == 0:
        counts = counts[:-1]
    return dict(size=list(mask.shape), counts=counts.tolist())
