"""The configs that mmdet, mmseg and mmpretrain ship, with ResT put in, pass."""

import ast
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmrest.datasets.preflight import PreflightError, check_config
from mmrest.datasets.preflight.model import check_backbones

# Configs that are wrong themselves: a head of 20 for 21 classes, a loop that MMEngine
# refuses to build.
WRONG = {'san-vit-b16_voc12aug': 'num_classes is 20', 'solov2-light': 'takes one'}
# what once was refused: other heads, other formats, lists of metrics
KNOWN = (
    'mmdet/htc/htc_r50_fpn_1x_coco.py',
    'mmdet/panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    'mmdet/mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    'mmdet/lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py',
    'mmdet/crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py',
    'mmdet/mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py',
    'mmseg/stdc/stdc1_4xb12-80k_cityscapes-512x1024.py',
)


def config_root(package):
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / '.mim' / 'configs' if spec else Path()


def one_a_folder():
    """Of each folder the config in the middle of the alphabet."""
    for package in ('mmdet', 'mmseg', 'mmpretrain'):
        for folder in sorted(config_root(package).glob('[!_]*')):
            files = sorted(folder.glob('*.py'))
            if files:
                yield f'{package}/{folder.name}/{files[len(files) // 2].name}'


def read(name):
    package, _, path = name.partition('/')
    try:
        cfg = Config.fromfile(config_root(package) / path)
    except (OSError, KeyError, RuntimeError) as error:
        pytest.skip(f'the package ships it with a base that is missing: {error}')
    if isinstance(cfg.get('model', {}).get('backbone'), dict):
        cfg.model.backbone = dict(type='ResT', arch='lite')
        # maps and channels of the former backbone, as the check advises
        for _ in range(2):  # first which map, then its channels
            for text in list(check_backbones(cfg.model)):
                option = re.search(r'--cfg-options "?(\S+?)"?, ', text)[1]
                key, value = option.split('=')
                cfg.merge_from_dict({key: ast.literal_eval(value)})
    return cfg


def check_stock(name):
    """Nothing is found but that the data are not there."""
    cfg = read(name)
    for stage in ('train', 'test'):
        try:
            check_config(cfg, stage)
        except PreflightError as error:
            _, *found, _ = str(error).split('\n\n')
            true = [words for part, words in WRONG.items() if part in name]
            for text in found:
                assert any(w in text for w in (' does not exist', *true)), text


@pytest.mark.parametrize('name', KNOWN)
def test_stock_configs(name):
    check_stock(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in one_a_folder() if n not in KNOWN])
def test_a_config_of_each_folder(name):
    check_stock(name)


@pytest.mark.parametrize(
    ('name', 'field', 'advice'),
    [
        (KNOWN[0], 'roi_head.bbox_head.0.num_classes', 80),
        (KNOWN[1], 'roi_head.bbox_head.num_classes', 80),
        (KNOWN[1], 'semantic_head.num_stuff_classes', 53),
        (KNOWN[2], 'panoptic_head.num_things_classes', 80),
        (KNOWN[6], 'auxiliary_head.0.num_classes', 19),
    ],
)
def test_wrong_counts_in_them_are_still_found(name, field, advice):
    cfg = read(name)
    cfg.merge_from_dict({f'model.{field}': 7})
    with pytest.raises(PreflightError, match=f'model.{field}={advice}'):
        check_config(cfg)


def test_advice_never_names_a_file_that_is_not_there():
    for name in KNOWN[3:5]:
        with pytest.raises(PreflightError) as error:
            check_config(read(name))
        assert 'val_evaluator.ann_file: ' in str(error.value)
        assert 'none' not in str(error.value).lower()


def write_images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(folder / name)


def panoptic_files(root, names):
    """COCO's panoptic format: images of segment ids, with a list of the segments."""
    from mmdet.datasets import CocoPanopticDataset

    meta = CocoPanopticDataset.METAINFO
    categories = [
        dict(id=n, name=c, isthing=int(c in meta['thing_classes']))
        for n, c in enumerate(meta['classes'], 1)
    ]
    segment = dict(id=0, category_id=1, area=96 * 64, bbox=[0, 0, 96, 64], iscrowd=0)
    for split in ('train2017', 'val2017'):
        write_images(root / split, [f'{n}.jpg' for n in names])
        write_images(
            root / f'annotations/panoptic_{split}', [f'{n}.png' for n in names]
        )
        images = [dict(id=n, file_name=f'{n}.jpg', width=96, height=64) for n in names]
        panoptic = [
            dict(image_id=n, file_name=f'{n}.png', segments_info=[segment])
            for n in names
        ]
        instances = [dict(segment, id=n, image_id=n) for n in names]
        for kind, items in (('panoptic', panoptic), ('instances', instances)):
            things = [c for c in categories if kind == 'panoptic' or c['isthing']]
            for item in instances:
                item['segmentation'] = [[0, 0, 96, 0, 96, 64]]
            content = dict(images=images, annotations=items, categories=things)
            path = root / f'annotations/{kind}_{split}.json'
            path.write_text(json.dumps(content))


@pytest.fixture
def panoptic(tmp_path):
    """A stock panoptic config of two metrics, and its data."""
    panoptic_files(tmp_path / 'data/coco', (7, 9))
    before = os.getcwd()
    os.chdir(tmp_path)
    yield read(KNOWN[2])
    os.chdir(before)


@pytest.mark.parametrize('stage', ['train', 'test'])
def test_panoptic_files_are_read_as_such(panoptic, stage):
    text = check_config(panoptic, stage)[-1][1]
    assert 'val: 2 images, 2 annotations, 133 classes' in text or stage == 'test'


def test_faults_in_panoptic_files_are_found(panoptic, tmp_path):
    path = tmp_path / 'data/coco/annotations/panoptic_val2017.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['segments_info'][0]['category_id'] = 999
    path.write_text(json.dumps(content))
    other = tmp_path / 'data/coco/annotations/instances_val2017.json'
    content = json.loads(other.read_text())
    content['images'].pop()
    content['annotations'].pop()
    other.write_text(json.dumps(content))
    with pytest.raises(PreflightError) as error:
        check_config(panoptic)
    text = str(error.value)
    assert 'category_id 999 in annotation 0' in text
    assert 'val_evaluator.1.ann_file: it reads' in text and '9.jpg' in text
