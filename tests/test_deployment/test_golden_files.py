"""Files of the golden detectors: on their images, and on a photo at odd sizes."""

import copy
import json

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from published_form import empty
from weights_rule import fill

pytest.importorskip('onnxruntime', reason='needs the extra [deploy]')
pytest.importorskip('onnxscript', reason='needs the extra [deploy]')

# Their weights are drawn: rounding alone, as between two forms of the attention in
# PyTorch, moves boxes of the Mask R-CNNs by 0.02 pixel and scores by 2e-4 at 33x47.
BOUNDS = {'retinanet': dict(), 'mask_rcnn': dict(pixels=0.1, score=1e-3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'config', 'keys'),
    [
        ('retinanet', 'rest_small_fpn_1x_published.py', 'retinanet_rest_small'),
        ('mask_rcnn', 'rest_small_fpn_1x_published.py', 'mask_rcnn_rest_small'),
        ('mask_rcnn', 'restv2_tiny_fpn_1x.py', 'mask_rcnn_restv2_tiny'),
    ],
)
def test_golden_file(kind, config, keys, repo, data_dir, shared, tmp_path, monkeypatch):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    from mmrest.converters import to_mmdet
    from mmrest.deployment import export
    from mmrest.deployment.verification import compare_detections, scale_picture

    monkeypatch.syspath_prepend(str(repo / 'tools' / 'deployment'))
    from run_exported import ExportedModel

    register_all_modules(init_default_scope=True)
    shapes = json.loads((data_dir / 'detectron2_checkpoint_keys.json').read_text())
    gains = json.loads((data_dir / 'detector_gains.json').read_text())
    cfg = Config.fromfile(repo / 'configs' / kind / config)
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(to_mmdet(fill(empty(shapes[keys]), gains[kind])).state_dict)
    module = export.exportable(copy.deepcopy(model))
    metadata = export.describe(module, cfg, {}, config)
    export.write(export.capture(module), tmp_path / 'model.onnx', metadata)
    exported = ExportedModel(tmp_path / 'model.onnx')
    module.model = model  # as it was before its norms were folded

    golden = dict(np.load(data_dir / f'golden_{keys}.npz'))
    image = np.ascontiguousarray(golden['image'][None, ..., ::-1])
    size = np.array(image.shape[1:3])
    found = exported.run(image, size)
    if 'masks' in golden:
        masks = np.unpackbits(golden['masks'], axis=-1)[..., : size[1]]
        golden['masks'] = masks.astype(bool)
    bounds = BOUNDS[kind]
    problem, _ = compare_detections(found, golden, 0.05, 100, **bounds)
    assert not problem
    photo = np.asarray(Image.open(min((shared / 'data/demo_images').glob('*.jpg'))))
    for shape in ((333, 501), (33, 47), (768, 1024)):
        image, size = scale_picture(photo, shape)[None], np.array([400, 601])
        found, expected = exported.run(image, size), module.predict(image, size)
        problem, _ = compare_detections(found, expected, 0.05, 100, **bounds)
        assert not problem, shape
