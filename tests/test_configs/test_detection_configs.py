"""Every detection config: what it builds, what it trains with, what it needs."""

import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from mmrest.models.rest import ARCHS

REPO_CONFIGS = ('mask_rcnn', 'retinanet')
ARCHES = ('lite', 'small', 'base', 'large')
NAMES = [
    f'{detector}/rest_{arch}_fpn_{schedule}.py'
    for detector in REPO_CONFIGS
    for arch in ARCHES
    for schedule in ('1x', '3x')
]
# What the published models hold (the others follow from the backbone's count).
PUBLISHED_COUNTS = {
    'retinanet/rest_small_fpn_1x.py': 23_401_064,
    'retinanet/rest_base_fpn_1x.py': 40_497_304,
    'mask_rcnn/rest_small_fpn_1x.py': 33_318_628,
    'mask_rcnn/rest_base_fpn_1x.py': 49_833_300,
}


def build(cfg):
    cfg.model.backbone.init_cfg = None
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('name', sorted(PUBLISHED_COUNTS))
def test_parameter_count_is_the_published_one(read, name):
    model = build(read(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if 'lite' in name else pytest.mark.slow)
        for name in NAMES
        if '1x' in name
    ],
)
def test_one_training_step_reaches_every_parameter(read, training_batch, name):
    cfg = read(name)
    backbone = cfg.model.backbone
    backbone.drop_path_rate = 0.0  # a dropped path has no gradient
    if backbone.arch != 'lite':  # for time: its own widths, one block a stage
        arch = ARCHS[backbone.arch]._replace(depths=(1, 1, 1, 1))
        backbone.arch = arch._asdict()
    masks = cfg.model.type == 'MaskRCNN'
    if masks:  # fewer proposals than the recipe's, for time
        cfg.model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        cfg.model.train_cfg.rcnn.sampler.num = 16
    model = build(cfg).train()
    model.backbone.init_weights()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)

    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = model.train_step(training_batch(masks), optimizer)

    assert torch.isfinite(losses['loss'])
    assert any(key.startswith('loss_mask') for key in losses) is masks
    # The optimizer keeps no state of a parameter that got no gradient at all.
    state = optimizer.optimizer.state
    assert not [key for key, p in model.named_parameters() if p not in state]
    same = [key for key, p in model.named_parameters() if torch.equal(p, before[key])]
    # Softmax takes out a constant that is added to all scores: the gradient is 0.
    assert all(key.endswith('.attn.transform_conv.bias') for key in same)


@pytest.mark.parametrize('name', [name for name in NAMES if '3x' in name])
def test_3x_differs_from_1x_in_the_schedule_alone(read, name):
    three, one = read(name), read(name.replace('3x', '1x'))
    differing = {key for key in three if three[key] != one[key]}
    assert differing == {'train_cfg', 'param_scheduler'}
    assert three.train_cfg.max_iters == 3 * one.train_cfg.max_iters == 270_000
    assert three.param_scheduler[0] == one.param_scheduler[0]
    assert three.param_scheduler[1].milestones == [210_000, 250_000]
    assert three.param_scheduler[1].end == 270_000


@pytest.mark.parametrize('detector', REPO_CONFIGS)
def test_recipe(read, detector):
    cfg = read(f'{detector}/rest_small_fpn_1x.py')
    batch = 8 * cfg.train_dataloader.batch_size
    assert batch == cfg.auto_scale_lr.base_batch_size == 16
    assert not cfg.auto_scale_lr.enable
    assert cfg.train_cfg.max_iters == 90_000
    assert cfg.param_scheduler[1].milestones == [60_000, 80_000]
    assert cfg.param_scheduler[0].end == 1000
    assert cfg.param_scheduler[0].start_factor == 1 / 1000
    assert 'clip_grad' not in cfg.optim_wrapper
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.bgr_to_rgb
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    resize = next(
        step
        for step in cfg.train_dataloader.dataset.pipeline
        if step.type == 'RandomChoiceResize'
    )
    assert resize.scales == [(1333, side) for side in range(640, 801, 32)]
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.batch_size == 1
        resize = next(s for s in loader.dataset.pipeline if s.type == 'Resize')
        assert resize.scale == (1333, 800) and resize.backend == 'pillow'


def test_decay_of_norms_biases_and_weights(read):
    cfg = read('mask_rcnn/rest_lite_fpn_1x.py')
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    for name, module in model.named_modules():
        norm = isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d))
        for kind, parameter in module.named_parameters(recurse=False):
            expected = 0.0 if norm else 1e-4 if kind == 'bias' else 0.05
            assert decay[id(parameter)] == pytest.approx(expected), f'{name}.{kind}'


def test_warm_up_and_steps_give_the_published_rates(read):
    from mmengine.optim.scheduler import LinearLR, MultiStepLR

    cfg = read('retinanet/rest_lite_fpn_1x.py')
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=cfg.optim_wrapper.optimizer.lr)
    kinds = dict(LinearLR=LinearLR, MultiStepLR=MultiStepLR)
    schedulers = [
        kinds[part.type](optimizer, **{k: v for k, v in part.items() if k != 'type'})
        for part in cfg.param_scheduler
    ]
    rates = []
    for _ in range(80_001):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer._step_count = 1  # schedulers warn where no step was made
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(1e-7)
    assert rates[500] == pytest.approx(5e-5, rel=0.01)
    expected = {1000: 1e-4, 59_999: 1e-4, 60_000: 1e-5, 79_999: 1e-5, 80_000: 1e-6}
    assert {k: rates[k] for k in expected} == pytest.approx(expected)


def test_configs_need_no_other_project(repo):
    """They inherit from files of this repository, so that the wheel carries all."""
    for path in (repo / 'configs').rglob('*.py'):
        bases = re.findall(r"_base_ = (\[.*?\]|'.*?')", path.read_text(), re.DOTALL)
        for base in re.findall("'(.*?)'", ' '.join(bases)):
            assert '::' not in base, path
            assert (path.parent / base).is_file(), f'{path}: {base}'


@pytest.mark.parametrize(
    ('name', 'data'),
    [
        ('fruit_nuts/mask_rcnn_rest_fruit_nuts.py', 'fruit_nuts'),
        ('bccd/retinanet_rest_lite_bccd.py', 'bccd'),
        ('bccd/faster_rcnn_rest_lite_bccd.py', 'bccd'),
        ('bccd/retinanet_r18_bccd.py', 'bccd'),
        ('bccd/retinanet_pvt_tiny_bccd.py', 'bccd'),
        ('bccd/retinanet_swin_tiny_bccd.py', 'bccd'),
    ],
)
def test_the_examples_of_ones_own_data(name, data, read, shared):
    """They build, and fit the pictures that they were written for."""
    from mmrest.datasets.preflight import check_config

    cfg = read(name)
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == f'data/{data}/'
        cfg[f'{split}_dataloader'].dataset.data_root = f'{shared / "data" / data}/'
        if split != 'train':
            evaluator = cfg[f'{split}_evaluator']
            evaluator.ann_file = str(shared / evaluator.ann_file)
    check_config(cfg)
    build(cfg)
