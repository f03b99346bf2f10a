"""``mmrest::`` in configs, and what importing mmrest changes in the process."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS, init_default_scope

from mmrest.config import config_root, find_config, main, write_config

pytestmark = pytest.mark.usefixtures('no_scope')

# one of each folder
CONFIGS = {
    path.parent: path.relative_to(config_root()).as_posix()
    for path in sorted(config_root().rglob('*.py'))
}.values()
SMALL = dict(
    embed_dims=[64, 128, 256, 512],  # what the necks and heads of `lite` take
    num_heads=[1, 2, 4, 8],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratios=[1, 1, 1, 1],
)


def without_scope(part):
    """Drops the mark that MMEngine leaves on what is inherited from ``mmrest::``."""
    if isinstance(part, dict):
        return {k: without_scope(v) for k, v in part.items() if k != '_scope_'}
    if isinstance(part, (list, tuple)):
        return type(part)(map(without_scope, part))
    return part


def inherit(name, tmp_path, more=''):
    user = tmp_path / 'user.py'
    user.write_text(f"_base_ = 'mmrest::{name}'\n{more}")
    return Config.fromfile(user, import_custom_modules=False)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_base_means_the_same_by_scope_and_by_path(name, tmp_path):
    by_path = Config.fromfile(config_root() / name, import_custom_modules=False)
    by_scope = inherit(name, tmp_path)
    assert without_scope(by_scope.to_dict()) == by_path.to_dict()


@pytest.mark.parametrize(
    ('name', 'toolbox', 'built'),
    [
        ('mask_rcnn/rest_lite_fpn_1x.py', 'mmdet', 'MaskRCNN'),
        ('upernet/rest_lite_upernet_160k_ade20k_512x512.py', 'mmseg', 'EncoderDecoder'),
        ('imagenet/rest_lite_8xb128_in1k.py', 'mmpretrain', 'ImageClassifier'),
    ],
)
@pytest.mark.parametrize('scope', ['set', 'not set'])
def test_inherited_models_are_built_of_their_toolbox(
    name, toolbox, built, scope, tmp_path
):
    pytest.importorskip(toolbox)
    pytest.importorskip('mmdet')  # has a CrossEntropyLoss of its own
    changes = f'arch=dict(_delete_=True, **{SMALL!r}), init_cfg=None'
    cfg = inherit(name, tmp_path, f'model = dict(backbone=dict({changes}))\n')
    assert cfg.model._scope_ == 'mmrest'
    if scope == 'set':
        init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    losses = [m for m in model.modules() if type(m).__name__ == 'CrossEntropyLoss']
    assert type(model).__name__ == built
    assert all(type(loss).__module__.startswith(toolbox) for loss in losses)


@pytest.mark.parametrize('scope', [None, 'mmdet', 'mmrest', 'mmengine'])
def test_names_of_this_package(scope):
    if scope:
        init_default_scope(scope)
    with MODELS.switch_scope_and_registry(None) as registry:
        for name in ('ResT', 'mmrest.ResT', 'mmrest.models.ResT', 'mmengine.ResT'):
            assert registry.get(name).__name__ == 'ResT', name
        assert registry.get('mmrest.Nonsense') is None
    with ROOT_HOOKS.switch_scope_and_registry(None) as registry:
        for name in ('CheckNonFiniteHook', 'mmrest.hooks.CheckNonFiniteHook'):
            assert registry.get(name).__name__ == 'CheckNonFiniteHook', name


def test_modules_of_the_user_with_the_same_name(tmp_path, monkeypatch):
    (tmp_path / 'hooks.py').write_text('raise RuntimeError')
    monkeypatch.syspath_prepend(tmp_path)
    hook = ROOT_HOOKS.build(dict(type='mmrest.hooks.CheckNonFiniteHook'))
    assert type(hook).__name__ == 'CheckNonFiniteHook'


def test_a_name_of_several_toolboxes_without_a_scope():
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    with pytest.raises(KeyError, match='CrossEntropyLoss is in mm.*init_default_scope'):
        MODELS.build(dict(type='CrossEntropyLoss', _scope_='mmrest'))


def test_find_config_with_and_without_scope_and_ending():
    path = Path(find_config('mask_rcnn/rest_small_fpn_1x.py'))
    assert path.is_file()
    for name in ('mask_rcnn/rest_small_fpn_1x', 'mmrest::mask_rcnn/rest_small_fpn_1x'):
        assert find_config(name) == str(path)


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        ('mmrest::mask_rcnn/rest_smal_fpn_1x.py', 'mask_rcnn/rest_small_fpn_1x.py'),
        ('mmrest::no/such/thing.py', 'retinanet/rest_large_fpn_3x.py'),
        ('mmrest::mask_rcnn', 'mask_rcnn/rest_'),
        ('mmrest::', 'mask_rcnn/rest_'),
    ],
)
def test_unknown_config_names_the_ones_there_are(name, hint):
    with pytest.raises(FileNotFoundError, match='mmrest has no config') as info:
        find_config(name)
    assert hint in str(info.value)


def test_whole_config_as_one_file(tmp_path, capsys, monkeypatch, no_layout):
    for module in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):
        monkeypatch.setattr(f'{module}.FormatCode', no_layout, raising=False)
    output = tmp_path / 'my_base.py'
    args = ['mask_rcnn/rest_base_fpn_1x', '--output', str(output)]
    assert main(args) == 0
    text = output.read_text()
    assert '_base_ =' not in text
    assert '\n    backbone=dict(\n' in text
    read = Config.fromfile(output, import_custom_modules=False)
    path = find_config('mask_rcnn/rest_base_fpn_1x')
    by_path = Config.fromfile(path, import_custom_modules=False)
    assert read.to_dict() == by_path.to_dict()

    output.write_text('mine')
    capsys.readouterr()
    assert main(args) == 1
    assert 'exists and is not replaced' in capsys.readouterr().err
    assert output.read_text() == 'mine'
    assert main(['mask_rcnn/rest_bas_fpn_1x', '--output', str(tmp_path / 'x.py')]) == 1
    assert 'Did you mean' in capsys.readouterr().err
    assert main([args[0], '--output', str(tmp_path / 'no' / 'x.py')]) == 1
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, 'No space left on device')
        patch.setattr(os, 'fsync', mock.Mock(side_effect=full))
        assert main([args[0], '--output', str(tmp_path / 'x.py')]) == 1
    assert f"No space left on device: '{tmp_path / 'x.py'}'" in capsys.readouterr().err
    with pytest.raises(ValueError, match='end in .py'):
        write_config(args[0], tmp_path / 'x.yaml')
    assert [path.name for path in tmp_path.iterdir()] == ['my_base.py']


# What a process has before and after: every function of MMEngine that mmrest might be
# tempted to replace, its loaders, the environment, and the handlers of signals.
IMPORT = """
import os, signal, sys
import mmengine.config.config, mmengine.hub, mmengine.runner
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader
import torch

