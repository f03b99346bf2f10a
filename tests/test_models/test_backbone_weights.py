"""What an ``init_cfg`` of a backbone reads: published forms, its own, and no others."""

import pytest
import rest_variants
import torch
from torch import nn
from weights_rule import fill

from mmrest import ResT, ResTV2
from mmrest.checkpoint import CheckpointError, check_load_from
from mmrest.checkpoint.loading import adapt_input_channels

TINY = dict(rest_variants.TINY, depths=[1, 2, 1, 1])
NEW_NORMS = {ResT: ('norm1.', 'norm2.', 'norm3.'), ResTV2: ('norm_',)}
BOTH = pytest.mark.parametrize('kind', NEW_NORMS)


def published(kind, **changes):
    """An ImageNet file: with the norm and the head of a classifier."""
    options = dict(out_norm='final') if kind is ResTV2 else {}
    model = kind({**TINY, **changes}, out_indices=(3,), **options)
    state = fill(model.state_dict())
    return {**state, 'head.weight': torch.ones(5, 32), 'head.bias': torch.ones(5)}


def pretrained(kind, path, arch=TINY, adapt_input=False, **options):
    init_cfg = dict(type='Pretrained', checkpoint=str(path), adapt_input=adapt_input)
    model = kind(arch, init_cfg=[init_cfg], **options)
    model.init_weights()
    return model


@pytest.fixture
def save(tmp_path):
    def write(content):
        torch.save(content, tmp_path / 'rest.pth')
        return tmp_path / 'rest.pth'

    return write


@pytest.mark.parametrize(
    'kind, out_norm', [(ResT, 'chain'), (ResTV2, 'branch'), (ResTV2, 'final')]
)
@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict', 'state_dict_ema'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'backbone.bottom_up.'])
def test_every_published_form(save, wrapper, prefix, kind, out_norm):
    source = published(kind)
    tensors = {f'{prefix}{key}': tensor for key, tensor in source.items()}
    if 'backbone' in prefix:
        tensors['roi_heads.box.weight'] = torch.ones(2)
    path = save(tensors if wrapper is None else {wrapper: tensors})
    found = pretrained(kind, path, out_norm=out_norm).state_dict()
    left_out = ('head.', 'norm.') if out_norm == 'branch' else ('head.',)
    for key in source:
        if not key.startswith(left_out):
            assert torch.equal(found[key], source[key]), key
    new = {key for key in found if key not in source}
    assert new and all(key.startswith(NEW_NORMS[kind]) for key in new)


def test_all_tensors_of_a_published_file(published_shapes, save):
    shapes = published_shapes['rest_lite']
    dtypes = {k: torch.long if 'tracked' in k else torch.float for k in shapes}
    state = fill({k: torch.zeros(s, dtype=dtypes[k]) for k, s in shapes.items()})
    found = pretrained(ResT, save(dict(model=state)), 'lite').state_dict()
    for name, value in found.items():
        assert name in state or name.startswith(NEW_NORMS[ResT])
        assert torch.equal(value, state.get(name, value)), name


@BOTH
def test_own_dense_checkpoints_and_detectors(save, kind):
    """The norms of the outputs are there too, and are loaded."""
    source = fill(kind(TINY).state_dict())
    detector = {f'backbone.{name}': value for name, value in source.items()}
    neck = {'neck.fpn_convs.0.conv.weight': torch.ones(1)}
    contents = [source, {'state_dict': {**detector, **neck}, 'meta': {}}]
    if kind is ResTV2:  # as detectron2 names the norms
        contents.append(
            {
                'backbone.bottom_up.'
                + (f'norm_{key[5]}.0{key[6:]}' if key.startswith('norm_') else key): x
                for key, x in source.items()
            }
        )
    for content in contents:
        found = pretrained(kind, save(content)).state_dict()
        assert all(torch.equal(found[key], source[key]) for key in source)


