"""Annotations: used, skipped and counted, or refused by number."""

import json
import re

import numpy as np
import pytest
from dirty_files import (
    BOX,
    HEIGHT,
    IGNORED,
    SKIPPED,
    TWO_POINTS,
    WIDTH,
    encode,
    polygon,
    rgb,
)
from pycocotools import mask as coco_mask

from mmrest.datasets.preflight import PreflightError, check_config
from mmrest.datasets.preflight.masks import mask_fault

NAN, INFINITE = float('nan'), float('inf')


def text_of(report):
    return ' '.join(text for _, text in report)


def one_more(sandbox, split='train', **fields):
    """A second image with one annotation; returns its id."""
    part = sandbox.part(split)
    key = part.add_image('second.jpg', encode(rgb()))
    part.add_object(key, **fields)
    return key


def rle(counts, size=(HEIGHT, WIDTH)):
    return dict(size=list(size), counts=counts)


def compressed(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=list(code['size']), counts=code['counts'].decode())


@pytest.mark.parametrize('case', SKIPPED)
def test_skipped_in_training(sandbox, build, case):
    fields, note = SKIPPED[case]
    key = one_more(sandbox, **fields)
    cfg = sandbox.config()
    report = text_of(check_config(cfg))
    assert re.search(f'{note}.* and are skipped', report)
    assert '1 images have annotations that are all skipped or ignored' in report
    dataset = build(cfg, 'train')
    samples = {data['data_samples'].img_id: data['data_samples'] for data in dataset}
    assert len(samples) == 2  # the image stays, without objects
    assert len(samples[key].gt_instances) == len(samples[key].ignored_instances) == 0


@pytest.mark.parametrize('case', SKIPPED)
def test_skipped_in_validation(sandbox, build, case):
    fields, note = SKIPPED[case]
    key = one_more(sandbox, 'val', **fields)
    cfg = sandbox.config()
    report = text_of(check_config(cfg))
    assert re.search(f'{note}.* are skipped; the metric counts all these', report)
    samples = {data['data_samples'].img_id for data in build(cfg, 'val')}
    assert key in samples and len(samples) == 2


@pytest.mark.parametrize('case', IGNORED)
def test_ignored_in_training(sandbox, build, case):
    segmentation, note = IGNORED[case]
    key = one_more(sandbox, segmentation=segmentation)
    cfg = sandbox.config()
    report = text_of(check_config(cfg))
    assert note in report and 'all skipped or ignored' in report
    samples = [data['data_samples'] for data in build(cfg, 'train')]
    sample = next(sample for sample in samples if sample.img_id == key)
    assert len(sample.gt_instances) == 0 and len(sample.ignored_instances) == 1


def test_a_short_polygon_beside_a_whole_one(sandbox, build):
    key = one_more(sandbox, segmentation=[polygon(), [1, 1]])
    one_more(sandbox, 'val', segmentation=[polygon(), [1, 1]])
    cfg = sandbox.config()
    assert 'polygon' not in text_of(check_config(cfg))
    samples = [data['data_samples'] for data in build(cfg, 'train')]
    sample = next(sample for sample in samples if sample.img_id == key)
    assert len(sample.gt_instances) == 1 and len(sample.ignored_instances) == 0


@pytest.mark.parametrize('segmentation', [TWO_POINTS, [[1, 1]], [[]]])
def test_polygons_at_which_the_metric_fails(sandbox, build, segmentation):
    one_more(sandbox, 'val', segmentation=segmentation)
    cfg = sandbox.config()
    with pytest.raises(PreflightError, match='mask metric fails: annotation 2'):
        check_config(cfg)
    # the reason for the check: at the end of a validation, and without a name
    with pytest.raises((TypeError, Exception), match='bb|not supported'):
        coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH)


def test_boxes_beyond_the_border_are_cut(sandbox, build):
    key = one_more(sandbox, bbox=[80, 30, 60, 60])
    cfg = sandbox.config()
    assert '1 boxes reach beyond their image and are cut' in text_of(check_config(cfg))
    data = next(
        data for data in build(cfg, 'train') if data['data_samples'].img_id == key
    )
    height, width = data['data_samples'].img_shape
    x1, y1, x2, y2 = data['data_samples'].gt_instances.bboxes.tensor[0].tolist()
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(bbox=[NAN, 5, 9, 9], area=9), 'bbox of annotation 2 is [nan, 5, 9, 9]'),
        (dict(bbox=[5, 5, NAN, 9], area=9), 'bbox of annotation 2'),
        (dict(bbox=[5, 5, INFINITE, 9], area=9), 'bbox of annotation 2'),
        (dict(bbox=[5, 5, '9', 9], area=9), 'bbox of annotation 2'),
        (dict(area=NAN), 'area of annotation 2 is nan'),
        (dict(area=None), 'area of annotation 2 is None'),
        (dict(segmentation=...), '1 annotations without segmentation'),
        (dict(segmentation=[]), '1 annotations without segmentation'),
        (dict(segmentation=[[1, 1, 9, 1, NAN, 9]]), 'annotation 2 (a coordinate is N'),
        (dict(segmentation=[[1, 1, 9, 1, 1e9, 9]]), 'annotation 2 (a coordinate is N'),
        (dict(segmentation=[[1, 1, 9, 1, 'x', 9]]), 'a coordinate is no number'),
        (dict(segmentation=polygon()), 'neither a list of polygons nor RLE'),
        (dict(category_id=77), '1 annotations of categories that it does not list'),
        (dict(image_id=77), '1 annotations of images that it does not list'),
        (dict(iscrowd=1, segmentation=rle([0, 5])), 'run lengths for 5 of 6144 pix'),
        (dict(iscrowd=1, segmentation=rle([0, 9999])), 'for 9999 of 6144'),
        (dict(iscrowd=1, segmentation=rle([-5, 6149])), 'cannot be read'),
        (dict(iscrowd=1, segmentation=rle([0, 6144], [WIDTH, HEIGHT])), 'RLE of size'),
        (dict(iscrowd=1, segmentation=rle('PPYo0')), 'annotation 2'),
        (dict(iscrowd=1, segmentation=rle('~~~~')), 'cannot be read'),
        (dict(iscrowd=1, segmentation=rle('')), 'for 0 of 6144'),
        (dict(iscrowd=1, segmentation=rle(None)), 'cannot be read'),
    ],
)
def test_refused(sandbox, split, fields, message):
    part = sandbox.part(split)
    key = part.add_image('second.jpg', encode(rgb()))
    part.add_object(key, **{'bbox': BOX, **fields})
    with pytest.raises(PreflightError) as error:
        check_config(sandbox.config())
    assert message in str(error.value)
    assert f'{split}.json' in str(error.value)


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (dict(width=0), 'image 7 is 0x64 pixels'),
        (dict(width='96'), "image 7 is '96'x64 pixels"),
        (dict(height=None), 'image 7 is 96xNone pixels'),
        (dict(file_name=5), 'image 7 is named 5'),
    ],
)
def test_refused_images(sandbox, image, message):
    sound = dict(id=7, file_name='x.jpg', width=WIDTH, height=HEIGHT)
    sandbox.train.images.append({**sound, **image})
    with pytest.raises(PreflightError, match=message):
        check_config(sandbox.config())


