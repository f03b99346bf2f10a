"""Command lines with which a run cannot start, and what options do to a config."""

import re

import pytest
from mmengine.config import Config

from mmrest import launch


@pytest.fixture
def tool(call, tmp_path):
    """Run a tool that fails, in an empty folder; its message comes back."""

    def run_tool(name, *args):
        output = call(name, *args, cwd=tmp_path, fails=True)
        return output[output.index(f'tools/{name}: ') :]

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
    assert expected in message


@pytest.mark.parametrize(
    ('name', 'content', 'expected'),
    [
        ('c.py', 'model = dict(', r"'\(' was never closed \(.*line 1\)"),
        ('c.py', "_base_ = './none.py'", r'No such file.*none\.py'),
        ('c.py', "_base_ = ['mmrest::none/a.py']", r'none/a\.py" does not exist'),
        (
            'c.py',
            "custom_imports = dict(imports=['none'])",
            'Failed to import custom modules',
        ),
        (
            'c.py',
            "a = 1\nx = {}['k']",
            r"KeyError: k, in .*c\.py, line 2: x = {}\['k'\]",
        ),
        ('c.py', 'x = 1 / 0', r'ZeroDivisionError: division.*c\.py, line 1'),
        ('c.py', 'x = unknown', r"NameError: .*'unknown'.*c\.py, line 1"),
        (
            'c.py',
            "_base_ = 'mmrest::retinanet/rest_small_fpn_1x.py'\n"
            'model = dict(backbone=dict(arch=dict(depths=1)))',
            'arch is a dict in the child config but is of type .*_delete_=True',
        ),
        ('c.yaml', 'model: [', 'parsing a flow node'),
        ('c.json', '{"model": ', 'Expecting value'),
        ('c.pth', 'PK', 'Only py/'),
        ('c.py', 'x = 1', r'c\.py has no model, but None'),
    ],
)
def test_what_is_no_config(tool, tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    message = tool('test.py', tmp_path / name, 'x.pth')
    assert 'Traceback' not in message and re.search(expected, message), message


@pytest.mark.parametrize(
    ('option', 'expected'),
    [
        ('x.pth', "'x.pth' is no KEY=VALUE"),
        ('test_dataloader.dataset.pipeline.99.type=X', 'Index 99 exceeds the length'),
        ('test_dataloader.dataset.pipeline.a.type=X', 'list indices must be integers'),
        ('model=3', 'has no model, but 3'),
        ('custom_hooks=[dict(type=EMAHook)]', 'a dict cannot be a value'),
        ("model.neck={'type': 'FPN'}", 'a dict cannot be a value'),
        ('model.neck.in_channels=[(1, 2]', 'brackets do not match'),
    ],
)
def test_options_that_do_not_fit(call, tmp_path, config, option, expected):
    arguments = [config, 'x.pth', '--cfg-options', option]
    output = call('test.py', *arguments, cwd=tmp_path, fails=True)
    assert expected in output and 'Traceback' not in output


def test_options_set_fields_of_what_is_none(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('model = dict(a=None, b=[dict(c=None)])\nload_from = None')
    options = {'model.a.x.y': 1, 'model.b.0.c.z': 2, 'load_from': 'x', 'model.d.e': 3}
    cfg = launch.load_config(str(path), options)
    assert cfg.model == dict(a=dict(x=dict(y=1)), b=[dict(c=dict(z=2))], d=dict(e=3))


def test_data_and_weights_are_missing(tool):
    message = tool('train.py', 'mmrest::mask_rcnn/rest_small_fpn_1x.py')
    assert 'rest_small.pth do not exist' in message
    assert 'instances_train2017.json does not exist' in message
    assert 'instances_val2017.json does not exist' in message


def test_checkpoint_is_missing(tool, config):
    message = tool('test.py', config, 'epoch_12.pth')
    assert 'epoch_12.pth does not exist' in message


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


@pytest.mark.parametrize('toolbox, extra', list(launch.EXTRAS.items()))
def test_the_extra_is_named(monkeypatch, repo, toolbox, extra):
    cfg = Config(dict(default_scope=toolbox))
    launch.check_toolbox(cfg, 'my_config.py')
    find_spec = launch.find_spec
    monkeypatch.setattr(
        launch, 'find_spec', lambda name: None if name == toolbox else find_spec(name)
    )
    with pytest.raises(launch.LaunchError) as error:
        launch.check_toolbox(cfg, 'my_config.py')
    message = str(error.value)
    assert f'my_config.py needs {toolbox}' in message
    assert f"pip install 'mmrest[{extra}]'" in message
    assert (repo / 'requirements' / f'{extra}.txt').is_file()


def test_configs_without_a_toolbox_pass():
    launch.check_toolbox(Config(dict()), 'my_config.py')
