"""Detectors on a CUDA device, where mmdet and mmcv's operators for CUDA are there."""

import copy

import pytest
import torch
from mmengine.config import Config
from rest_variants import TINY

pytest.importorskip('mmcv.ops', reason="needs mmcv's operators", exc_type=ImportError)
pytest.importorskip('mmdet', reason='needs MMDetection')
from mmcv.ops import get_compiling_cuda_version  # noqa: E402

if get_compiling_cuda_version() == 'not available':
    pytest.skip("needs mmcv's operators for CUDA", allow_module_level=True)

KINDS = ('retinanet', 'mask_rcnn')


@pytest.mark.parametrize('kind', KINDS)
def test_golden_detections(kind, data_dir, native, detect):
    from test_golden_detectors import (
        SCORE_TOLERANCE,
        as_dict,
        assert_same_detections,
        read_golden,
    )

    golden = read_golden(data_dir, kind)
    _, found = detect(native(kind, 'small').cuda(), golden['image'])
    found = as_dict(found)
    assert all(tensor.is_cuda for tensor in found.values())
    found = {name: tensor.cpu() for name, tensor in found.items()}
    expected = {name: torch.from_numpy(golden[name]) for name in found}
    # another order of the sums than a CPU's
    assert_same_detections(found, expected, 0.02, 2 * SCORE_TOLERANCE[kind])


@pytest.mark.parametrize('dtype', [None, 'float16', 'bfloat16'])
@pytest.mark.parametrize('kind', KINDS)
def test_training_learns(kind, dtype, repo, training_batch):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.optim import AmpOptimWrapper, OptimWrapper

    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(repo / f'configs/{kind}/rest_lite_fpn_1x.py')
    backbone = cfg.model.backbone
    backbone.update(arch=TINY, init_cfg=None)
    dims = TINY['embed_dims']
    cfg.model.neck.in_channels = [
        dims[i] for i in backbone.get('out_indices', range(4))
    ]
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    wrapper = (
        AmpOptimWrapper(optimizer=optimizer, dtype=dtype)
        if dtype
        else OptimWrapper(optimizer=optimizer)
    )
    data = training_batch(kind == 'mask_rcnn')
    losses = [
        float(model.train_step(copy.deepcopy(data), wrapper)['loss'].detach())
        for _ in range(20)
    ]
    assert max(losses[-5:]) < 0.9 * losses[0], losses
    assert all(p.isfinite().all() for p in model.parameters())
