"""`make demo` as real processes: a short one, errors, and the whole thing."""

import json
import os
import subprocess
import sys

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
)


def run_demo(repo, *args, **env):
    """Run the tool from another folder; returns the finished process."""
    path = os.pathsep.join(filter(None, (str(repo), os.environ.get('PYTHONPATH'))))
    return subprocess.run(
        [sys.executable, str(repo / 'tools' / 'demo' / 'run.py'), *map(str, args)],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=path, **env),
        cwd=repo.parent,
    )


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


@pytest.mark.parametrize('name', ['fruit', 'custom'])
def test_configs_build(repo, name):
    cfg = Config.fromfile(repo / 'configs' / 'demo' / f'mask_rcnn_rest_{name}.py')
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) < 4e6


def test_short_run_on_generated_data(repo, tmp_path):
    counts = ('fruit_set.num_train=6', 'fruit_set.num_val=3', 'fruit_set.size=96')
    done = run_demo(
        repo, '--work-dir', tmp_path, '--cfg-options', *SHORT, *counts,
        OMP_NUM_THREADS='1',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = results(tmp_path)
    assert len(list((folder / 'pictures').iterdir())) == 4
    for what in ('metrics.txt', 'pictures', 'curves.png', 'iter_2.pth', '.log'):
        assert str(folder) in done.stdout and what in done.stdout
    assert 'On 3 images held back from training' in done.stdout
    assert json.loads((folder / 'metrics.json').read_text()).get('step', 2) == 2


def test_short_run_on_own_data(repo, tmp_path):
    data = generate(tmp_path / 'mine', 6, 3, 80, workers=1)
    (data / 'generated.json').unlink()
    before = sorted((p, p.stat().st_mtime_ns) for p in data.rglob('*'))
    done = run_demo(
        repo, '--data', data, '--work-dir', tmp_path / 'out', '--cfg-options', *SHORT,
        OMP_NUM_THREADS='1',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results(tmp_path / 'out')
    assert 'train and val as found' in done.stdout
    assert before == sorted((p, p.stat().st_mtime_ns) for p in data.rglob('*'))


def test_unusable_data_end_in_one_message(repo, tmp_path):
    (tmp_path / 'data').mkdir()
    done = run_demo(repo, '--data', tmp_path / 'data', '--work-dir', tmp_path / 'out')
    assert done.returncode == 1
    assert 'No COCO annotation file' in done.stderr
    assert 'Traceback' not in done.stderr
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
def test_demo_learns(repo, tmp_path):
    """The promise of `make demo`, on images never trained on."""
    done = run_demo(repo, '--work-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((results(tmp_path) / 'metrics.json').read_text())
    assert metrics['coco/bbox_mAP_50'] >= 0.5
    assert metrics['coco/segm_mAP_50'] >= 0.45
