"""Mixed precision: 200 steps of a detector, and steps that loss scaling skips.

MMEngine's ``AmpOptimWrapper`` asserts a GPU, so the loops here are plain PyTorch:
the same ``autocast`` and ``GradScaler``, on a CPU.
"""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from rest_variants import TINY

from mmrest import ResT

STEPS = 200


def retinanet(repo):
    """The published head and neck, narrow, on a tiny ResT."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(repo / 'configs/retinanet/rest_lite_fpn_1x.py').model
    cfg.backbone.update(arch=TINY, init_cfg=None)
    cfg.neck.update(in_channels=TINY['embed_dims'][1:], out_channels=16)
    cfg.bbox_head.update(in_channels=16, feat_channels=16, num_classes=2)
    cfg.bbox_head.stacked_convs = 1
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg)


def batch():
    """Two images with a bright and a dark box each."""
    from mmdet.structures import DetDataSample

    images, samples = torch.randn(2, 3, 64, 96), []
    size = dict(img_shape=(64, 96), batch_input_shape=(64, 96), pad_shape=(64, 96))
    for i in range(2):
        left = 8 + 10 * i
        images[i, :, 8:40, left : left + 32] += 3
        images[i, :, 20:60, 50:80] -= 3
        boxes = torch.tensor([[left, 8.0, left + 32, 40], [50, 20, 80, 60]])
        sample = DetDataSample(metainfo=size)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(2))
        samples.append(sample)
    return images, samples


def losses(repo, dtype, steps=STEPS):
    """The losses of a run in ``dtype``; fails at once where a loss is not finite."""
    torch.manual_seed(0)
    images, samples = batch()
    model = retinanet(repo)
    model.init_weights()
    model.train()
    half = dtype != torch.float32
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cpu', enabled=dtype == torch.float16)
    found = []
    for step in range(steps):
        with torch.autocast('cpu', dtype=dtype if half else None, enabled=half):
            loss, _ = model.parse_losses(model(images, samples, mode='loss'))
        assert loss.isfinite(), f'loss {loss} at step {step}'
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    return found


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_learns_as_in_float32(repo, dtype):
    """From the same loss on; float32 too ends below a twentieth of it."""
    found = losses(repo, dtype)
    assert found[:1] == pytest.approx(losses(repo, torch.float32, steps=1), rel=0.01)
    assert sum(found[-20:]) / 20 < 0.05 * found[0]


def test_overflow_skips_the_step():
    """A loss scale that float16 cannot hold: no step, then steps, and never a NaN."""
    torch.manual_seed(0)
    model = ResT(TINY)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**32, backoff_factor=2.0**-6)
    images = torch.rand(2, 3, 64, 64)
    before = [p.detach().clone() for p in model.parameters()]
    skipped = stepped = 0
    for _ in range(8):
        with torch.autocast('cpu', dtype=torch.float16):
            loss = sum((out.float() - 1).square().mean() for out in model(images))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            same = all(map(torch.equal, before, model.parameters()))
            assert same or stepped
        else:
            stepped += 1
        assert loss.isfinite()
        assert all(p.isfinite().all() for p in model.parameters())
    assert skipped >= 1 and stepped >= 3
    assert not all(map(torch.equal, before, model.parameters()))
