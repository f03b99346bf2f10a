"""What other tools leave out of an annotation file is filled in, or named."""

import inspect
import json
import math

import numpy as np
import pytest
from mmengine.registry import DATASETS, METRICS, init_default_scope
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mmrest.datasets import fill_coco_fields
from mmrest.datasets.coco_fields import fields_are_filled, fill_fields
from mmrest.datasets.preflight import check_config

FIELDS = ('iscrowd', 'area')
TRIANGLE = [10, 10, 30, 10, 10, 30]  # 200 pixels; its box has 400


@pytest.fixture(autouse=True)
def _as_pycocotools_has_it(monkeypatch):
    """Whatever another test called before; put back at the end."""
    monkeypatch.setattr(COCO, 'createIndex', inspect.unwrap(COCO.createIndex))


@pytest.fixture
def filled():
    fill_coco_fields()
    assert fields_are_filled()


def without(*fields):
    def change(content):
        for item in content['annotations']:
            for field in fields:
                item.pop(field)

    return change


@pytest.mark.parametrize('fields', [('iscrowd',), ('area',), FIELDS])
def test_named_before_the_run_where_nothing_fills_them(cfg, finding, edit, fields):
    edit(without(*fields), 'val.json')
    text = finding(cfg)
    for field in fields:
        assert f'6 annotations without {field}, which is needed' in text
    assert 'fill_coco_fields()' in text


def test_a_loader_needs_the_area_too(cfg, finding, edit):
    edit(without('area'))
    assert '12 annotations without area' in finding(cfg)


def evaluate(cfg):
    """Judge each image by its own boxes and masks."""
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    metric = METRICS.build(cfg.val_evaluator)
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        boxes = np.array([item['bbox'] for item in info['instances']], np.float32)
        height, width = info['height'], info['width']
        masks = [
            coco_mask.frPyObjects(item['mask'], height, width)[0]
            for item in info['instances']
        ]
        prediction = dict(
            img_id=info['img_id'],
            bboxes=boxes,
            scores=np.ones(len(boxes)),
            labels=np.array([item['bbox_label'] for item in info['instances']]),
            masks=masks,
        )
        metric.results.append((dict(width=width, height=height), prediction))
    return metric.compute_metrics(metric.results)


@pytest.mark.parametrize(
    'change',
    [
        without('iscrowd'),
        without('area'),
        lambda content: content.update(info=None) or content.pop('info'),
        lambda content: [a.update(id=a['id'] - 1) for a in content['annotations']],
        lambda content: [a.update(id=f'a{a["id"]}') for a in content['annotations']],
    ],
    ids=['iscrowd', 'area', 'info', 'ids from 0', 'text ids'],
)
def test_the_evaluation_gives_the_full_score(cfg, filled, edit, change):
    for name in ('train.json', 'val.json'):
        edit(change, name)
    check_config(cfg)
    metrics = evaluate(cfg)
    assert metrics['bbox_mAP'] == metrics['segm_mAP'] == 1
    init_default_scope('mmdet')
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 6


def test_the_report_says_what_is_filled_in(cfg, filled, edit):
    edit(without(*FIELDS), 'val.json')
    (_, note), _ = check_config(cfg)
    assert '6 annotations have no iscrowd, which is filled in' in note


def test_files_stay_as_they_are(cfg, dataset, filled, edit):
    edit(without(*FIELDS), 'val.json')
    before = (dataset / 'val.json').read_bytes()
    check_config(cfg)
    evaluate(cfg)
    assert (dataset / 'val.json').read_bytes() == before


def compressed(mask):
    code = coco_mask.encode(np.asfortranarray(mask))
    return dict(size=list(code['size']), counts=code['counts'].decode())


@pytest.mark.parametrize(
    ('fields', 'area'),
    [
        (dict(bbox=[10, 10, 20, 20]), 400),
        (dict(bbox=[10, 10, 20, 20], segmentation=[]), 400),
        (dict(bbox=[10, 10, 20, 20], segmentation=[TRIANGLE]), 200),
        (dict(bbox=[10, 10, 20, 20], segmentation=[TRIANGLE, TRIANGLE]), 400),
        (dict(bbox=[0, 0, 4, 2], segmentation=dict(size=[2, 4], counts=[1, 3, 4])), 3),
        (dict(bbox=[0, 0, 4, 2], segmentation=compressed(np.eye(4, dtype='u1'))), 4),
        (dict(bbox=[0, 0, 4, 2], area=7.5), 7.5),
    ],
)
def test_areas(fields, area):
    content = dict(annotations=[dict(id=1, **fields)])
    fill_fields(content)
    assert math.isclose(content['annotations'][0]['area'], area)


def test_what_is_there_is_kept():
    item = dict(id=5, bbox=[0, 0, 4, 2], area=3, iscrowd=1)
    content = dict(annotations=[dict(item), dict(item, id=9)], info=dict(year=2020))
    before = json.dumps(content)
    fill_fields(content)
    assert json.dumps(content) == before
