"""Files of the golden detectors: on their images, and on a photo at odd sizes."""

import copy
import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from published_form import empty
from weights_rule import fill

pytest.importorskip('onnxruntime', reason='needs the extra [deploy]')
pytest.importorskip('onnxscript', reason='needs the extra [deploy]')

# Their weights are drawn: rounding alone, as between two forms of the attention in
# PyTorch, moves boxes of the Mask R-CNNs by 0.03 pixel and scores by 2e-4, and by 0.1
# pixel at 33x47, where it is measured.
BOUNDS = {'retinanet': dict(), 'mask_rcnn': dict(pixels=0.1, score=1e-3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'config', 'keys', 'ending'),
    [
        ('retinanet', 'rest_small_fpn_1x_published.py', 'retinanet_rest_small', None),
        (
            'mask_rcnn',
            'rest_small_fpn_1x_published.py',
            'mask_rcnn_rest_small',
            '.onnx',
        ),
        ('mask_rcnn', 'restv2_tiny_fpn_1x.py', 'mask_rcnn_restv2_tiny', None),
    ],
)
def test_golden_file(
    kind, config, keys, ending, repo, data_dir, shared, tmp_path, monkeypatch
):
    """What is exported, and one file of it, which takes a minute to write."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    from mmrest.converters import to_mmdet
    from mmrest.deployment import export
    from mmrest.deployment.verification import (
        check,
        compare_detections,
        scale_picture,
    )

    monkeypatch.syspath_prepend(str(repo / 'tools' / 'deployment'))
    from run_exported import ExportedModel

    register_all_modules(init_default_scope=True)
    shapes = json.loads((data_dir / 'detectron2_checkpoint_keys.json').read_text())
    gains = json.loads((data_dir / 'detector_gains.json').read_text())
    cfg = Config.fromfile(repo / 'configs' / kind / config)
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(to_mmdet(fill(empty(shapes[keys]), gains[kind])).state_dict)
    module = export.exportable(copy.deepcopy(model))

    @torch.no_grad()
    def run(*arrays):
        outputs = module(*map(torch.from_numpy, arrays))
        return {n: x.numpy() for n, x in zip(module.output_names, outputs)}

    if ending:
        metadata = export.describe(module, cfg, {}, config)
        export.write(export.capture(module), tmp_path / f'model{ending}', metadata)
        run = ExportedModel(tmp_path / f'model{ending}').run
    reference = type(module)(model)  # as it was before its norms were folded

    golden = dict(np.load(data_dir / f'golden_{keys}.npz'))
    image = np.ascontiguousarray(golden['image'][None, ..., ::-1])
    size = np.array(image.shape[1:3])
    found = run(image, size)
    if 'masks' in golden:
        masks = np.unpackbits(golden['masks'], axis=-1)[..., : size[1]]
        golden['masks'] = masks.astype(bool)
    bounds = BOUNDS[kind]

    def differing(expected, limit=1):
        pairs, _ = compare_detections(found, expected, 0.05, 100, **bounds)
        return [text for value, text in pairs if value > limit]

    assert not differing(golden)
    photo = np.asarray(Image.open(min((shared / 'data/demo_images').glob('*.jpg'))))
    # the last is larger than the example that a file was captured with
    for shape in ((333, 501), *([(768, 1024)] if ending else [])):
        image, size = scale_picture(photo, shape)[None], np.array([400, 601])
        found = run(image, size)
        assert not differing(reference.predict(image, size)), shape
    image = scale_picture(photo, (33, 47))[None]
    found = run(image, size)
    assert not check(found, reference, image, size)[0]
    assert not differing(reference.predict(image, size), limit=2)
