"""Every segmentation config: what it builds, trains with, and predicts."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from mmengine.runner import Runner

from mmrest.models.rest import ARCHS

ARCHES = ('lite', 'small', 'base', 'large')
NAMES = [
    f'{folder}/rest_{arch}_{schedule}_ade20k_512x512.py'
    for folder, schedule in (('semantic_fpn', 'fpn_80k'), ('upernet', 'upernet_160k'))
    for arch in ARCHES
]
SMALLEST = [name for name in NAMES if 'lite' in name]


def build(cfg):
    cfg.model.backbone.init_cfg = None
    # as MMEngine turns it in a single process
    cfg.model.decode_head.norm_cfg.type = 'BN'
    if 'auxiliary_head' in cfg.model:
        cfg.model.auxiliary_head.norm_cfg.type = 'BN'
    return MODELS.build(cfg.model)


def batch(size, count=2, classes=150):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1, 1))
    samples = []
    for _ in range(count):
        labels = PixelData(data=torch.randint(0, classes, (1, *size)))
        samples.append(SegDataSample(gt_sem_seg=labels, metainfo=meta))
    pixels = [torch.randint(0, 256, (3, *size), dtype=torch.uint8)] * count
    return dict(inputs=pixels, data_samples=samples)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[] if name in SMALLEST else pytest.mark.slow)
        for name in NAMES
    ],
)
def test_loss_reaches_every_parameter(read, name):
    cfg = read(name)
    backbone = cfg.model.backbone
    backbone.drop_path_rate = 0.0  # a dropped path has no gradient
    if name not in SMALLEST:  # for time: its own widths, one block a stage
        cfg.model.decode_head.channels = 32
        arch = ARCHS[backbone.arch]._replace(depths=(1, 1, 1, 1))
        backbone.arch = arch._asdict()
    cfg.model.data_preprocessor.size = (64, 80)
    model = build(cfg).train()
    model.backbone.init_weights()
    data = model.data_preprocessor(batch((50, 75)), training=True)  # padded by 255
    total, losses = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    assert torch.isfinite(total)
    assert ('aux.loss_ce' in losses) is name.startswith('upernet')
    assert not [key for key, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize('name', SMALLEST)
@pytest.mark.parametrize('size', [(64, 96), (33, 43)], ids=str)
def test_whole_and_slide_inference(read, name, size):
    model = build(read(name)).eval()
    data = batch(size, count=1)
    whole = model.test_step(data)[0]
    assert whole.pred_sem_seg.data.shape == (1, *size)
    assert whole.seg_logits.data.shape == (150, *size)

    model.test_cfg = model.test_cfg.__class__(
        mode='slide', crop_size=(512, 512), stride=(341, 341)
    )
    # a window larger than the image is the image
    slide = model.test_step(data)[0]
    torch.testing.assert_close(slide.seg_logits.data, whole.seg_logits.data)
    model.test_cfg.update(crop_size=(32, 32), stride=(24, 24))
    slide = model.test_step(data)[0]
    assert slide.seg_logits.data.shape == (150, *size)
    assert not torch.allclose(slide.seg_logits.data, whole.seg_logits.data)


def test_augmented_test_is_the_mean_of_the_probabilities(read):
    cfg = read(SMALLEST[0])
    cfg.model.data_preprocessor.size = None
    model = build(cfg).eval()
    tta = MODELS.build(dict(**cfg.tta_model, module=model))
    plain, flipped = batch((48, 64), count=1), batch((48, 64), count=1)
    flipped['inputs'] = [plain['inputs'][0].flip(2)]
    flipped['data_samples'][0].set_metainfo(
        dict(flip=True, flip_direction='horizontal')
    )
    for data in (plain, flipped):
        data['data_samples'][0].set_metainfo(dict(img_path='a.png'))
    both = {key: [plain[key], flipped[key]] for key in plain}
    merged = tta.test_step(both)[0].pred_sem_seg.data
    logits = [model.test_step(data)[0].seg_logits.data for data in (plain, flipped)]
    expected = sum(scores.softmax(0) for scores in logits).argmax(0)
    assert torch.equal(merged.squeeze(), expected)


def test_recipe_of_semantic_fpn(read):
    cfg = read('semantic_fpn/rest_small_fpn_80k_ade20k_512x512.py')
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == 80_000
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == (
        'AdamW',
        1e-4,
        1e-4,
    )
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {1e-4}


def test_recipe_of_upernet(read):
    cfg = read('upernet/rest_small_upernet_160k_ade20k_512x512.py')
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == 160_000
    assert cfg.param_scheduler[0].end == 1500
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    norms = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    for name, module in model.named_modules():
        expected = 0.0 if isinstance(module, norms) else 0.01
        for kind, parameter in module.named_parameters(recurse=False):
            assert decay[id(parameter)] == expected, f'{name}.{kind}'


def test_rates_of_upernet_are_those_of_mmseg_0(read):
    cfg = read('upernet/restv2_tiny_upernet_160k_ade20k_512x512.py')
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer))
        for scheduler in cfg.param_scheduler
    ]
    for step in range(3000):
        expected = 1 - step / 160_000
        if step < 1500:
            expected *= 1 - (1 - step / 1500) * (1 - 1e-6)
        # MMEngine's warm-up ends an iteration earlier
        assert abs(optimizer.param_groups[0]['lr'] - expected) < 1 / 1500
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize('name', NAMES)
def test_heads_have_the_classes_of_ade20k(read, name):
    model = read(name).model
    assert model.decode_head.num_classes == 150
    if name.startswith('upernet'):
        assert model.auxiliary_head.num_classes == 150


@pytest.mark.parametrize('name', SMALLEST)
def test_data_follow_the_convention_of_ade20k(read, name):
    cfg = read(name)
    batch_size = 8 * cfg.train_dataloader.batch_size
    assert batch_size == cfg.auto_scale_lr.base_batch_size == 16
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.type == 'ADE20KDataset'
        assert dataset.data_root == 'data/ade/ADEChallengeData2016'
    pipeline = cfg.train_dataloader.dataset.pipeline
    crop = next(step for step in pipeline if step.type == 'RandomCrop')
    assert crop.crop_size == cfg.model.data_preprocessor.size == (512, 512)
    augmented = cfg.tta_pipeline[1].transforms
    assert [step.scale[1] for step in augmented[0]] == [256, 384, 512, 640, 768, 896]
    assert [step.prob for step in augmented[1]] == [0.0, 1.0]


def test_scope_alone_makes_a_runner(config, tmp_path):
    """All that default_runtime_seg names exists in mmseg's registries."""
    cfg = Config.fromfile(str(config))
    cfg.work_dir = str(tmp_path)
    cfg.train_dataloader.dataset.lazy_init = True
    runner = Runner.from_cfg(cfg)
    hooks = {type(hook).__name__ for hook in runner.hooks}
    assert {'SegVisualizationHook', 'LabelRangeHook'} <= hooks
    assert type(runner.visualizer).__name__ == 'SegLocalVisualizer'
    assert type(runner.model.backbone).__name__ == 'ResT'
    assert cfg.tta_model.type == 'SegTTAModel'
