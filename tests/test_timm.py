"""ResT as models of timm, of torch.hub, and of what wraps timm's models."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from weights_rule import fill, image

from mmrest import weights
from mmrest.checkpoint import CheckpointError, CheckpointNotFoundError

timm = pytest.importorskip('timm')
import mmrest.timm  # noqa: E402, F401

SMALL = dict(
    arch=dict(
        embed_dims=[4, 4, 4, 8],
        num_heads=[1, 2, 2, 2],
        depths=[1, 1, 2, 1],
        sr_ratios=[2, 2, 2, 1],
    )
)


@pytest.fixture
def rest_lite(tmp_path, monkeypatch):
    """A file of the published form, where it is looked for."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'pretrained' / 'rest_lite.pth'
    path.parent.mkdir()
    model = timm.create_model('rest_lite', **SMALL)
    torch.save({'model': fill(model.state_dict())}, path)
    return str(path)


def test_names():
    listed = timm.list_models(module='timm', pretrained=True)
    assert {name.split('.')[0] for name in listed} == {
        name for name in weights.MODELS if not name.endswith('_384')
    }
    assert 'restv2_tiny.in1k_384' in listed


@pytest.mark.parametrize('name', ['rest_lite', 'restv2_tiny'])
def test_published_classifier(name, data_dir, published_shapes):
    model = timm.create_model(name).eval()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes == published_shapes[name]
    fill(model.state_dict())
    x = image((1, 3, 224, 224), 1)
    with torch.no_grad():
        logits = model(x)
        last, maps = model.forward_intermediates(x, norm=True)
        features = model.forward_features(x)
    golden = 'golden_backbone_v2_64.npz' if 'v2' in name else 'golden_backbone64.npz'
    expected = np.load(data_dir / golden)[f'{name}/logits']
    assert np.abs(logits.numpy() - expected).max() <= 2e-5 * np.abs(expected).max()
    assert torch.equal(maps[-1], features) and torch.equal(last, features)


@pytest.mark.parametrize('name', ['rest_lite', 'restv2_tiny'])
@pytest.mark.parametrize('out_indices', [None, (1, 2), (-1,)])
def test_features(name, out_indices):
    options = {} if out_indices is None else dict(out_indices=out_indices)
    whole = timm.create_model(name, **SMALL).eval()
    model = timm.create_model(name, features_only=True, **SMALL, **options).eval()
    model.model.load_state_dict(whole.state_dict(), strict=False)
    x = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        found, expected = model(x), whole.forward_intermediates(x)[1]
    wanted = [expected[i] for i in out_indices or range(4)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert [a.shape[1] for a in found] == model.feature_info.channels()
    assert len(found) == len(wanted)


@pytest.mark.parametrize('name', ['rest_lite', 'restv2_tiny'])
@pytest.mark.parametrize('last', range(4))
def test_pruned(name, last):
    model = timm.create_model(name, **SMALL).eval()
    x = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        expected = model.forward_intermediates(x, [last], intermediates_only=True)
        model.prune_intermediate_layers([last], prune_norm=True)
        assert torch.equal(model.forward_features(x), expected[0])
        assert torch.equal(model(x), expected[0])


def test_layer_decay():
    from timm.optim import param_groups_layer_decay

    model = timm.create_model('rest_lite', **SMALL)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    for name, parameter in model.named_parameters():
        layer, count = model.get_layer_depth(name)
        assert scales[id(parameter)] == 0.5 ** (count - 1 - layer), name
    assert model.group_matcher(coarse=True)('stage4.0.norm1.weight') == 4


@pytest.mark.parametrize(
    'options',
    [{}, dict(num_classes=7), dict(in_chans=4), dict(features_only=True)],
    ids=str,
)
def test_pretrained(rest_lite, options):
    pretrained = rest_lite if options else True
    model = timm.create_model('rest_lite', pretrained, **SMALL, **options)
    if 'num_classes' in options:
        assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 7)
    expected = torch.load(rest_lite)['model']
    found = {k.replace('model.', ''): v for k, v in model.state_dict().items()}
    for name, value in found.items():
        if name.startswith('head') and 'num_classes' in options:
            continue
        if name == 'stem.conv1.weight' and 'in_chans' in options:
            continue
        assert torch.equal(value, expected[name]), name


def test_missing_and_wrong_files(rest_lite):
    with pytest.raises(CheckpointNotFoundError, match='-m mmrest.weights rest_base`'):
        timm.create_model('rest_base', pretrained=True, **SMALL)
    with pytest.raises(CheckpointError, match='belongs to another `arch`'):
        timm.create_model('rest_lite', pretrained=True)


def test_training():
    model = timm.create_model('rest_lite', num_classes=3, drop_path_rate=0.1, **SMALL)
    model.set_grad_checkpointing()
    assert model.with_cp and all(model.stage(i).with_cp for i in range(4))
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', ['rest_lite', 'restv2_tiny'])
def test_options_of_timms_own_scripts(name):
    """They name the drop rate always, and the pooling may double the features."""
    model = timm.create_model(name, drop_rate=0.9, global_pool='catavgmax', **SMALL)
    x = torch.rand(1, 3, 32, 32)
    logits = [model.forward_head(torch.ones(1, 8, 2, 2)) for _ in range(4)]
    assert not all(torch.equal(logits[0], each) for each in logits)
    assert model.eval()(x).shape == (1, 1000)


@pytest.mark.parametrize('features_only', [True, False])
def test_wrapper_of_mmpretrain(rest_lite, features_only):
    pytest.importorskip('mmpretrain.models')
    model = MODELS.build(
        dict(
            type='mmpretrain.TIMMBackbone',
            model_name='rest_lite',
            pretrained=True,
            features_only=features_only,
            **SMALL,
        )
    )
    model.init_weights()  # draws nothing anew
    expected = torch.load(rest_lite)['model']['stem.conv1.weight']
    name, found = next(iter(model.state_dict().items()))
    assert name.endswith('stem.conv1.weight') and torch.equal(found, expected)
    model.eval()
    outs = model(torch.rand(1, 3, 32, 32))
    assert outs[-1].shape == (1, 8, 1, 1)


def test_torch_hub(repo):
    model = torch.hub.load(
        str(repo), 'rest_lite', source='local', num_classes=3, **SMALL
    )
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 3)
