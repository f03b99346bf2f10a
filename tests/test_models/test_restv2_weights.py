"""Checkpoints for ResTV2: published forms, other generations, half a file."""

import pytest
import rest_variants
import torch
from weights_rule import fill

from mmrest import ResT, ResTV2
from mmrest.checkpoint import CheckpointError, check_load_from

TINY = dict(rest_variants.TINY, depths=[1, 2, 1, 1])
MARKS = {'ResT': ResT, 'ResTV2': ResTV2}


def published(**changes):
    """A published ImageNet file: with the norm and the head of a classifier."""
    model = ResTV2({**TINY, **changes}, out_indices=(3,), out_norm='final')
    state = fill(model.state_dict())
    return {**state, 'head.weight': torch.ones(5, 32), 'head.bias': torch.ones(5)}


def pretrained(path, kind=ResTV2, **options):
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = kind(TINY, init_cfg=init_cfg, **options)
    model.init_weights()
    return model


@pytest.fixture
def save(tmp_path):
    def write(content):
        torch.save(content, tmp_path / 'rest.pth')
        return tmp_path / 'rest.pth'

    return write


@pytest.mark.parametrize('out_norm', ['branch', 'final'])
@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict_ema'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'backbone.bottom_up.'])
def test_init_cfg_reads_every_published_form(save, wrapper, prefix, out_norm):
    source = published()
    tensors = {f'{prefix}{key}': tensor for key, tensor in source.items()}
    path = save(tensors if wrapper is None else {wrapper: tensors})
    found = pretrained(path, out_norm=out_norm).state_dict()
    left_out = ('head.',) if out_norm == 'final' else ('head.', 'norm.')
    for key in source:
        if not key.startswith(left_out):
            assert torch.equal(found[key], source[key]), key
    new = {key for key in found if key not in source}
    assert new and all(key.startswith('norm_') for key in new)


def test_own_dense_checkpoints_and_backbones_of_published_detectors(save):
    source = fill(ResTV2(TINY).state_dict())
    detector = {
        'backbone.bottom_up.'
        + (f'norm_{key[5]}.0{key[6:]}' if key.startswith('norm_') else key): tensor
        for key, tensor in source.items()
    }
    for content in (source, {'model': {**detector, 'backbone.fpn': torch.ones(1)}}):
        found = pretrained(save(content)).state_dict()
        assert all(torch.equal(found[key], source[key]) for key in source)


def test_fewer_stages_than_in_the_file(save):
    found = pretrained(save(published()), out_indices=(0, 1)).state_dict()
    assert torch.equal(found['patch_2.proj.bias'], published()['patch_2.proj.bias'])


@pytest.mark.parametrize('kind', ['ResT', 'ResTV2'])
@pytest.mark.parametrize('out_indices', [(0,), (0, 1, 2, 3)])
def test_another_generation_is_named(save, kind, out_indices):
    other = ({*MARKS} - {kind}).pop()
    path = save({'model': MARKS[other](TINY).state_dict()})
    with pytest.raises(CheckpointError) as error:
        pretrained(path, MARKS[kind], out_indices=out_indices)
    assert f'The file is of {other}, and the model is a {kind}' in str(error.value)
    assert f"set type='{other}'" in str(error.value)


@pytest.mark.parametrize('exact', [False, True])
def test_another_generation_in_a_whole_model_is_named(save, exact):
    model = torch.nn.ModuleDict(dict(backbone=ResTV2(TINY)))
    state = {f'backbone.{k}': v for k, v in ResT(TINY).state_dict().items()}
    with pytest.raises(CheckpointError, match='is of ResT, and the model is a ResTV2'):
        check_load_from(model, save({'state_dict': state}), exact=exact)
    classifier = {f'backbone.{k}': v for k, v in published().items() if 'head' not in k}
    check_load_from(model, save({'state_dict': classifier}), exact=False)


def test_another_arch_and_half_a_file(save):
    with pytest.raises(CheckpointError, match=r'stage2\.1') as error:
        pretrained(save(published(depths=[1, 1, 1, 1])))
    assert 'another `arch`' in str(error.value)
    with pytest.raises(CheckpointError, match=r'stem\.proj\.0\.weight \(8, 3, 3, 3\)'):
        pretrained(save(published(embed_dims=[16, 16, 24, 32])))
    state = published()
    half = dict(list(state.items())[: len(state) // 2])
    with pytest.raises(CheckpointError, match=r'Missing in the file.*stage'):
        pretrained(save(half))
    path = save(state)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError):
        pretrained(path)


def test_classifier_reads_published_files(save):
    models = pytest.importorskip('mmpretrain.registry').MODELS
    from mmengine.registry import DefaultScope

    path = str(save(published()))

    def build(**options):
        cfg = dict(
            type='ImageClassifier',
            backbone=dict(type='ResTV2', arch=TINY, out_indices=(3,), **options),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=32),
            init_cfg=dict(type='Pretrained', checkpoint=path),
        )
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            model = models.build(cfg)
            model.init_weights()
        return model

    found = build(out_norm='final').state_dict()
    for name, tensor in published().items():
        new = (
            name.replace('head.', 'head.fc.') if 'head' in name else f'backbone.{name}'
        )
        assert torch.equal(found[new], tensor)
    with pytest.raises(CheckpointError, match="set out_norm='final'"):
        build()
