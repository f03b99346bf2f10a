"""Layouts of users' COCO-format folders, and what is said when one is unusable."""

import json
import shutil

import cv2
import numpy as np
import pytest
from user_data import DataError, find_data

CATEGORIES = [dict(id=7, name='nut'), dict(id=3, name='fig')]


def coco(count=5, first=1, categories=CATEGORIES):
    """A COCO dict of ``count`` images with one square each."""
    ids = range(first, first + count)
    square = [4, 4, 20, 4, 20, 20, 4, 20]
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=32, height=24) for i in ids],
        categories=list(categories),
        annotations=[
            dict(
                id=i,
                image_id=i,
                category_id=(7, 3)[i % 2],
                bbox=[4, 4, 16, 16],
                area=256,
                iscrowd=0,
                segmentation=[square],
            )
            for i in ids
        ],
    )


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_images(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    for image in content['images']:
        pixels = np.full((image['height'], image['width'], 3), 90, np.uint8)
        cv2.imwrite(str(folder / image['file_name']), pixels)


@pytest.fixture
def root(tmp_path):
    """One file and an image folder, as many small sets come."""
    write(tmp_path / 'data' / 'trainval.json', coco())
    write_images(tmp_path / 'data' / 'images', coco())
    return tmp_path / 'data'


@pytest.mark.parametrize(
    'ann_files, img_dirs',
    [
        (
            (
                'annotations/instances_train2017.json',
                'annotations/instances_val2017.json',
            ),
            ('train2017', 'val2017'),
        ),
        (
            ('annotations/train.json', 'annotations/val.json'),
            ('images/train', 'images/val'),
        ),
        (
            ('train/_annotations.coco.json', 'valid/_annotations.coco.json'),
            ('train', 'valid'),
        ),
        (('my_train.json', 'my_test.json'), ('.', '.')),
    ],
)
def test_both_splits_are_found(tmp_path, ann_files, img_dirs):
    root = tmp_path / 'data'
    # The same names in both image folders: only the folder tells them apart.
    for ann_file, img_dir in zip(ann_files, img_dirs):
        write(root / ann_file, coco())
        write_images(root / img_dir, coco())
    write(root / 'annotations' / 'captions_notes.json', dict(hello=1))
    found = find_data(root, tmp_path / 'split')
    assert found.classes == ('nut', 'fig')
    for split, ann_file, img_dir in zip((found.train, found.val), ann_files, img_dirs):
        assert split.ann_file == (root / ann_file).resolve()
        assert split.img_dir == (root / img_dir).resolve()
    assert not (tmp_path / 'split').exists()


def test_one_file_is_split_and_left_unchanged(root, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob('*'))
    found = find_data(root, tmp_path / 'split', seed=1)
    train, val = (json.loads(s.ann_file.read_text()) for s in (found.train, found.val))
    ids = [{image['id'] for image in part['images']} for part in (train, val)]
    assert ids[0] | ids[1] == {1, 2, 3, 4, 5} and not ids[0] & ids[1]
    assert len(ids[1]) == 1
    for part, own in zip((train, val), ids):
        assert {a['image_id'] for a in part['annotations']} == own
        assert part['categories'] == CATEGORIES
    assert found.train.img_dir == found.val.img_dir == (root / 'images').resolve()
    again = find_data(root, tmp_path / 'again', seed=1)
    assert again.val.ann_file.read_text() == found.val.ann_file.read_text()
    assert before == sorted((p, p.stat().st_mtime_ns) for p in root.rglob('*'))


def test_large_val_is_cut_down(tmp_path, monkeypatch):
    monkeypatch.setattr('user_data.MAX_VAL', 3)
    for split in ('train', 'val'):
        write(tmp_path / 'data' / f'{split}.json', coco())
        write_images(tmp_path / 'data' / split, coco())
    found = find_data(tmp_path / 'data', tmp_path / 'split')
    val = json.loads(found.val.ann_file.read_text())
    assert len(val['images']) == len(val['annotations']) == 3
    assert '3 of 5 val images' in found.note
    assert found.val.img_dir == (tmp_path / 'data' / 'val').resolve()


def change(path, **fields):
    content = json.loads(path.read_text())
    content.update(fields)
    path.write_text(json.dumps(content))


def change_annotation(path, drop=(), **fields):
    content = json.loads(path.read_text())
    content['annotations'][1].update(fields)
    for key in drop:
        del content['annotations'][1][key]
    path.write_text(json.dumps(content))


def twice(path):
    shutil.copy(path, path.with_name('other.json'))


DAMAGES = {
    'no annotation file': (lambda p: p.unlink(), 'No COCO annotation file'),
    'broken JSON': (lambda p: p.write_text('{"images": ['), 'not valid JSON'),
    'other JSON': (lambda p: p.write_text('[1, 2]'), 'trainval.json'),
    'no annotations': (lambda p: change(p, annotations=[]), '"annotations"'),
    'no images': (lambda p: change(p, images=[]), '"images"'),
    'same names': (
        lambda p: change(p, categories=[dict(id=7, name='a'), dict(id=3, name='a')]),
        'not unique',
    ),
    'no masks': (
        lambda p: change_annotation(p, segmentation=[]),
        'annotation 2 has no',
    ),
    'no area': (lambda p: change_annotation(p, drop=['area']), 'has no area'),
    'unknown category': (
        lambda p: change_annotation(p, category_id=9),
        'category_id 9',
    ),
    'unknown image': (lambda p: change_annotation(p, image_id=77), 'image 77'),
    'image missing': (lambda p: (p.parent / 'images/3.jpg').unlink(), '3.jpg'),
    'images missing': (lambda p: shutil.rmtree(p.parent / 'images'), 'None of the 5'),
    'two files': (twice, 'Two annotation files'),
    'val alone': (lambda p: p.rename(p.with_name('val.json')), 'none to train on'),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_error_names_what_is_wrong(root, tmp_path, name):
    damage, message = DAMAGES[name]
    damage(root / 'trainval.json')
    with pytest.raises(DataError, match=message):
        find_data(root, tmp_path / 'split')


def test_missing_folder_and_single_image(tmp_path):
    with pytest.raises(DataError, match='not a folder'):
        find_data(tmp_path / 'nothing', tmp_path / 'split')
    write(tmp_path / 'one' / 'all.json', coco(1))
    write_images(tmp_path / 'one', coco(1))
    with pytest.raises(DataError, match='at least 2 images'):
        find_data(tmp_path / 'one', tmp_path / 'split')


def test_splits_with_different_categories_are_refused(tmp_path):
    for split, categories in (('train', CATEGORIES), ('val', CATEGORIES[::-1])):
        write(tmp_path / f'{split}.json', coco(categories=categories))
        write_images(tmp_path / split, coco())
    with pytest.raises(DataError, match='other categories'):
        find_data(tmp_path, tmp_path / 'split')


def test_three_splits(tmp_path):
    """As Roboflow exports them; the third is left alone."""
    for split in ('train', 'valid', 'test'):
        write(tmp_path / split / '_annotations.coco.json', coco())
    for split in ('train', 'valid'):  # nobody looks for the images of the third
        write_images(tmp_path / split, coco())
    found = find_data(tmp_path, tmp_path / 'out')
    assert found.train.img_dir.name == 'train' and found.val.img_dir.name == 'valid'
    assert 'test (_annotations.coco.json) left alone' in found.note
    assert found.has_masks


def test_boxes_alone(tmp_path):
    content = coco()
    for annotation in content['annotations']:
        del annotation['segmentation']
    write(tmp_path / 'in' / 'train.json', content)
    write_images(tmp_path / 'in', content)
    assert not find_data(tmp_path / 'in', tmp_path / 'split').has_masks
    write(tmp_path / 'in' / 'val.json', coco())
    with pytest.raises(DataError, match='has masks and the other only boxes'):
        find_data(tmp_path / 'in', tmp_path / 'split')


XML = """<annotation><filename>1.jpg</filename>
<object><name>{}</name><difficult>0</difficult><bndbox>
<xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>
</annotation>"""


def write_voc(folder, images, names):
    for index, name in enumerate(names, 1):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{index}.xml').write_text(XML.format(name))
    write_images(images, coco(len(names)))


def devkit(root):
    write_voc(root / 'Annotations', root / 'JPEGImages', 'abcab')
    lists = root / 'ImageSets' / 'Main'
    lists.mkdir(parents=True)
    (lists / 'train.txt').write_text('1\n2\n3\n')
    (lists / 'val.txt').write_text('4\n5\n')


def voc_beside_images(root):
    # each file alone would number the classes differently
    write_voc(root / 'train', root / 'train', 'abc')
    write_voc(root / 'valid', root / 'valid', 'ca')


def write_yolo(labels, images, lines):
    labels.mkdir(parents=True)
    for index, line in enumerate(lines, 1):
        (labels / f'{index}.txt').write_text(line)
    write_images(images, coco(len(lines)))


BOXES = [f'{label} 0.375 0.5 0.5 {2 / 3}\n' for label in range(3)]
POLYGONS = [
    f'{label} 0.125 0.17 0.625 0.17 0.625 0.83 0.125 0.83\n' for label in range(3)
]


def ultralytics(root, lines=BOXES):
    for split in ('train', 'val'):
        write_yolo(root / 'labels' / split, root / 'images' / split, lines)
    (root / 'data.yaml').write_text('names: {0: a, 1: b, 2: c}\ntrain: images/train\n')


def roboflow_yolo(root):
    for split in ('train', 'valid', 'test'):
        write_yolo(root / split / 'labels', root / split / 'images', BOXES)
    (root / 'data.yaml').write_text('names: [a, b, c]\n')
    (root / 'README.txt').write_text('exported')


def one_folder(root):
    write_yolo(root / 'all', root / 'all', BOXES)
    (root / 'all' / 'classes.txt').write_text('a\nb\nc\n')


@pytest.mark.parametrize(
    'lay_out', [devkit, voc_beside_images, ultralytics, roboflow_yolo, one_folder]
)
def test_voc_and_yolo(tmp_path, lay_out):
    pytest.importorskip('supervision')
    lay_out(tmp_path / 'data')
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob('*'))
    found = find_data(tmp_path / 'data', tmp_path / 'split')
    assert set(before) <= {(p, p.stat().st_mtime_ns) for p in tmp_path.rglob('*')}
    assert found.classes == ('a', 'b', 'c') and not found.has_masks
    assert ', converted by supervision' in found.note
    for split in (found.train, found.val):
        content = json.loads(split.ann_file.read_text())
        assert content['images'] and content['annotations']
        assert all(
            (split.img_dir / i['file_name']).is_file() for i in content['images']
        )
        # VOC counts pixels from 1, to the last one
        for annotation in content['annotations']:
            assert annotation['bbox'] == pytest.approx([4, 4, 16, 16], abs=0.01)
    names = {c['id']: c['name'] for c in content['categories']}
    if lay_out is voc_beside_images:
        labels = [names[a['category_id']] for a in content['annotations']]
        assert labels == ['c', 'a']


def test_polygons_of_yolo_are_masks(tmp_path):
    pytest.importorskip('supervision')
    ultralytics(tmp_path / 'data', POLYGONS)
    found = find_data(tmp_path / 'data', tmp_path / 'split')
    content = json.loads(found.train.ann_file.read_text())
    assert found.has_masks
    assert not any(a['iscrowd'] for a in content['annotations'])


def test_voc_and_yolo_that_cannot_be_read(tmp_path):
    pytest.importorskip('supervision')
    one_folder(tmp_path / 'yolo')
    (tmp_path / 'yolo/all/classes.txt').unlink()
    with pytest.raises(DataError, match=r'no data\.yaml or dataset\.yaml or classes'):
        find_data(tmp_path / 'yolo', tmp_path / 'split')
    (tmp_path / 'yolo/all/classes.txt').write_text('a\n')  # of three
    with pytest.raises(DataError, match='cannot be read'):
        find_data(tmp_path / 'yolo', tmp_path / 'split')
    devkit(tmp_path / 'voc')
    (tmp_path / 'voc/Annotations/1.xml').write_text('<annotation>')
    with pytest.raises(DataError, match=r'Annotations cannot be read: no element'):
        find_data(tmp_path / 'voc', tmp_path / 'split')


def test_real_folders(shared, tmp_path):
    nuts = find_data(shared / 'data' / 'fruit_nuts', tmp_path / 'split')
    assert nuts.classes == ('date', 'fig', 'hazelnut')
    assert '14 images to train on, 4 held back' in nuts.note
    tiny = find_data(shared / 'data' / 'coco_tiny', tmp_path / 'unused')
    assert len(tiny.classes) == 80 and tiny.classes[0] == 'person'
    assert tiny.train.img_dir.name == 'train2017'
    assert tiny.val.img_dir.name == 'val2017'
    cells = find_data(shared / 'data' / 'bccd', tmp_path / 'unused')
    assert cells.classes == ('RBC', 'WBC', 'Platelets') and not cells.has_masks
    assert 'test (test.json) left alone' in cells.note