def test_categories_that_are_no_class(sandbox, build):
    """Refused, or skipped and counted if that is wanted."""
    key = one_more(sandbox, category_id=9)
    cfg = sandbox.config()
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo.classes = ('box',)
    cfg.model.roi_head.bbox_head.num_classes = 1
    cfg.model.roi_head.mask_head.num_classes = 1
    with pytest.raises(PreflightError, match='1 annotations of categories that'):
        check_config(cfg)
    cfg.preflight.unused_categories = True
    report = text_of(check_config(cfg))
    assert '1 annotations are of categories that are no class' in report
    assert '1 images have no annotation of the classes and are left out' in report
    assert key not in {data['data_samples'].img_id for data in build(cfg, 'train')}


@pytest.mark.parametrize('filter_empty', [True, False])
def test_empty_images(sandbox, build, filter_empty):
    empty = sandbox.train.add_image('empty.jpg', encode(rgb()))
    in_val = sandbox.val.add_image('empty.jpg', encode(rgb()))
    cfg = sandbox.config()
    cfg.train_dataloader.dataset.filter_cfg.filter_empty_gt = filter_empty
    done = 'left out' if filter_empty else 'trained on as background'
    note = f'1 images have no annotation of the classes and are {done}'
    assert note in text_of(check_config(cfg))
    keys = {data['data_samples'].img_id for data in build(cfg, 'train')}
    assert (empty in keys) is not filter_empty
    assert in_val in {data['data_samples'].img_id for data in build(cfg, 'val')}


@pytest.mark.parametrize('form', ['polygon', 'uncompressed', 'compressed'])
def test_crowd_only_images(sandbox, build, form):
    mask = np.zeros((HEIGHT, WIDTH))
    mask[8:32, 60:88] = 1
    runs = [60 * HEIGHT + 8, 24] + [HEIGHT - 24, 24] * 27 + [32 + 8 * HEIGHT]
    crowd = dict(
        polygon=[polygon()], uncompressed=rle(runs), compressed=compressed(mask)
    )[form]
    key = one_more(sandbox, iscrowd=1, segmentation=crowd)
    one_more(sandbox, 'val', iscrowd=1, segmentation=crowd)
    cfg = sandbox.config()
    report = text_of(check_config(cfg))
    assert '1 crowd regions are no objects to learn' in report
    assert '1 images only have crowd regions and are trained on as back' in report
    samples = [data['data_samples'] for data in build(cfg, 'train')]
    sample = next(sample for sample in samples if sample.img_id == key)
    assert len(sample.gt_instances) == 0 and len(sample.ignored_instances) == 1
    for data in build(cfg, 'val'):
        instances = data['data_samples'].gt_instances
        ignored = data['data_samples'].ignored_instances
        masks = (ignored if len(ignored) else instances).masks.masks
        assert (masks[0] == mask).mean() > 0.97


def test_run_lengths_are_read_as_by_pycocotools():
    rng = np.random.default_rng(0)
    for size in [(1, 1), (7, 5), (64, 96), (300, 211)]:
        for share in (0.0, 0.01, 0.5, 1.0):
            code = compressed(rng.random(size) < share)
            image = dict(height=size[0], width=size[1])
            assert mask_fault(code, image) is None
            wrong = dict(code, counts=code['counts'] + '1')
            assert 'run lengths' in mask_fault(wrong, image)


def test_the_counts_of_a_mixture(sandbox):
    """Every reason once more than the one before it."""
    fields = [case for case, _ in SKIPPED.values()]
    key = sandbox.train.images[0]['id']
    for repeats, case in enumerate(fields, 1):
        for _ in range(repeats):
            sandbox.train.add_object(key, **case)
    report = text_of(check_config(sandbox.config()))
    for expected in (
        '6 boxes have no width or height',  # 1 + 2 + 3
        '9 boxes lie outside',  # 4 + 5
        '6 annotations have an area of 0',
        '7 boxes are narrower',
        '8 annotations are marked',
    ):
        assert expected in report
    assert 'images have' not in report  # its one image keeps its sound object
    content = json.loads((sandbox.folder / 'data' / 'train.json').read_text())
    assert f'train: 1 images, {len(content["annotations"])} annotations' in report
