"""Configs of ResTV2: the published recipes, and that they train."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from rest_variants import TINY

from mmrest.checkpoint import PublishedClassifierHook, check_load_from, read_checkpoint
from mmrest.utils.complexity import complexity
from mmrest.utils.results import expected

SIZES = dict(tiny=0.1, small=0.2, base=0.3)
SEGMENTATION = [
    f'upernet/restv2_{arch}_upernet_160k_ade20k_512x512.py' for arch in SIZES
]
CLASSIFICATION = [
    f'imagenet/restv2_{arch}_{recipe}_in1k.py'
    for arch in (*SIZES, 'large')
    for recipe in ('8xb256', '8xb64_384')
]
# as published: 10^9 multiply-accumulates
CLASSIFIER_FLOPS = dict(tiny=4.1, small=6.0, base=7.9, large=13.8)


def pipeline(cfg):
    return {step.type: step for step in cfg.train_dataloader.dataset.pipeline}


@pytest.mark.parametrize('schedule', ['1x', '3x'])
@pytest.mark.parametrize('kind', ['mask_rcnn', 'retinanet'])
def test_recipe_of_detection(read, kind, schedule):
    cfg = read(f'{kind}/restv2_tiny_fpn_{schedule}.py')
    assert 8 * cfg.train_dataloader.batch_size == 16
    steps = {'1x': [90_000, 60_000, 80_000], '3x': [270_000, 210_000, 250_000]}
    scheduler = cfg.param_scheduler[1]
    assert [cfg.train_cfg.max_iters, *scheduler.milestones] == steps[schedule]
    assert scheduler.end == cfg.train_cfg.max_iters
    optim = cfg.optim_wrapper
    assert (optim.optimizer.lr, optim.optimizer.weight_decay) == (1e-4, 0.05)
    # the authors' for Mask R-CNN; RetinaNet has the settings of ResT
    published = dict(type='AmpOptimWrapper', clip_grad=dict(max_norm=0.01))
    found = {key: optim[key] for key in ('type', 'clip_grad') if key in optim}
    ours = dict(type='OptimWrapper')
    assert found == (published if kind == 'mask_rcnn' else ours)
    assert list(pipeline(cfg))[3:5] == ['RandomCrop', 'RandomChoiceResize']
    sides = [480, 512, 534, 576, 640, 672, 704, 736, 768, 800]
    resize = pipeline(cfg)['RandomChoiceResize']
    assert resize.scales == [(1333, side) for side in sides]
    pixels = cfg.model.data_preprocessor
    assert pixels.bgr_to_rgb and pixels.std == [58.395, 57.12, 57.375]


@pytest.mark.parametrize('kind', ['mask_rcnn', 'retinanet'])
def test_training_images_are_cropped_and_keep_their_boxes(read, kind, tmp_path):
    import cv2
    import numpy as np
    from mmcv.transforms import Compose

    path = str(tmp_path / 'image.png')
    cv2.imwrite(path, np.zeros((100, 200, 3), np.uint8))
    corner, middle = [0, 0, 16, 8], [80, 40, 120, 60]
    instances = [
        dict(
            bbox=box,
            bbox_label=label,
            ignore_flag=0,
            mask=[[box[i] for i in (0, 1, 2, 1, 2, 3, 0, 3)]],
        )
        for label, box in enumerate((corner, middle))
    ]
    steps = read(f'{kind}/restv2_tiny_fpn_3x.py').train_dataloader.dataset.pipeline
    assert steps[4].type == 'RandomChoiceResize'
    steps[4].scales = [(180, 90)]  # the size of the crop
    transform, counts = Compose(steps), set()
    for _ in range(30):
        data = dict(img_path=path, height=100, width=200, instances=instances)
        out = transform(data)
        assert out['inputs'].shape == (3, 90, 180)
        objects = out['data_samples'].gt_instances
        counts.add(len(objects))
        size = objects.bboxes.tensor[:, 2:] - objects.bboxes.tensor[:, :2]
        assert (size > 0).all() and size[-1].tolist() == [40, 20]
        if kind == 'mask_rcnn':
            assert len(objects.masks) == len(objects)
    assert counts == {1, 2}


@pytest.mark.parametrize('kind', ['mask_rcnn', 'retinanet'])
def test_a_detector_trains(read, training_batch, kind):
    cfg = read(f'{kind}/restv2_tiny_fpn_1x.py')
    cfg.model.backbone.update(arch=TINY, init_cfg=None, drop_path_rate=0.0)
    cfg.model.neck.in_channels = TINY['embed_dims'][-len(cfg.model.neck.in_channels) :]
    cfg.optim_wrapper.type = 'OptimWrapper'  # float16 needs a GPU
    masks = cfg.model.type == 'MaskRCNN'
    if masks:
        cfg.model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        cfg.model.train_cfg.rcnn.sampler.num = 16
    model = MODELS.build(cfg.model).train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    losses = model.train_step(training_batch(masks), optimizer)
    assert losses['loss'].isfinite()
    state = optimizer.optimizer.state
    assert not [key for key, p in model.named_parameters() if p not in state]


@pytest.mark.parametrize('name', SEGMENTATION)
def test_recipe_of_segmentation(read, name):
    cfg = read(name)
    tiny = 'tiny' in name
    optim = cfg.optim_wrapper
    rates = (6e-5, 0.01) if tiny else (1.5e-4, 0.05)
    assert (optim.optimizer.lr, optim.optimizer.weight_decay) == rates
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 160_000
    assert cfg.model.auxiliary_head.in_index == 2
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    optim.type = 'OptimWrapper'
    groups = build_optim_wrapper(model, optim).optimizer.param_groups
    names = {id(p): key for key, p in model.named_parameters()}
    rate = {names[id(p)]: g['lr'] for g in groups for p in g['params']}
    for key, stages in (
        ('backbone.stem.proj.0.weight', 5),
        ('backbone.patch_2.proj.weight', 4),
        ('backbone.stage4.1.mlp.fc2.bias', 1),
        ('backbone.norm_1.weight', 0),
        ('decode_head.conv_seg.weight', 0),
    ):
        factor = 1.0 if tiny else 0.9**stages
        assert rate[key] == pytest.approx(rates[0] * factor), key
    decay = {names[id(p)]: g['weight_decay'] for g in groups for p in g['params']}
    assert decay['backbone.stage1.0.norm1.weight'] == 0
    assert decay['backbone.stage1.0.attn.q.weight'] == rates[1]


def test_figures_of_a_segmentor(repo):
    figures = expected(Config(), SEGMENTATION[0], repo)
    assert figures.metrics == {'mIoU (ms+flip)': 47.3} and figures.tolerance == 0.1


@pytest.mark.parametrize('name', CLASSIFICATION)
def test_recipe_of_classification(read, name):
    cfg = read(name)
    arch = name.split('_')[1]
    wide = '384' in name
    batch = 8 * cfg.train_dataloader.batch_size
    assert batch == cfg.auto_scale_lr.base_batch_size == (512 if wide else 2048)
    optim, backbone = cfg.optim_wrapper, cfg.model.backbone
    assert optim.clip_grad.max_norm == 1.0
    rates = (1.5e-5, 1e-8) if wide else (1.5e-4 * batch / 256, 0.05)
    assert (optim.optimizer.lr, optim.optimizer.weight_decay) == rates
    assert backbone.drop_path_rate == {**SIZES, 'large': 0.5}[arch]
    assert (backbone.out_norm, backbone.out_indices) == ('final', (3,))
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end
    assert cfg.train_cfg.max_epochs == (30 if wide else 300)
    assert (cfg.model.train_cfg is None) is wide
    assert cfg.custom_hooks[0].type == 'EMAHook'
    crop = cfg.test_dataloader.dataset.pipeline[2]
    assert crop.crop_size == (384 if wide else 224)
    assert (cfg.load_from == f'pretrained/restv2_{arch}.pth') is wide


@pytest.mark.parametrize(
    'arch', ['tiny', *(pytest.param(a, marks=pytest.mark.slow) for a in ('large',))]
)
def test_flops_are_the_published_ones(read, arch, repo):
    name = f'imagenet/restv2_{arch}_8xb256_in1k.py'
    counted = complexity(MODELS.build(read(name).model), (224, 224))
    assert counted.flops['total'] / 1e9 == pytest.approx(
        CLASSIFIER_FLOPS[arch], abs=0.06
    )


def test_a_classifier_reads_a_published_file_and_trains(read, tmp_path):
    from mmpretrain.structures import DataSample

    from mmrest import ResTV2

    cfg = read('imagenet/restv2_tiny_8xb64_384_in1k.py')
    cfg.model.head.in_channels = 32
    cfg.model.backbone.update(arch=TINY, drop_path_rate=0.0)
    source = ResTV2(TINY, out_indices=(3,), out_norm='final').state_dict()
    head = {'head.weight': torch.ones(1000, 32), 'head.bias': torch.ones(1000)}
    path = tmp_path / 'published.pth'
    torch.save(dict(model={**source, **head}), path)
    model, hook = MODELS.build(cfg.model), PublishedClassifierHook()
    check_load_from(model, path, hooks=[hook])
    checkpoint = read_checkpoint(path)
    hook.after_load_checkpoint(None, checkpoint)
    _load_checkpoint_to_model(model, checkpoint)
    assert torch.equal(model.backbone.norm.weight, source['norm.weight'])
    assert model.head.fc.weight.eq(1).all()
    batch = dict(
        inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
        data_samples=[DataSample().set_gt_label(i) for i in (3, 7)],
    )
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    assert model.train().train_step(batch, optimizer)['loss'].isfinite()