def state():
    modules = [m for n, m in list(sys.modules.items()) if n.startswith('mmengine')]
    places = {id(m): m for m in modules}
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__.startswith('mmengine'):
                places[id(value)] = value
    functions = {
        (str(place), name): value
        for place in places.values()
        for name, value in vars(place).items()
        if callable(value) or isinstance(value, (staticmethod, classmethod))
    }
    return functions, dict(
        loaders=dict(CheckpointLoader._schemes), environ=dict(os.environ),
        handlers=[signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)],
        # a backport that a dependency of mmpretrain uses
        finders=[f for f in sys.meta_path if 'importlib_metadata' not in repr(f)],
        hook=sys.excepthook,
        load=torch.load, packages=dict(MODULE2PACKAGE))

import mmcv.transforms
functions, before = state()
import mmrest
functions_after, after = state()
assert [k for k, v in functions.items() if functions_after.get(k) is not v] == []
added = set(after['packages']) - set(before['packages'])
assert added == {'mmrest'}, added
for name in set(before) - {'packages'}:
    assert after[name] == before[name], name
"""


def test_import_replaces_nothing(repo):
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', IMPORT],
        cwd=repo,
        # PyTorch's compiler has left its folder in the environment of this process
        env={k: v for k, v in os.environ.items() if not k.startswith('TORCH')},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
