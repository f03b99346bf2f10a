"""`make demo`: short runs, errors, and the whole thing."""

import functools
import json

import cv2
import pytest
from fruitset.coco import generate
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from plotting import metric_table, read_scalars, save_curves

SHORT = (
    'train_cfg.max_iters=2',
    'train_dataloader.batch_size=2',
    'default_hooks.logger.interval=1',
    *(
        f'{split}_dataloader.{option}'
        for split in ('train', 'val')
        for option in ('num_workers=0', 'persistent_workers=False')
    ),
)


@pytest.fixture
def demo(call, tmp_path, monkeypatch):
    """Run the demo from another folder."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return functools.partial(call, '../projects/demo/run.py', cwd=tmp_path)


def results(work_dir):
    """The one run's folder, after checking that all results are there."""
    (folder,) = (p for p in work_dir.iterdir() if p.name[:8].isdigit())
    for name in ('metrics.txt', 'metrics.json', 'curves.png'):
        assert (folder / name).stat().st_size > 0
    (checkpoint,) = folder.glob('iter_*.pth')
    assert cv2.imread(str(folder / 'curves.png')).shape[0] > 300
    pictures = list((folder / 'pictures').glob('*.png'))
    assert folder / 'pictures' / 'overview.png' in pictures
    assert len(pictures) >= 2
    return folder


@pytest.mark.parametrize(
    'name',
    ['mask_rcnn_rest_fruit', 'mask_rcnn_rest_custom', 'retinanet_rest_custom'],
)
def test_configs_build(repo, name):
    cfg = Config.fromfile(repo / 'configs' / 'demo' / f'{name}.py')
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) < 4e6


def test_short_run_on_generated_data(demo, tmp_path):
    counts = ('fruit_set.num_train=6', 'fruit_set.num_val=3', 'fruit_set.size=96')
    output = demo('--work-dir', 'out', '--cfg-options', *SHORT, *counts)
    folder = results(tmp_path / 'out')
    assert len(list((folder / 'pictures').iterdir())) == 4
    for what in ('metrics.txt', 'pictures', 'curves.png', 'iter_2.pth', '.log'):
        assert str(folder) in output and what in output
    assert 'On 3 images held back from training' in output
    assert json.loads((folder / 'metrics.json').read_text()).get('step', 2) == 2


@pytest.mark.slow
def test_short_run_on_own_data(demo, tmp_path):
    data = generate(tmp_path / 'mine', 6, 3, 80, workers=1)
    (data / 'generated.json').unlink()
    before = sorted((p, p.stat().st_mtime_ns) for p in data.rglob('*'))
    options = ['--arch', 'restv2', '--cfg-options', *SHORT]
    output = demo('--data', data, '--work-dir', 'out', *options)
    results(tmp_path / 'out')
    assert 'train and val as found' in output
    assert before == sorted((p, p.stat().st_mtime_ns) for p in data.rglob('*'))


@pytest.mark.slow
def test_short_run_on_boxes_alone(demo, tmp_path):
    data = generate(tmp_path / 'mine', 6, 3, 80, workers=1)
    for path in data.glob('annotations/*.json'):
        content = json.loads(path.read_text())
        for annotation in content['annotations']:
            annotation.update(segmentation=[], iscrowd=0)
        path.write_text(json.dumps(content))
    (data / 'generated.json').unlink()
    options = ['--cfg-options', *SHORT, 'model.test_cfg.score_thr=0']
    output = demo('--data', data, '--work-dir', 'out', *options)
    folder = results(tmp_path / 'out')
    assert 'The objects have boxes and no masks: a RetinaNet is trained.' in output
    assert (folder / 'retinanet_rest_custom.py').is_file()
    table = (folder / 'metrics.txt').read_text()
    assert 'bbox' in table and 'segm' not in table


def test_unusable_data_end_in_one_message(demo, tmp_path):
    (tmp_path / 'data').mkdir()
    output = demo('--data', 'data', '--work-dir', 'out', fails=True)
    assert 'No COCO annotation file' in output
    assert list((tmp_path / 'out').iterdir()) == []


def test_curves_and_table(tmp_path):
    metrics = {
        f'coco/{kind}_{name}': -1.0 if name == 'mAP_l' else 0.25
        for kind in ('bbox', 'segm')
        for name in ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    }
    entries = [
        dict(step=1, loss=2.0, loss_cls=1.0, lr=0.1),
        dict(step=2, loss=1.0, loss_cls=0.5, lr=0.1),
        dict(step=2, **metrics),
    ]
    scalars = tmp_path / 'scalars.json'
    scalars.write_text('\n'.join(map(json.dumps, entries)) + '\n')
    train, val = read_scalars(scalars)
    assert (train, val) == (entries[:2], entries[2:])
    save_curves(train, val, tmp_path / 'curves.png')
    assert cv2.imread(str(tmp_path / 'curves.png')) is not None
    header, boxes, masks = metric_table(metrics).splitlines()
    assert header.split() == ['AP', 'AP50', 'AP75', 'APs', 'APm', 'APl']
    assert boxes.split() == ['bbox', *['0.250'] * 5, '-']
    assert masks.split()[0] == 'segm'


def test_nothing_detected_is_said(tmp_path):
    assert 'No object was detected' in metric_table({})
    save_curves([dict(step=1, loss=2.0)], [], tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').exists()


@pytest.mark.slow
def test_demo_learns(finish, tmp_path):
    """The promise of `make demo`, kept by a quarter of it, on images never seen."""
    options = ['train_cfg.max_iters=75', 'train_cfg.val_interval=75']
    options += ['fruit_set.num_train=300', 'fruit_set.num_val=40']
    words = ['--work-dir', 'out', '--cfg-options', *options]
    finish('../projects/demo/run.py', *words)
    metrics = json.loads((results(tmp_path / 'out') / 'metrics.json').read_text())
    assert metrics['coco/bbox_mAP_50'] >= 0.5
    assert metrics['coco/segm_mAP_50'] >= 0.45
