"""The generated data set: the same everywhere, and valid COCO."""

import hashlib
import json

import cv2
import numpy as np
import pytest
from fruitset import coco as fruit_coco
from fruitset.coco import CLASSES, annotate, generate, to_polygons
from fruitset.scene import SUPERSAMPLE, Thing, render_scene
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

SIZE = 96
COUNTS = dict(num_train=40, num_val=6, size=SIZE, seed=3)
# Raise fruitset.coco.VERSION when this changes on purpose.
SCENES_DIGEST = 'bed3624f324e99acc03b7a152023c81c0d1afb2cc2ef5a7a9f9a761733f1983e'


@pytest.fixture(scope='module')
def fruit(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('fruit') / 'set', **COUNTS)


@pytest.fixture(scope='module')
def train(fruit):
    return COCO(fruit / 'annotations' / 'instances_train.json')


def digest(root):
    """SHA-256 over names, decoded pixels and annotation files."""
    total = hashlib.sha256()
    for path in sorted(root.rglob('*')):
        total.update(str(path.relative_to(root)).encode())
        if path.suffix == '.png':
            total.update(cv2.imread(str(path)).tobytes())
        elif path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()


def test_scenes_are_those_of_this_version():
    total = hashlib.sha256()
    for index in range(4):
        scene = render_scene((0, 0, index), SIZE, crowd=index == 0)
        total.update(scene.image.tobytes())
        for thing in scene.things:
            total.update(np.packbits(thing.mask).tobytes())
    assert total.hexdigest() == SCENES_DIGEST


def test_same_whatever_the_number_of_processes(fruit, tmp_path):
    again = generate(tmp_path / 'again', **COUNTS, workers=1)
    assert digest(again) == digest(fruit)


def test_other_seed_and_other_split_give_other_pictures(fruit, tmp_path):
    other = generate(tmp_path / 'other', **dict(COUNTS, seed=4))
    names = ('train/000000.png', 'val/000000.png')
    pictures = [cv2.imread(str(r / n)) for r in (fruit, other) for n in names]
    for i, one in enumerate(pictures):
        assert one.shape == (SIZE, SIZE, 3)
        assert all((one != two).mean() > 0.3 for two in pictures[:i])


def test_complete_set_is_not_made_again(fruit):
    before = {p: p.stat().st_mtime_ns for p in fruit.rglob('*')}
    generate(fruit, **COUNTS)
    assert before == {p: p.stat().st_mtime_ns for p in fruit.rglob('*')}


def test_other_request_for_the_same_folder_is_refused(fruit):
    before = digest(fruit)
    with pytest.raises(FileExistsError, match='num_train'):
        generate(fruit, **dict(COUNTS, num_train=41))
    assert digest(fruit) == before


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'mine.txt').write_text('precious')
    with pytest.raises(FileExistsError, match='not written by this generator'):
        generate(tmp_path, **COUNTS)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']
    file = tmp_path / 'mine.txt'
    with pytest.raises(FileExistsError):
        generate(file, **COUNTS)
    assert file.read_text() == 'precious'


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(fruit_coco, '_write_image', fail)
    with pytest.raises(OSError, match='disk full'):
        generate(tmp_path / 'set', num_train=2, num_val=1, size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_files_and_images_agree(fruit):
    for split, count in (('train', 40), ('val', 6)):
        content = json.loads(
            (fruit / 'annotations' / f'instances_{split}.json').read_text()
        )
        assert [c['name'] for c in content['categories']] == list(CLASSES)
        assert content['licenses'] and content['info']
        assert len(content['images']) == count
        for image in content['images']:
            pixels = cv2.imread(str(fruit / split / image['file_name']))
            assert pixels.shape == (image['height'], image['width'], 3)
        numbers = [a['id'] for a in content['annotations']]
        assert len(set(numbers)) == len(numbers) and 0 not in numbers


def test_annotations_fit_their_masks(train):
    annotations = train.loadAnns(train.getAnnIds())
    assert len(annotations) > 60
    for annotation in annotations:
        mask = train.annToMask(annotation)
        assert mask.sum() == annotation['area'] >= fruit_coco.MIN_AREA
        rows, cols = np.nonzero(mask)
        x, y, w, h = annotation['bbox']
        found = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(found, (x, y, x + w, y + h))).max() <= 2  # thin tips
        assert x >= 0 and y >= 0 and x + w <= SIZE and y + h <= SIZE


def test_every_class_polygons_and_crowds_occur(train):
    annotations = train.loadAnns(train.getAnnIds())
    single = [a for a in annotations if not a['iscrowd']]
    crowds = [a for a in annotations if a['iscrowd']]
    assert {a['category_id'] for a in single} == {1, 2, 3, 4}
    assert all(isinstance(a['segmentation'], list) for a in single)
    assert len(crowds) >= 2
    for crowd in crowds:
        counts = crowd['segmentation']['counts']
        assert isinstance(counts, list) and sum(counts) == SIZE * SIZE
        assert crowd['segmentation']['size'] == [SIZE, SIZE]


def test_objects_do_not_share_pixels(train):
    """What is covered belongs to the upper object alone (rounding aside)."""
    occluded = 0
    for image_id in train.getImgIds():
        found = train.loadAnns(train.getAnnIds(image_id))
        masks = [train.annToMask(a) for a in found]
        shared = sum(m.astype(int) for m in masks) > 1
        assert shared.sum() <= 0.03 * SIZE * SIZE
        boxes = mask_utils.iou(
            [a['bbox'] for a in found], [a['bbox'] for a in found], [0] * len(found)
        )
        occluded += int((boxes - np.eye(len(found)) > 0.05).any())
    assert occluded > 3  # occlusion does occur


@given(
    holes=st.lists(
        st.tuples(st.integers(22, 62), st.integers(22, 62), st.integers(4, 9)),
        max_size=3,
    )
)
@settings(max_examples=40, deadline=None)
def test_polygons_spare_holes(holes):
    """A disc with holes comes back as polygons that leave the holes out."""
    side = 84
    y, x = np.mgrid[:side, :side]
    mask = np.hypot(y - 42, x - 42) < 38
    for cy, cx, radius in holes:
        mask &= np.hypot(y - cy, x - cx) >= radius
    size = side // SUPERSAMPLE
    encoded = mask_utils.frPyObjects(to_polygons(mask), size, size)
    area = mask_utils.decode(mask_utils.merge(encoded)).sum()
    assert area == pytest.approx(mask.sum() / SUPERSAMPLE**2, rel=0.12)


def test_speck_is_not_annotated():
    mask = np.zeros((60, 60), bool)
    mask[:6, :6] = True
    assert annotate(Thing(label=0, mask=mask), 20) is None
