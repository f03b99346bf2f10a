"""A segmentor through tools/train.py, dist_train.sh and tools/test.py."""

import re

import numpy as np
import pytest
from PIL import Image
from tool_runs import iterations

from mmrest.checkpoint import read_checkpoint


@pytest.fixture(scope='module')
def trained(call, config, tmp_path_factory):
    """Work folder and output of a run of four iterations, started elsewhere."""
    folder = tmp_path_factory.mktemp('seg_trained')
    return folder / 'run', call('train.py', config, '--work-dir', 'run', cwd=folder)


def test_trains_saves_and_evaluates_from_another_folder(trained):
    folder, output = trained
    assert iterations(output) == [1, 2, 3, 4]
    assert 'Preflight passed. train: 4 images, 3 classes' in output
    assert 'decode.loss_ce: ' in output and re.search('Iter.val.*mIoU: ', output)
    assert (folder / 'iter_2.pth').is_file() and (folder / 'iter_4.pth').is_file()


@pytest.mark.slow
def test_resume_on_two_processes_without_gpus(finish, config, trained, tmp_path):
    """The config has SyncBN, which no CPU has."""
    folder, _ = trained
    output = finish(
        'train.py',
        config,
        '--work-dir',
        tmp_path / 'run',
        '--resume',
        folder / 'iter_2.pth',
        '--auto-scale-lr',
        '--cfg-options',
        'train_cfg.max_iters=3',
        ranks=2,
    )
    assert iterations(output) == [3]
    assert 'SyncBN needs GPUs' in output and 'current batch size is 4' in output
    assert 'Iter(val) [2/2]' in output  # three images on two processes
    saved = read_checkpoint(tmp_path / 'run' / 'iter_3.pth')
    assert saved['meta']['iter'] == 3


@pytest.mark.slow
def test_augmented_test_draws_and_writes_label_images(call, config, trained, tmp_path):
    """In windows, at six scales, mirrored too, and without the training data."""
    checkpoint = trained[0] / 'iter_4.pth'
    transforms = 'tta_pipeline.1.transforms.0.'
    options = ['--tta', '--work-dir', tmp_path / 'run', '--show-dir', 'pictures']
    options += ['--out', tmp_path / 'labels', '--cfg-options']
    sides = enumerate((32, 48, 64, 40, 56, 80))
    options += [f'{transforms}{i}.scale=({side * 4},{side})' for i, side in sides]
    options += ['train_dataloader.dataset.data_root=nowhere']
    options += ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(32,32)']
    options += ['model.test_cfg.stride=(24,24)']
    output = call('test.py', config, checkpoint, *options, cwd=tmp_path)
    assert re.search(r'\| +box +\|', output) and 'mIoU: ' in output
    pictures = sorted((tmp_path / 'run').glob('*/pictures/*.png'))
    assert len(pictures) == 3
    for picture in pictures:  # labels beside the prediction
        assert Image.open(picture).size == (140, 50)
    for path in sorted((tmp_path / 'labels').iterdir()):
        labels = np.array(Image.open(path))
        assert labels.shape == (50, 70) and labels.max() < 3
    assert len(list((tmp_path / 'labels').iterdir())) == 3


def test_label_images_of_others_are_not_overwritten(call, config, trained, tmp_path):
    folder = config.parent / 'shapes' / 'val_labels'
    output = call(
        'test.py',
        config,
        trained[0] / 'iter_4.pth',
        '--out',
        folder,
        cwd=tmp_path,
        fails=True,
    )
    assert f'--out {folder}: the folder is not empty' in output
    assert 'Traceback' not in output


def test_label_outside_the_classes_is_named_in_training(
    call, config, dataset, tmp_path
):
    """As when the check before the run did not look at that very image."""
    for path in (dataset / 'train_labels').iterdir():
        labels = np.array(Image.open(path))
        labels[20:25, 20:25] = 7
        Image.fromarray(labels).save(path)
    options = ['--cfg-options', f'train_dataloader.dataset.data_root={dataset}']
    options += ['preflight.decode=0']
    output = call('train.py', config, *options, cwd=tmp_path, fails=True)
    last = output.splitlines()[-1]
    assert re.search(r'train_labels/\d\.png holds the index 7 in 25 pixels', last)
    assert '3 classes, 0 to 2, and ignores 255' in last
    assert 'Traceback' not in output


def test_inferencer_of_mmseg(config, trained, dataset):
    from mmseg.apis import MMSegInferencer

    weights = str(trained[0] / 'iter_4.pth')
    inferencer = MMSegInferencer(model=str(config), weights=weights, device='cpu')
    images = [str(path) for path in sorted((dataset / 'val').iterdir())]
    predictions = inferencer(images)['predictions']
    assert [labels.shape for labels in predictions] == [(50, 70)] * 3
    assert tuple(inferencer.model.dataset_meta['classes']) == ('ground', 'box', 'disc')
