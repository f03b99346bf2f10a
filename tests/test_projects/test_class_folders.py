"""Class folders from data in COCO format, and the config that trains on them."""

import functools
import json

import pytest
from mmengine.config import Config
from PIL import Image


@pytest.fixture
def cut(call, tmp_path):
    return functools.partial(
        call, '../projects/demo/class_folders.py', 'out', cwd=tmp_path
    )


def test_own_data(cut, tmp_path):
    boxes = [[10, 10, 40, 20], [60, 50, 5, 30], [0, 0, 30, 30], [50, 30, 20, 30]]
    annotations = [
        dict(id=i + 1, image_id=1 + i % 2, category_id=7 + i // 2, bbox=box)
        for i, box in enumerate(boxes)
    ]
    content = dict(
        images=[dict(id=1, file_name='a.png'), dict(id=2, file_name='b.png')],
        annotations=[*annotations, dict(annotations[0], id=9, iscrowd=1)],
        categories=[dict(id=7, name='nut'), dict(id=8, name='fig')],
    )
    (tmp_path / 'ann.json').write_text(json.dumps(content))
    for name, colour in (('a', 'red'), ('b', 'blue')):
        Image.new('RGB', (100, 80), colour).save(tmp_path / f'{name}.png')
    options = ['--images', '.', '--annotations', 'ann.json', '--val-share', '0.5']
    cut(*options)
    found = {str(p.relative_to(tmp_path / 'out')) for p in tmp_path.rglob('out/*/*/*')}
    # the second box is too narrow, the crowd is no single object
    assert found == {
        'train/nut/000001.png',
        'train/fig/000003.png',
        'val/fig/000004.png',
    }
    with Image.open(tmp_path / 'out/train/nut/000001.png') as cut_out:
        assert cut_out.size == (52, 52)  # 1.3 of the longer side
        assert cut_out.getpixel((26, 26)) == (255, 0, 0)
    before = sorted(tmp_path.rglob('*'))
    assert 'not empty' in cut(*options, fails=True)
    assert 'or neither' in cut('--images', '.', fails=True)
    assert sorted(tmp_path.rglob('*')) == before


def test_the_config_has_the_classes_of_the_fruit(repo):
    from fruitset.coco import CLASSES

    cfg = Config.fromfile(repo / 'configs' / 'ablation' / 'fruit_minutes.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert loader.dataset.metainfo.classes == tuple(sorted(CLASSES))
    assert cfg.model.head.num_classes == len(CLASSES)
