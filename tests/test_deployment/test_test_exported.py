"""tools/deployment/test_exported.py: the metrics of a file, on a small data set."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('onnxruntime', reason='needs the extra [deploy]')

TOOL = 'deployment/test_exported.py'
CONFIG = """
_base_ = 'mmrest::retinanet/rest_lite_fpn_1x.py'
model = dict(bbox_head=dict(num_classes=3))
test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root={root!r},
        ann_file='test.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=('red', 'green', 'blue')),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(48, 32), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(
                type='PackDetInputs',
                meta_keys=(
                    'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'
                ),
            ),
        ],
    ),
)
test_evaluator = dict(ann_file={root!r} + '/test.json')
"""


@pytest.fixture
def config(tmp_path):
    """Pictures of one colour, the name of their class, with a box in each."""
    images, annotations = [], []
    for key, (width, height) in enumerate(((96, 64), (40, 72), (64, 64)), 1):
        colour = np.eye(3, dtype=np.uint8)[key - 1] * 200
        pixels = np.broadcast_to(colour, (height, width, 3))
        Image.fromarray(pixels).save(tmp_path / f'{key}.png')
        images.append(dict(id=key, file_name=f'{key}.png', width=width, height=height))
        box = [width / 4, height / 2, width / 2, height / 2]
        annotations.append(
            dict(
                id=key,
                image_id=key,
                category_id=key,
                bbox=box,
                area=box[2] * box[3],
                iscrowd=0,
            )
        )
    names = ('red', 'green', 'blue')
    categories = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (tmp_path / 'test.json').write_text(json.dumps(content))
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.format(root=str(tmp_path)))
    return path


def test_it_finds_every_object(call, config, colour_detector, tmp_path, metrics):
    """Boxes lie in the picture, not in the resized one, and pixels are RGB."""
    file = colour_detector(('red', 'green', 'blue'))
    call(TOOL, config, file, '--work-dir', tmp_path / 'work', cwd=tmp_path)
    found = metrics(tmp_path / 'work')
    assert found['coco/bbox_mAP'] == found['coco/bbox_mAP_75'] == 1.0


def test_what_it_refuses(call, config, colour_detector, tmp_path):
    def fails(file, *options):
        options = (*options, '--work-dir', tmp_path / 'work')
        output = call(TOOL, config, file, *options, cwd=tmp_path, fails=True)
        assert 'Traceback' not in output
        return output

    file = colour_detector(('red', 'blue', 'green'))
    output = fails(file)
    assert 'for the classes red, blue, green' in output and 'red, green, blue' in output
    assert 'use an .xml file' in fails(file, '--precision', 'bfloat16')
    assert 'no file' in fails(tmp_path / 'none.onnx')