@BOTH
@pytest.mark.parametrize('out_indices', [(0,), (1, 2), (3,), (1, 2, 3)])
def test_fewer_outputs_than_in_the_file(save, kind, out_indices):
    source = published(kind)
    model = pretrained(kind, save(source), out_indices=out_indices)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.get(name, value)), name


@pytest.mark.parametrize('kind, other', [(ResT, ResTV2), (ResTV2, ResT)])
@pytest.mark.parametrize('out_indices', [(0,), (0, 1, 2, 3)])
def test_another_generation_is_named(save, kind, other, out_indices):
    path = save({'model': other(TINY).state_dict()})
    with pytest.raises(CheckpointError) as error:
        pretrained(kind, path, out_indices=out_indices)
    ours, theirs = kind.__name__, other.__name__
    assert f'The file is of {theirs}, and the model is a {ours}' in str(error.value)
    assert f"set type='{theirs}'" in str(error.value)
    if len(out_indices) > 1 and kind is ResT:
        assert 'Missing in the file' in str(error.value)


@pytest.mark.parametrize('exact', [False, True])
def test_another_generation_in_a_whole_model_is_named(save, exact):
    model = nn.ModuleDict(dict(backbone=ResTV2(TINY)))
    state = {f'backbone.{k}': v for k, v in ResT(TINY).state_dict().items()}
    with pytest.raises(CheckpointError, match='is of ResT, and the model is a ResTV2'):
        check_load_from(model, save({'state_dict': state}), exact=exact)
    state = {f'backbone.{k}': v for k, v in published(ResTV2).items()}
    classifier = {k: v for k, v in state.items() if 'head' not in k}
    check_load_from(model, save({'state_dict': classifier}), exact=False)


@BOTH
@pytest.mark.parametrize(
    'change, found',
    [
        (dict(depths=[1, 1, 1, 1]), r'stage2\.1'),
        (dict(depths=[1, 3, 1, 1]), r'stage2\.2'),
        (dict(embed_dims=[16, 32, 48, 64]), r'stem\.(conv1|proj\.0)\.weight \(8, 3'),
    ],
)
def test_another_arch(save, kind, change, found):
    with pytest.raises(CheckpointError, match=found) as error:
        pretrained(kind, save(published(kind, **change)))
    assert 'another `arch`' in str(error.value)


@BOTH
def test_half_a_file(save, kind, tmp_path):
    state = published(kind)
    half = dict(list(state.items())[: len(state) // 2])
    with pytest.raises(CheckpointError, match=r'Missing in the file.*stage'):
        pretrained(kind, save(half))
    path = save(state)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError):
        pretrained(kind, path)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        pretrained(kind, tmp_path / 'none.pth')


@BOTH
@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels(save, kind, channels):
    source = published(kind)
    path = save(source)
    with pytest.raises(CheckpointError, match='adapt_input=True'):
        pretrained(kind, path, in_channels=channels)
    model = pretrained(kind, path, in_channels=channels, adapt_input=True)
    found = model.state_dict()
    first = 'stem.conv1.weight' if kind is ResT else 'stem.proj.0.weight'
    expected = adapt_input_channels(source[first], channels)
    assert torch.equal(found.pop(first), expected)
    assert all(torch.equal(v, source.get(k, v)) for k, v in found.items())


@BOTH
def test_what_is_no_init_cfg(kind):
    with pytest.raises(TypeError, match='init_cfg must be a dict'):
        kind(arch=TINY, init_cfg=123)


def test_classifier_reads_published_files(save):
    models = pytest.importorskip('mmpretrain.registry').MODELS
    from mmengine.registry import DefaultScope

    source = published(ResTV2)
    path = str(save(source))

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
    for name, tensor in source.items():
        new = name.replace('head.', 'head.fc.')
        new = new if 'head' in name else f'backbone.{name}'
        assert torch.equal(found[new], tensor)
    with pytest.raises(CheckpointError, match="set out_norm='final'"):
        build()
