"""Files of configs/_base_ on their own, and the names that a type may have."""

import subprocess
import sys
from importlib import import_module

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

BASES = [
    ('mask_rcnn_rest_tiny_fpn', 'mmdet'),
    ('retinanet_rest_lite_fpn', 'mmdet'),
    ('semantic_fpn_rest_lite', 'mmseg'),
    ('upernet_rest_lite', 'mmseg'),
    ('classifier_rest_small', 'mmpretrain'),
]
BUILD = """
import sys
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

for path, scope in zip(sys.argv[1::2], sys.argv[2::2]):
    cfg = Config.fromfile(path)
    init_default_scope(scope)
    model = cfg.model
    model.backbone.init_cfg = None
    assert type(MODELS.build(model).backbone).__name__ == 'ResT'
print('built')
"""


@pytest.mark.slow
def test_models_are_built_where_nothing_imports_mmrest(repo, tmp_path):
    """As in a config of another project, with that project's tools."""
    folder, words = repo / 'configs/_base_/models', []
    for name, scope in BASES:
        path = tmp_path / f'{name}.py'
        path.write_text(f'_base_ = {str(folder / (name + ".py"))!r}\n')
        words += [str(path), scope]
    done = subprocess.run(
        [sys.executable, '-c', BUILD, *words], capture_output=True, text=True
    )
    assert done.stdout.endswith('built\n'), done.stderr


@pytest.mark.parametrize(('name', 'scope'), BASES)
def test_models_import_mmrest(repo, name, scope):
    cfg = Config.fromfile(repo / 'configs/_base_/models' / f'{name}.py')
    assert cfg.custom_imports.imports == ['mmrest']


@pytest.mark.parametrize('name', ['default_runtime', 'default_runtime_seg'])
def test_hooks_of_a_runtime_need_no_import(repo, name):
    """With another backbone nothing else imports mmrest."""
    cfg = Config.fromfile(repo / 'configs/_base_' / f'{name}.py')
    assert 'custom_imports' not in cfg
    hooks = [*cfg.custom_hooks, cfg.default_hooks.checkpoint]
    assert all(hook.type.startswith('mmrest.hooks.') for hook in hooks)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain', 'mmengine'])
def test_names_of_rest(scope):
    registry = import_module(f'{scope}.registry').MODELS
    names = ['ResT', 'mmrest.ResT', 'mmengine.ResT', f'{scope}.ResT', 'mmdet.ResT']
    with DefaultScope.overwrite_default_scope(scope):
        assert {registry.get(name).__name__ for name in names} == {'ResT'}
