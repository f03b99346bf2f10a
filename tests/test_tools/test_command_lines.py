"""Command lines with which a run cannot start, and what options do to a config."""

import runpy
import sys

import pytest
from mmengine.config import Config


@pytest.fixture
def tool(repo, monkeypatch, tmp_path):
    """Run a tool within this process, in an empty folder; its message comes back."""

    def run_tool(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(repo / 'tools' / name), run_name='__main__')
        return str(stop.value)

    monkeypatch.chdir(tmp_path)
    return run_tool


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr('mmrest.launch.get_device', lambda: 'cpu')


@pytest.mark.parametrize('name', ['train.py', 'test.py'])
@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        ('configs/none.py', 'no config configs/none.py (looked for in '),
        ('mmrest::mask_rcnn/rest_smal_fpn_1x.py', 'mask_rcnn/rest_small_fpn_1x.py'),
        ('mmnone::a/b.py', 'cannot read the config mmnone::a/b.py'),
        ('mmrest::', 'cannot read the config mmrest::'),
    ],
)
def test_unknown_config(tool, name, config, expected):
    checkpoint = ['x.pth'] if name == 'test.py' else []
    message = tool(name, config, *checkpoint)
    assert message.startswith(f'tools/{name}: ') and expected in message


def test_data_and_weights_are_missing(tool):
    message = tool('train.py', 'mmrest::mask_rcnn/rest_small_fpn_1x.py')
    assert 'rest_small.pth do not exist' in message
    assert 'instances_train2017.json does not exist' in message
    assert 'instances_val2017.json does not exist' in message


def test_checkpoint_is_missing(tool, config):
    message = tool('test.py', config, 'epoch_12.pth')
    assert 'epoch_12.pth does not exist' in message


def test_amp_without_gpu(tool, config, monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    assert '--amp needs a GPU' in tool('train.py', config, '--amp')


def test_auto_scale_lr_without_a_base(tool, config):
    path = config.parent / 'no_base.py'
    path.write_text(f'_base_ = {str(config)!r}\nauto_scale_lr = dict(_delete_=True)\n')
    assert 'base_batch_size=16' in tool('train.py', path, '--auto-scale-lr')


def test_slurm_without_gpus(tool, config, without_gpu):
    message = tool('train.py', config, '--launcher', 'slurm')
    assert '--launcher slurm needs GPUs' in message


def test_out_of_an_unknown_kind(tool, config, trained):
    checkpoint = trained[0] / 'iter_4.pth'
    assert 'ends in .pkl' in tool('test.py', config, checkpoint, '--out', 'a.csv')


def test_show_without_a_hook(tool, config, trained):
    checkpoint = trained[0] / 'iter_4.pth'
    options = ['--cfg-options', 'default_hooks.visualization=None']
    message = tool('test.py', config, checkpoint, '--show-dir', 'x', *options)
    assert 'DetVisualizationHook' in message


@pytest.mark.parametrize(
    ('hook', 'drawn'),
    [
        ('DetVisualizationHook', dict(draw=True, test_out_dir='out')),
        ('SegVisualizationHook', dict(draw=True, interval=1)),
        ('VisualizationHook', dict(enable=True, interval=1, out_dir='out')),
    ],
)
def test_show_dir_in_each_scope(repo, hook, drawn):
    """The hooks of mmdet, mmseg and mmpretrain are told in words of their own."""
    module = runpy.run_path(str(repo / 'tools' / 'test.py'))
    cfg = Config(
        dict(default_hooks=dict(visualization=dict(type=hook)), visualizer=dict())
    )
    args = type('Args', (), dict(show=False, show_dir='out', wait_time=2))
    module['draw'](cfg, args)
    result = cfg.default_hooks.visualization
    assert {key: result[key] for key in drawn} == drawn
    # mmseg's hook leaves the folder to the visualizer, whose backend writes below
    # WORK_DIR/TIME/vis_data; it has none in this config
    backends = cfg.visualizer.get('vis_backends', [])
    expected = [dict(type='LocalVisBackend', img_save_dir='../out')]
    assert backends == (expected if hook == 'SegVisualizationHook' else [])


def test_show_dir_keeps_the_other_backends(repo):
    module = runpy.run_path(str(repo / 'tools' / 'test.py'))
    backends = [dict(type='TensorboardVisBackend'), dict(type='LocalVisBackend')]
    hooks = dict(visualization=dict(type='SegVisualizationHook'))
    cfg = Config(dict(default_hooks=hooks, visualizer=dict(vis_backends=backends)))
    args = type('Args', (), dict(show=False, show_dir='out', wait_time=2))
    module['draw'](cfg, args)
    backends[1]['img_save_dir'] = '../out'
    assert cfg.visualizer.vis_backends == backends
