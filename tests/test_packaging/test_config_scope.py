"""``mmrest::`` in configs, within a process that has imported mmrest."""

from pathlib import Path

import pytest
from mmengine.config import Config

from mmrest.config import config_root, find_config, register_config_scope

CONFIGS = sorted(
    path.relative_to(config_root()).as_posix()
    for path in config_root().rglob('*.py')
    if path.parent != config_root()
)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_base_means_the_same_by_scope_and_by_path(name, tmp_path):
    user = tmp_path / 'user.py'
    user.write_text(f"_base_ = 'mmrest::{name}'\n")
    by_scope = Config.fromfile(user, import_custom_modules=False)
    by_path = Config.fromfile(config_root() / name, import_custom_modules=False)
    assert by_scope.to_dict() == by_path.to_dict()


def test_several_bases_of_several_projects(tmp_path):
    user = tmp_path / 'user.py'
    user.write_text(
        "_base_ = ['mmdet::_base_/datasets/coco_detection.py', "
        "'mmrest::mask_rcnn/../_base_/default_runtime.py']\n"
    )
    cfg = Config.fromfile(user, import_custom_modules=False)
    assert cfg.default_scope == 'mmdet'
    assert cfg.data_root == 'data/coco/'


def test_find_config_with_and_without_scope():
    path = Path(find_config('mask_rcnn/rest_small_fpn_1x.py'))
    assert path.is_file()
    assert find_config('mmrest::mask_rcnn/rest_small_fpn_1x.py') == str(path)


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        ('mmrest::mask_rcnn/rest_smal_fpn_1x.py', 'mask_rcnn/rest_small_fpn_1x.py'),
        ('mmrest::mask_rcnn/rest_small_fpn_1x', 'mask_rcnn/rest_small_fpn_1x.py'),
        ('mmrest::no/such/thing.py', 'retinanet/rest_large_fpn_3x.py'),
        ('mmrest::mask_rcnn', 'mask_rcnn/rest_'),
        ('mmrest::', 'mask_rcnn/rest_'),
    ],
)
def test_unknown_config_names_the_ones_there_are(name, hint, tmp_path):
    with pytest.raises(FileNotFoundError, match='mmrest has no config') as info:
        find_config(name)
    assert hint in str(info.value)
    user = tmp_path / 'user.py'
    user.write_text(f'_base_ = {name!r}\n')
    with pytest.raises(FileNotFoundError, match='mmrest has no config'):
        Config.fromfile(user)


def test_registering_again_changes_nothing():
    before = Config._get_cfg_path
    register_config_scope()
    assert Config._get_cfg_path is before
