"""Detectors on a CUDA device, where mmdet and mmcv's operators for CUDA are there."""

import json

import pytest
import torch
from mmengine.config import Config
from rest_variants import TINY
from weights_rule import fill

pytest.importorskip('mmcv.ops', reason="needs mmcv's operators", exc_type=ImportError)
pytest.importorskip('mmdet', reason='needs MMDetection')
from mmcv.ops import get_compiling_cuda_version  # noqa: E402

if get_compiling_cuda_version() == 'not available':
    pytest.skip("needs mmcv's operators for CUDA", allow_module_level=True)

KINDS = ('retinanet', 'mask_rcnn')


@pytest.mark.parametrize('kind', KINDS)
def test_golden_detections(kind, repo, data_dir):
    from published_form import empty
    from test_golden_detectors import (
        SCORE_TOLERANCE,
        as_dict,
        assert_same_detections,
        read_golden,
    )

    from mmrest.converters import to_mmdet

    def read(name):
        return json.loads((data_dir / name).read_text())

    shapes = read('detectron2_checkpoint_keys.json')[f'{kind}_rest_small']
    published = fill(empty(shapes), read('detector_gains.json')[kind])
    model = build(
        Config.fromfile(repo / f'configs/{kind}/rest_small_fpn_1x_published.py')
    )
    model.load_state_dict(to_mmdet(published).state_dict, strict=True)
    golden = read_golden(data_dir, kind)
    found = as_dict(detect(model.cuda().eval(), golden['image']))
    assert all(tensor.is_cuda for tensor in found.values())
    found = {name: tensor.cpu() for name, tensor in found.items()}
    expected = {name: torch.from_numpy(golden[name]) for name in found}
    # another order of the sums than a CPU's
    assert_same_detections(found, expected, 0.02, 2 * SCORE_TOLERANCE[kind])


@pytest.mark.parametrize('dtype', [None, 'float16', 'bfloat16'])
@pytest.mark.parametrize('kind', KINDS)
def test_training_learns(kind, dtype, repo, training_batch):
    from mmengine.optim import AmpOptimWrapper, OptimWrapper

    cfg = Config.fromfile(repo / f'configs/{kind}/rest_lite_fpn_1x.py')
    backbone = cfg.model.backbone
    backbone.update(arch=TINY, init_cfg=None)
    dims = TINY['embed_dims']
    cfg.model.neck.in_channels = [
        dims[i] for i in backbone.get('out_indices', range(4))
    ]
    torch.manual_seed(0)
    model = build(cfg)
    model.init_weights()
    model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    wrapper = (
        AmpOptimWrapper(optimizer=optimizer, dtype=dtype)
        if dtype
        else OptimWrapper(optimizer=optimizer)
    )
    losses = [
        float(
            model.train_step(training_batch(kind == 'mask_rcnn'), wrapper)[
                'loss'
            ].detach()
        )
        for _ in range(20)
    ]
    assert max(losses[-5:]) < 0.9 * losses[0], losses
    assert all(p.isfinite().all() for p in model.parameters())


def build(cfg):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    return MODELS.build(cfg.model)


@torch.no_grad()
def detect(model, image):
    from mmdet.structures import DetDataSample

    size = image.shape[:2]
    info = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    data = dict(
        inputs=[torch.from_numpy(image).permute(2, 0, 1)],
        data_samples=[DetDataSample(metainfo=info)],
    )
    return model.test_step(data)[0].pred_instances
