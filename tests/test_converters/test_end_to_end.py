"""tools/test.py on photographs, against the same weights without mmdet's pipeline."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from published_form import mask_rcnn_inference, preprocess, retinanet_inference
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SHORT, LONG = 240, 400  # smaller than 800/1333, to save time
LEVELS = {'mask_rcnn': range(2, 7), 'retinanet': range(3, 8)}


def resize(path):
    """Read and resize as published: Pillow, shorter side first, then the limit."""
    image = Image.open(path).convert('RGB')
    w, h = image.size
    scale = SHORT / min(h, w)
    new = [scale * h, scale * w]
    if max(new) > LONG:
        new = [side * LONG / max(new) for side in new]
    new_h, new_w = (int(side + 0.5) for side in new)
    resized = image.resize((new_w, new_h), Image.BILINEAR)
    return np.array(resized)[:, :, ::-1].copy(), (h, w)


@torch.no_grad()
def infer(kind, model, state, path):
    """Detections on the image in a file, with no data pipeline."""
    image, output_size = resize(path)
    maps = model.extract_feat(preprocess(image))
    levels = {f'p{level}': x for level, x in zip(LEVELS[kind], maps)}
    run = mask_rcnn_inference if kind == 'mask_rcnn' else retinanet_inference
    return run(levels, state, image.shape[:2], output_size)


def ground_truth(images, found, with_masks):
    """Annotations made of every third detection, moved by two pixels."""
    annotations = []
    for image, result in zip(images, found):
        for i in range(0, len(result['boxes']), 3):
            x0, y0, x1, y1 = (result['boxes'][i] + 2).tolist()
            polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
            annotation = {
                'id': len(annotations) + 1,
                'image_id': image['id'],
                'category_id': int(result['labels'][i]) + 1,
                'bbox': [x0, y0, x1 - x0, y1 - y0],
                'area': (x1 - x0) * (y1 - y0),
                'iscrowd': 0,
                'segmentation': [polygon],
            }
            annotations.append(annotation)
    return annotations


@pytest.fixture(params=['retinanet', 'mask_rcnn'])
def run(request, shared, repo, tmp_path, native, published, call):
    """One run of tools/test.py: all that it wrote, and what to compare it with."""
    from mmdet.datasets import CocoDataset

    kind = request.param
    photos = sorted((shared / 'data/coco_tiny/val2017').glob('*.jpg'))[:2]
    images = []
    for i, path in enumerate(photos, start=1):
        width, height = Image.open(path).size
        images.append(
            {'id': i, 'file_name': path.name, 'width': width, 'height': height}
        )
    state = published(kind, 'small')
    model = native(kind, 'small')
    found = [infer(kind, model, state, path) for path in photos]
    names = CocoDataset.METAINFO['classes']
    annotations = {
        'images': images,
        'annotations': ground_truth(images, found, kind == 'mask_rcnn'),
        'categories': [{'id': i + 1, 'name': name} for i, name in enumerate(names)],
    }
    (tmp_path / 'val.json').write_text(json.dumps(annotations))

    source, checkpoint = tmp_path / 'published.pth', tmp_path / 'converted.pth'
    torch.save({'model': state}, source)
    call('model_converters/detectron2_to_mmdet.py', source, checkpoint, cwd=tmp_path)

    base = repo / 'configs' / kind / 'rest_small_fpn_1x_published.py'
    cfg = Config.fromfile(base)
    cfg.test_dataloader.dataset.pipeline[2].scale = (LONG, SHORT)
    cfg.test_dataloader.num_workers = 0
    cfg.test_dataloader.persistent_workers = False
    cfg.test_dataloader.dataset.update(
        data_root=None,
        ann_file=str(tmp_path / 'val.json'),
        data_prefix={'img': str(photos[0].parent)},
    )
    cfg.test_evaluator.ann_file = str(tmp_path / 'val.json')
    cfg.dump(tmp_path / 'config.py')
    options = ['--work-dir', 'work', '--out', 'out.json']
    call('test.py', 'config.py', checkpoint, *options, cwd=tmp_path)
    (scalars,) = (tmp_path / 'work').glob('*/*.json')
    printed = json.loads(scalars.read_text().splitlines()[-1])
    return kind, found, printed, tmp_path


def average_precision(annotations, results, kind):
    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.slow
def test_detections_and_ap(run, call):
    kind, found, printed, folder = run
    written = json.loads((folder / 'out.bbox.json').read_text())
    for number, expected in enumerate(found, start=1):
        mine = [box for box in written if box['image_id'] == number]
        boxes = torch.tensor([box['bbox'] for box in mine])
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([box['category_id'] for box in mine]) - 1
        scores = torch.tensor([box['score'] for box in mine])
        assert len(boxes) == len(expected['boxes']) > 50
        assert torch.equal(labels, expected['labels'])
        torch.testing.assert_close(boxes, expected['boxes'], rtol=0, atol=2e-3)
        torch.testing.assert_close(scores, expected['scores'], rtol=0, atol=1e-5)

    ap = average_precision(folder / 'val.json', folder / 'out.bbox.json', 'bbox')
    assert 0.05 < ap < 1
    assert printed['coco/bbox_mAP'] == pytest.approx(ap, abs=6e-4)  # three digits
    figures = {'box AP': 100 * printed['coco/bbox_mAP']}

    if kind == 'mask_rcnn':
        masks = json.loads((folder / 'out.segm.json').read_text())
        for number, expected in enumerate(found, start=1):
            mine = [m['segmentation'] for m in masks if m['image_id'] == number]
            decoded = torch.from_numpy(mask_utils.decode(mine)).permute(2, 0, 1).bool()
            differ = (decoded != expected['masks']).float().mean((1, 2))
            assert differ.max() <= 5e-4
        ap = average_precision(folder / 'val.json', folder / 'out.segm.json', 'segm')
        assert printed['coco/segm_mAP'] == pytest.approx(ap, abs=6e-4)
        return

    # The same figures, given to tools/check_results.py as the expected ones.
    config = folder / 'config.py'
    own = {'metrics': figures, 'tolerance': 0.1, 'kind': 'figures made by this test'}
    config.write_text(config.read_text() + f'\nexpected_results = {own}\n')
    options = ['--work-dir', 'work2']
    out = call('check_results.py', 'config.py', 'converted.pth', *options, cwd=folder)
    assert 'compared with figures made by this test (the config)' in out
    assert f'box AP: {figures["box AP"]:.1f}' in out and 'agrees' in out
