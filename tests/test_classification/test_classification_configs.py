"""Configs of classifiers: sizes, recipe, published weights and their logits."""

import copy

import numpy as np
import pytest
import torch
from mmengine.fileio import load as load_file
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from rest_variants import TINY
from weights_rule import image

from mmrest import ResT
from mmrest.checkpoint import (
    CheckpointError,
    PublishedClassifierHook,
    check_load_from,
    read_checkpoint,
    to_image_classifier,
)

# parameters of the published classifiers, and drop path of their training
PUBLISHED = {
    'lite': (10_508_300, 0.1),
    'small': (13_679_708, 0.1),
    'base': (30_327_052, 0.2),
    'large': (51_676_156, 0.3),
}
# as the table of docs/ablation.md has it
ABLATION = {
    'lite_published': {},
    'lite_stem_resnet': dict(stem_cfg='resnet'),
    'lite_stem_patch': dict(stem_cfg='patch'),
    'lite_pos_gl': dict(pos_cfg='gl'),
    'lite_pos_le': dict(pos_cfg=dict(type='le', image_size=224)),
    'lite_pos_none': dict(pos_cfg='none'),
    'lite_attn_without_norm': dict(attn_cfg='emsa_without_norm'),
    'lite_attn_without_both': dict(attn_cfg='emsa_without_both'),
    'lite_attn_msa': dict(attn_cfg='msa'),
    'lite_reduction_avg': dict(attn_cfg=dict(type='emsa', reduction='avg')),
    'lite_reduction_max': dict(attn_cfg=dict(type='emsa', reduction='max')),
}


def load(model, path):
    """What MMEngine's Runner does with ``load_from``."""
    hooks = [PublishedClassifierHook()]
    check_load_from(model, path, hooks=hooks)
    checkpoint = read_checkpoint(path)
    hooks[0].after_load_checkpoint(None, checkpoint)
    _load_checkpoint_to_model(model, checkpoint, revise_keys=[(r'^module\.', '')])
    return model


@pytest.mark.parametrize('arch', PUBLISHED)
def test_sizes(read, arch, published_shapes):
    cfg = read(f'imagenet/rest_{arch}_8xb128_in1k.py')
    count, drop_path = PUBLISHED[arch]
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == count
    assert cfg.model.backbone.drop_path_rate == drop_path
    shapes = published_shapes[f'rest_{arch}']
    renamed = to_image_classifier({k: torch.empty(s) for k, s in shapes.items()})
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in renamed.items()} == found


def test_recipe(read):
    cfg = read('imagenet/rest_small_8xb128_in1k.py')
    batch = 8 * cfg.train_dataloader.batch_size
    assert batch == cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.optim_wrapper.optimizer.lr == 5e-4 * batch / 512
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 300
    assert cfg.model.head.loss.label_smooth_val == 0.1
    augments = [augment.type for augment in cfg.model.train_cfg.augments]
    assert augments == ['Mixup', 'CutMix']
    steps = [step.type for step in cfg.train_dataloader.dataset.pipeline]
    assert 'RandAugment' in steps and 'RandomErasing' in steps
    resize, crop = cfg.test_dataloader.dataset.pipeline[1:3]
    assert (resize.scale, resize.edge, resize.backend) == (256, 'short', 'pillow')
    assert resize.interpolation == 'bicubic' and crop.crop_size == 224
    assert cfg.test_evaluator.topk == (1, 5)


@pytest.mark.parametrize(
    'name',
    [
        'imagenet/rest_lite_8xb128_in1k.py',
        'imagenet/restv2_tiny_8xb64_384_in1k.py',
        'ablation/fruit_minutes.py',
    ],
)
def test_time_augmentation_has_the_size_of_the_test(read, name):
    cfg = read(name)
    plain = cfg.test_dataloader.dataset.pipeline
    assert cfg.tta_pipeline[:-1] == plain[:-1]


