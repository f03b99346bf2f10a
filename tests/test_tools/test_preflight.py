"""Each finding before a run names the thing, what was found and what to do."""

import json
import shutil

import pytest
import torch
from mmengine.config import Config

from mmrest.datasets.preflight import PreflightError, check_config


@pytest.fixture
def cfg(config, dataset):
    """The tiny config on a copy of its data that may be damaged."""
    cfg = Config.fromfile(config)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(dataset)
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = str(dataset / 'val.json')
    return cfg


def finding(cfg, stage='train'):
    with pytest.raises(PreflightError) as error:
        check_config(cfg, stage)
    return str(error.value)


def edit(dataset, change, name='train.json'):
    """Change an annotation file by a function of its content."""
    path = dataset / name
    content = json.loads(path.read_text())
    result = change(content)
    path.write_text(json.dumps(content if result is None else result))


@pytest.mark.parametrize('stage', ['train', 'test'])
def test_sound_data_pass(cfg, stage):
    check_config(cfg, stage)


def test_missing_annotation_file(cfg, dataset):
    (dataset / 'train.json').unlink()
    text = finding(cfg)
    assert '1 problem' in text and f'{dataset / "train.json"} does not exist' in text
    assert 'train_dataloader.dataset.data_root' in text


def test_missing_data_root_is_said_once_a_dataset(cfg, dataset):
    shutil.rmtree(dataset)
    text = finding(cfg)
    assert '2 problems' in text
    assert text.count(f'nor does its data_root {dataset}') == 2


@pytest.mark.parametrize(
    'content', ['', '<html>404</html>', '{"images": [', '\x00\x01'], ids=repr
)
def test_unreadable_json(cfg, dataset, content):
    (dataset / 'val.json').write_text(content)
    assert 'val.json is not valid JSON' in finding(cfg)


def drop(part, field):
    def change(content):
        for item in content[part]:
            del item[field]

    return change


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda c: [], 'it holds a list'),
        (lambda c: c.pop('categories') and None, 'it has no list "categories"'),
        (lambda c: c.update(images={}), 'it has no list "images"'),
        (lambda c: c['images'].insert(1, 'x'), 'images[1] is not an object'),
        (drop('images', 'file_name'), 'images[0] has no file_name'),
        (drop('annotations', 'bbox'), 'annotations[0] has no bbox'),
        (drop('categories', 'name'), 'categories[0] has no name'),
        (lambda c: c['annotations'][3].update(bbox=[1, 2]), 'annotation 4 is [1, 2]'),
    ],
)
def test_not_coco_format(cfg, dataset, change, expected):
    edit(dataset, change)
    text = finding(cfg)
    assert 'train.json is not in COCO format' in text and expected in text


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (
            lambda c: c['annotations'][0].update(image_id=77),
            '1 annotations of images that it does not list: annotation 1',
        ),
        (
            lambda c: c['annotations'][2].update(category_id=9),
            'category_id 9 in annotation 3',
        ),
        (
            lambda c: c['annotations'][1].update(id=1),
            'an id of annotations more than once: 1',
        ),
        (
            lambda c: c['images'][1].update(id=1),
            'an id of images more than once: 1',
        ),
        (lambda c: c['annotations'].clear(), 'none of which can be trained on'),
        (
            lambda c: (c['images'].clear(), c['annotations'].clear()) and None,
            'lists no images',
        ),
        (
            lambda c: c['annotations'][4].pop('segmentation') and None,
            '1 annotations without segmentation',
        ),
        (
            lambda c: c['annotations'][4].update(
                segmentation=dict(size=[64, 96], counts=[0, 64 * 96])
            ),
            'Set poly2mask=True',
        ),
    ],
)
def test_inconsistent_annotations(cfg, dataset, change, expected):
    edit(dataset, change)
    assert expected in finding(cfg)


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (('box', 'circle'), '1 are not in the file: circle. Set train_dataloader'),
        (('box',), '6 annotations of categories that are not among the 1 classes'),
        (('diamond', 'box'), "metainfo.classes=('box', 'diamond')"),
        (('box', 'diamond', 'star'), 'num_classes=2'),
    ],
)
def test_categories_that_differ_from_the_classes(cfg, names, expected):
    cfg.train_dataloader.dataset.metainfo.classes = names
    assert expected in finding(cfg)


def test_the_default_classes_of_another_dataset(cfg):
    """Data paths were changed, and nothing else."""
    del cfg.train_dataloader.dataset['metainfo']
    text = finding(cfg)
    assert 'has the categories box, diamond (2)' in text
    assert 'has 80 classes, of which 80 are not in the file: person' in text


def test_unused_categories_may_be_wanted(cfg):
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.metainfo.classes = ('box',)
    cfg.model.roi_head.bbox_head.num_classes = 1
    cfg.model.roi_head.mask_head.num_classes = 1
    assert 'preflight.unused_categories=True' in finding(cfg)
    cfg.preflight = dict(unused_categories=True)
    check_config(cfg)


