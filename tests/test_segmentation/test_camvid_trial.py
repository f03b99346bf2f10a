"""The example of one's own data on the real street scenes, shortened."""

import re

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmrest.datasets.preflight import check_config

CONFIG = 'configs/camvid/semantic_fpn_rest_camvid.py'


@pytest.fixture
def data_options(shared):
    root = shared / 'data' / 'camvid_subset'
    return [
        f'{split}_dataloader.dataset.data_root={root}'
        for split in ('train', 'val', 'test')
    ]


def test_it_builds_and_fits_the_photographs(repo, shared):
    cfg = Config.fromfile(str(repo / CONFIG))
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == 'data/camvid/'
        dataset.data_root = str(shared / 'data' / 'camvid_subset')
    check_config(cfg)
    init_default_scope(cfg.default_scope)
    MODELS.build(cfg.model)


@pytest.mark.slow
def test_the_first_steps_of_the_trial_learn_the_scenes(
    finish, repo, data_options, tmp_path
):
    """All of one class gives an mIoU of 2.7, 20 iterations 5, and 80 of them 16."""
    options = ['--work-dir', tmp_path / 'run', '--cfg-options', *data_options]
    schedule = ['train_cfg.max_iters=60', 'train_cfg.val_interval=60']
    trained = finish('train.py', repo / CONFIG, *options, *schedule)
    miou = float(re.findall(r'mIoU: ([\d.]+)', trained)[-1])
    assert miou > 8

    checkpoint = tmp_path / 'run' / 'iter_60.pth'
    show = ['--show-dir', 'pictures']
    tested = finish('test.py', repo / CONFIG, checkpoint, *show, *options)
    assert float(re.findall(r'mIoU: ([\d.]+)', tested)[-1]) == pytest.approx(miou)
    pictures = list((tmp_path / 'run').glob('*/pictures/*.png'))
    assert len(pictures) == 21
    assert Image.open(pictures[0]).size == (2 * 480, 360)  # labels, prediction
