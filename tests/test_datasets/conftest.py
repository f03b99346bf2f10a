"""A small data set in COCO format and its config, which a test may damage."""

import json
from pathlib import Path

import pytest
from dirty_files import encode, rgb
from dirty_sandbox import Sandbox
from mmengine.registry import init_default_scope

from mmrest.datasets.preflight import PreflightError, check_config


@pytest.fixture(autouse=True)
def _scope():
    """Leave the registry scope of other tests' configs."""
    init_default_scope('mmdet')


@pytest.fixture
def cfg(tmp_path):
    """Six images to train on, of two objects each, and three to judge by."""
    sandbox = Sandbox(tmp_path)
    for part, name, count in ((sandbox.train, 'train', 6), (sandbox.val, 'val', 3)):
        part.images.clear()
        part.annotations.clear()
        for index in range(count):
            key = part.add_image(f'{name}_{index}.jpg', encode(rgb()))
            part.add_object(key)
            part.add_object(key, category_id=9)
    return sandbox.config()


@pytest.fixture
def dataset(cfg, tmp_path) -> Path:
    """The folder of the data that ``cfg`` names."""
    return tmp_path / 'data'


@pytest.fixture
def finding():
    """The text with which a config is refused."""

    def refused(cfg, stage='train'):
        with pytest.raises(PreflightError) as error:
            check_config(cfg, stage)
        return str(error.value)

    return refused


@pytest.fixture
def edit(dataset):
    """Change an annotation file by a function of its content."""

    def edit_file(change, name='train.json'):
        path = dataset / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit_file
