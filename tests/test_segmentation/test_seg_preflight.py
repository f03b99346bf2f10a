"""Each finding about a segmentation set names the thing, the value and the remedy."""

import shutil

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmrest.datasets.preflight import PreflightError, check_config


@pytest.fixture
def cfg(config, dataset):
    """The tiny config on a copy of its data that may be damaged."""
    cfg = Config.fromfile(str(config))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(dataset)
    return cfg


def finding(cfg, stage='train'):
    with pytest.raises(PreflightError) as error:
        check_config(cfg, stage)
    return str(error.value)


def relabel(path, change):
    """Change a label image by a function of its array."""
    labels = np.array(Image.open(path))
    result = change(labels)
    Image.fromarray(labels if result is None else result).save(path)


@pytest.mark.parametrize('stage', ['train', 'test'])
def test_sound_data_pass(cfg, stage):
    check_config(cfg, stage)


@pytest.mark.parametrize('folder', ['train', 'train_labels', 'val', 'val_labels'])
def test_missing_folder(cfg, dataset, folder):
    shutil.rmtree(dataset / folder)
    text = finding(cfg)
    assert f'{dataset / folder} does not exist' in text
    key = 'seg_map_path' if 'labels' in folder else 'img_path'
    split = folder.split('_')[0]
    assert f'{split}_dataloader.dataset.data_prefix.{key}' in text


def test_other_suffix(cfg):
    cfg.train_dataloader.dataset.img_suffix = '.jpg'
    text = finding(cfg)
    assert 'ends in .jpg; found .png. Set train_dataloader.dataset.img_suffix' in text


def test_image_without_labels_and_labels_without_image(cfg, dataset):
    (dataset / 'train_labels' / '1.png').unlink()
    (dataset / 'val' / '2.png').unlink()
    text = finding(cfg)
    assert '2 problems' in text
    assert f'1 label images are missing: {dataset}/train_labels/1.png' in text
    assert f'{dataset}/val_labels/2.png' in text and 'no image' in text


def test_list_that_names_a_missing_image(cfg, dataset):
    (dataset / 'list.txt').write_text('0\n7\n')
    cfg.train_dataloader.dataset.ann_file = 'list.txt'
    text = finding(cfg)
    assert f'1 images are missing: {dataset}/train/7.png' in text
    assert f'1 label images are missing: {dataset}/train_labels/7.png' in text


def fill(value, dtype=np.uint8):
    def change(labels):
        labels = labels.astype(dtype)
        labels[5:9, 5:9] = value
        return labels

    return change


@pytest.mark.parametrize(
    ('value', 'dtype'), [(3, np.uint8), (254, np.uint8), (258, np.uint16)]
)
def test_index_outside_the_classes(cfg, dataset, value, dtype):
    """258 would be read as 2: mmseg cuts label images to eight bits."""
    path = dataset / 'train_labels' / '2.png'
    relabel(path, fill(value, dtype))
    text = finding(cfg)
    assert f'{path} holds {value}' in text
    assert 'The 3 classes are 0 to 2; ignored: 255.' in text


def test_reduce_zero_label_shifts_the_classes(cfg, dataset):
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.reduce_zero_label = True
    check_config(cfg)
    relabel(dataset / 'train_labels' / '0.png', fill(4))
    text = finding(cfg)
    assert '0.png holds 4' in text and 'classes are 1 to 3; ignored: 0, 255' in text
    relabel(dataset / 'train_labels' / '0.png', fill(3))
    check_config(cfg)


def test_ignored_label_of_the_heads_is_no_fault(cfg, dataset):
    relabel(dataset / 'train_labels' / '0.png', fill(3))
    for split in ('train', 'val'):
        for path in (dataset / f'{split}_labels').iterdir():
            relabel(path, lambda labels: np.where(labels == 255, 3, labels))
    cfg.model.decode_head.ignore_index = 3
    text = finding(cfg)
    assert 'seg_pad_val is 255, but the heads leave out 3' in text
    assert 'Set val_evaluator.ignore_index=3' in text and '2 problems' in text
    cfg.model.data_preprocessor.seg_pad_val = 3
    cfg.val_evaluator.ignore_index = 3
    check_config(cfg)


def test_labels_of_another_size(cfg, dataset):
    path = dataset / 'val_labels' / '0.png'
    relabel(path, lambda labels: labels[:40])
    assert f'0.png is 70x50 pixels, but {path} is 70x40' in finding(cfg)


def test_colour_picture_for_labels(cfg, dataset):
    path = dataset / 'train_labels' / '3.png'
    relabel(path, lambda labels: np.stack([labels] * 3, -1))
    assert f'{path} is a colour picture (3 values a pixel)' in finding(cfg)


@pytest.mark.parametrize('folder', ['train', 'train_labels'])
def test_undecodable_file(cfg, dataset, folder):
    path = dataset / folder / '1.png'
    path.write_bytes(path.read_bytes()[:60])
    assert f'{path} cannot be decoded' in finding(cfg)


def test_nothing_but_ignored_pixels(cfg, dataset):
    for path in (dataset / 'train_labels').iterdir():
        relabel(path, lambda labels: np.full_like(labels, 255))
    assert 'no pixel of the 4 decoded label images is of a class' in finding(cfg)


def test_class_count_of_the_head(cfg):
    cfg.model.decode_head.num_classes = 4
    text = finding(cfg)
    assert 'has 3 classes, but model.decode_head.num_classes is 4' in text


def test_classes_that_the_data_set_does_not_know(cfg):
    cfg.train_dataloader.dataset.type = 'ADE20KDataset'
    assert 'ADE20KDataset cannot be built: new classes' in finding(cfg)


def test_wrapped_dataset_is_looked_into(cfg, dataset):
    inner = cfg.train_dataloader.dataset.to_dict()
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=inner)
    relabel(dataset / 'train_labels' / '2.png', fill(9))
    assert 'train_dataloader.dataset.dataset: 1 of 4 label images' in finding(cfg)