@pytest.mark.parametrize('arch', PUBLISHED)
def test_the_table_shows_the_index(repo, arch):
    (entry,) = [
        model
        for model in load_file(repo / 'configs' / 'imagenet' / 'metafile.yml')['Models']
        if f'rest_{arch}_' in model['Name']
    ]
    row = (
        f'| `rest_{arch}_8xb128_in1k` | {entry["Results"][0]["Metrics"]["top-1"]} '
        f'| {PUBLISHED[arch][0]:,} | {entry["Metadata"]["FLOPs"] / 1e9:.2f} G |'
    )
    assert row in (repo / 'docs' / 'classification.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('name', ['lite_published', 'lite_pos_le'])
def test_decay_of_weights_alone(read, name):
    cfg = read(f'ablation/{name}.py')
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    for key, parameter in model.named_parameters():
        exempt = parameter.dim() == 1 or 'pos_embed' in key
        assert decay[id(parameter)] == (0.0 if exempt else 0.05), key


def test_the_ablation_is_complete(read, repo):
    files = {path.stem for path in (repo / 'configs' / 'ablation').glob('lite_*.py')}
    assert files == set(ABLATION)
    plain = read('imagenet/rest_lite_8xb128_in1k.py')
    for name, options in ABLATION.items():
        cfg = read(f'ablation/{name}.py')
        backbone = {**plain.model.backbone, **options}
        assert cfg.model.to_dict() == {**plain.model.to_dict(), 'backbone': backbone}
        assert f'`{name}`' in (repo / 'docs' / 'ablation.md').read_text()


@pytest.mark.parametrize('name', [n for n in ABLATION if n != 'lite_published'])
def test_an_ablation_trains_and_refuses_published_weights(read, name, tmp_path):
    from mmpretrain.structures import DataSample

    cfg = read(f'ablation/{name}.py')
    cfg.model.head.in_channels = 32
    # a dropped path has no gradient
    cfg.model.backbone.update(arch=TINY, drop_path_rate=0.0)
    published = ResT(arch=TINY, out_indices=(3,)).state_dict()
    head = {'head.weight': torch.ones(1000, 32), 'head.bias': torch.ones(1000)}
    torch.save(dict(model={**published, **head}), tmp_path / 'published.pth')
    model = MODELS.build(cfg.model)
    model.init_weights()
    batch = dict(
        inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
        data_samples=[DataSample().set_gt_label(i) for i in (3, 7)],
    )
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    assert model.train().train_step(batch, optimizer)['loss'].isfinite()
    state = optimizer.optimizer.state
    assert not [key for key, p in model.named_parameters() if p not in state]
    with pytest.raises(CheckpointError, match='does not fit ImageClassifier'):
        load(model, tmp_path / 'published.pth')


@pytest.fixture(scope='session')
def logits(data_dir):
    """Of the published code, in float64, for ``image((1, 3, 224, 224), 1)``."""
    return torch.from_numpy(
        np.load(data_dir / 'golden_backbone64.npz')['rest_lite/logits']
    )


@pytest.mark.parametrize(
    ('wrapper', 'prefix'),
    [(None, ''), ('model', 'module.'), ('state_dict_ema', 'backbone.')],
)
def test_golden_logits_from_a_published_file(
    read, logits, published_lite, wrapper, prefix
):
    cfg = read('imagenet/rest_lite_8xb128_in1k.py')
    model = load(MODELS.build(cfg.model), published_lite(wrapper, prefix)).eval()
    picture = image((1, 3, 224, 224), 1)
    with torch.no_grad():
        found, exact = model(picture), model.double()(picture.double())
    scale = float(logits.abs().max())
    assert float((exact - logits).abs().max()) < 1e-11 * scale
    # measured: 1.2e-5; the published code's own float32 is 8e-6 away
    assert float((found - logits).abs().max()) < 2e-5 * scale


def test_inferencer_of_mmpretrain(repo, logits, published_lite):
    """It takes the published file as it is."""
    from mmpretrain import ImageClassificationInferencer

    config = str(repo / 'configs' / 'imagenet' / 'rest_lite_8xb128_in1k.py')
    inferencer = ImageClassificationInferencer(
        config, published_lite('model'), device='cpu'
    )
    with torch.no_grad():
        found = inferencer.model(image((1, 3, 224, 224), 1))
    assert float((found - logits).abs().max()) < 2e-5 * float(logits.abs().max())
    picture = np.random.randint(256, size=(300, 240, 3), dtype=np.uint8)
    (result,) = inferencer(picture)
    assert result['pred_scores'].shape == (1000,)
    assert result['pred_scores'].sum() == pytest.approx(1, abs=1e-4)


def test_other_checkpoints_pass_unchanged(read):
    hook = PublishedClassifierHook()
    own = MODELS.build(read('imagenet/rest_lite_8xb128_in1k.py').model).state_dict()
    backbone = {k[9:]: v for k, v in own.items() if k.startswith('backbone.')}
    for checkpoint in (dict(state_dict=own, meta={}), own, dict(model=backbone), {}):
        before = copy.copy(checkpoint)
        hook.after_load_checkpoint(None, checkpoint)
        assert checkpoint.keys() == before.keys()
        assert all(checkpoint[key] is before[key] for key in before)
