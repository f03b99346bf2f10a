"""A real run over a folder in which every kind of dirt is mixed."""

import json
import math
import re

import pytest
from dirty_files import IGNORED, REFUSED, SKIPPED, USED, encode, polygon, rgb


def dump(sandbox, change=None):
    """Write the config that the tool is given."""
    cfg = sandbox.config()
    cfg.val_evaluator.outfile_prefix = str(sandbox.folder / 'predictions')
    if change:
        change(cfg)
    path = sandbox.folder / 'mixed.py'
    cfg.dump(path)
    return path


def mix(sandbox):
    """All that is used, skipped or ignored, in both splits."""
    large = (3000, 500, 1500, 1600)
    content = encode(rgb(width=5000, height=4000, box=large))
    for part in (sandbox.train, sandbox.val):
        for name, make in USED.values():
            part.add_object(part.add_image(name, make()))
        sound = part.images[0]['id']
        for fields, _ in SKIPPED.values():
            part.add_object(sound, **fields)
        crowd = part.add_image('crowd.jpg', encode(rgb()))
        part.add_object(crowd, iscrowd=1)
        part.add_image('empty.jpg', encode(rgb()))
        lost = part.add_image('lost.jpg', encode(rgb()))
        part.add_object(lost, bbox=(5, 5, 0, 9))
        pixel = part.add_image('pixel.png', encode(rgb(width=1, height=1), 'PNG'), 1, 1)
        part.add_object(pixel, (0, 0, 1, 1), segmentation=[polygon((0, 0, 1, 1))])
        twenty = part.add_image('twenty.jpg', content, 5000, 4000)
        part.add_object(twenty, large, segmentation=[polygon(large)])
    for segmentation, _ in IGNORED.values():  # in validation they are refused
        sandbox.train.add_object(lost, segmentation=segmentation)
    sandbox.train.add_object(sound, bbox=(80, 30, 60, 60))


TRAIN = (
    '4 boxes have no width or height, or a negative one and are skipped',
    '2 boxes lie outside of their image and are skipped',
    '1 annotations have an area of 0 or less and are skipped',
    '1 boxes are narrower or lower than a pixel and are skipped',
    '1 annotations are marked "ignore" and are skipped',
    '4 objects have no polygon of three points or more, and are ignored',
    '1 crowd regions are no objects to learn',
    '1 boxes reach beyond their image and are cut at its border',
    '1 images have no annotation of the classes and are left out',
    '1 images only have crowd regions and are trained on as background',
    '1 images have annotations that are all skipped or ignored, and are trained on as',
    '5 of 24 decoded images have an EXIF orientation, which is applied',
    '1 of 24 decoded images are grey;',
    '1 of 24 decoded images are CMYK',
    '1 of 24 decoded images are of more than 8 bits',
    '1 of 24 decoded images are of a palette',
)
VAL = (*TRAIN[:5], 'the metric counts all these', *TRAIN[11:])


@pytest.mark.slow
def test_a_run_over_all_of_it(sandbox, call, tmp_path):
    mix(sandbox)
    path = dump(
        sandbox, lambda cfg: cfg.train_cfg.update(max_iters=14, val_interval=14)
    )
    output = call('train.py', path, '--work-dir', 'run', cwd=tmp_path)
    (log,) = (tmp_path / 'run').glob('*/*.log')
    log = log.read_text()
    for split, texts in (('train', TRAIN), ('val', VAL)):
        (line,) = re.findall(rf'WARNING - {split}_dataloader.dataset: (.*)', log)
        for text in texts:
            assert text in line
    assert 'Preflight passed. train: 24 images, 36 annotations, 2 classes' in log
    assert 'Preflight passed' in output
    # it went on to the end, with finite losses
    losses = [float(value) for value in re.findall(r'  loss: (\S+)', log)]
    assert len(losses) == 14 and all(map(math.isfinite, losses))
    assert 'coco/bbox_mAP' in log and 'coco/segm_mAP' in log
    # each image of the validation was judged under its own number
    sizes = {x['id']: (x['width'], x['height']) for x in sandbox.val.images}
    for kind in ('bbox', 'segm'):
        found = json.loads((tmp_path / f'predictions.{kind}.json').read_text())
        assert {item['image_id'] for item in found} == set(sizes)
        for item in found:
            x, y, width, height = item['bbox']
            limit = sizes[item['image_id']]
            assert -1 < x and x + width < limit[0] + 1
            assert -1 < y and y + height < limit[1] + 1
            if kind == 'segm':
                assert item['segmentation']['size'] == list(limit[::-1])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['small-copy', 'cut-jpeg', 'missing'])
def test_a_run_stops_with_the_name(sandbox, finish, kind):
    """Past the check before the run, in a worker process of the loader."""
    name, content = REFUSED[kind]
    sandbox.train.add_object(sandbox.train.add_image(name, content()))

    def two_processes(cfg):
        cfg.train_dataloader.num_workers = 1

    path = dump(sandbox, two_processes)
    output = finish('train.py', path, '--no-preflight', fails=True)
    assert re.search(rf'Error: .*{re.escape(name)}', output)
    assert name in output.strip().splitlines()[-1]