def test_heads_of_another_class_count(cfg):
    cfg.model.roi_head.bbox_head.num_classes = 80
    text = finding(cfg)
    assert 'model.roi_head.bbox_head.num_classes is 80' in text
    assert '--cfg-options model.roi_head.bbox_head.num_classes=2' in text
    assert 'mask_head' not in text


def test_missing_images_are_named_and_counted(cfg, dataset):
    for path in (dataset / 'images').glob('train_[0-2].jpg'):
        path.unlink()
    text = finding(cfg)
    assert '3 of 6 images listed' in text and 'train_0.jpg, train_1.jpg' in text


def test_missing_image_folder(cfg):
    cfg.val_dataloader.dataset.data_prefix.img = 'pictures'
    text = finding(cfg)
    assert 'pictures does not exist' in text
    assert 'val_dataloader.dataset.data_prefix.img' in text


@pytest.mark.parametrize(
    ('damage', 'expected'),
    [
        (lambda data: b'<html>' * 9, 'train_2.jpg (54 bytes) is not an image'),
        (lambda data: data[: len(data) // 2], 'train_2.jpg cannot be decoded'),
    ],
    ids=['page', 'cut'],
)
def test_undecodable_image(cfg, dataset, damage, expected):
    path = dataset / 'images' / 'train_2.jpg'
    path.write_bytes(damage(path.read_bytes()))
    assert expected in finding(cfg)
    cfg.preflight = dict(decode=0)
    check_config(cfg)


def test_image_of_another_size(cfg, dataset):
    edit(dataset, lambda c: c['images'][5].update(width=640))
    assert 'train_5.jpg is 96x64 pixels, but the annotation file says 640x64' in (
        finding(cfg)
    )


def test_wrapped_datasets_are_looked_into(cfg, dataset):
    part = cfg.train_dataloader.dataset
    other = Config(dict(part)).to_dict() | dict(ann_file='more.json')
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset',
        times=3,
        dataset=dict(type='ConcatDataset', datasets=[part, other]),
    )
    text = finding(cfg)
    assert 'train_dataloader.dataset.dataset.datasets.1: ' in text
    assert f'{dataset / "more.json"} does not exist' in text


def test_evaluator_that_judges_by_another_file(cfg, dataset):
    cfg.val_evaluator.ann_file = str(dataset / 'train.json')
    assert 'it judges by' in finding(cfg)
    cfg.val_evaluator.ann_file = str(dataset / 'none.json')
    assert 'val_evaluator.ann_file: ' in finding(cfg)


def test_missing_pretrained_weights(cfg, tmp_path):
    missing = str(tmp_path / 'rest_lite.pth')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=missing)
    text = finding(cfg)
    assert missing in text and 'https://' in text
    assert '--cfg-options model.backbone.init_cfg=None' in text
    check_config(cfg, 'test')  # whose weights come from the checkpoint


def test_missing_checkpoint_to_load(cfg, tmp_path):
    cfg.load_from = str(tmp_path / 'epoch_3.pth')
    assert f'load_from: the checkpoint {cfg.load_from} does not exist' in finding(cfg)


def test_freezing_random_weights(cfg, tmp_path):
    cfg.model.backbone.frozen_stages = 1
    assert 'model.backbone.frozen_stages=-1' in finding(cfg)
    torch.save({}, tmp_path / 'start.pth')
    cfg.load_from = str(tmp_path / 'start.pth')
    check_config(cfg)


def test_test_sets_need_no_annotations(cfg, dataset):
    edit(dataset, lambda c: c.pop('annotations') and None, 'val.json')
    check_config(cfg, 'test')


@pytest.mark.parametrize(
    ('scope', 'dataset'),
    [
        ('mmseg', dict(type='ADE20KDataset', data_prefix=dict(img_path='none'))),
        ('mmpretrain', dict(type='ImageNet', data_root='none', data_prefix='train')),
        ('mmdet', dict(type='CocoDataset', ann_file='s3://bucket/train.json')),
    ],
)
def test_other_formats_and_storage_are_passed_over(scope, dataset):
    loader = dict(dataset=dataset)
    check_config(Config(dict(default_scope=scope, train_dataloader=loader)))


@pytest.mark.slow
def test_as_many_images_as_coco_take_seconds(cfg, dataset):
    """118,000 images, and 860,000 objects as COCO's train2017 has."""
    import time

    def multiply(content):
        images, objects = content['images'], content['annotations']
        content['images'] = [
            dict(images[n % 6], id=n, file_name=f'{n:012}.jpg') for n in range(118_000)
        ]
        content['annotations'] = [
            dict(objects[n % 12], id=n, image_id=n % 118_000) for n in range(860_000)
        ]

    edit(dataset, multiply)
    folder = dataset / 'images'
    for n in range(118_000):
        (folder / f'{n:012}.jpg').hardlink_to(folder / f'train_{n % 6}.jpg')
    start = time.perf_counter()
    check_config(cfg)
    seconds = time.perf_counter() - start
    print(f'checked in {seconds:.1f} s')
    assert seconds < 60
