"""Published files named at MMPretrain's classifier, or given to ``get_model``."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from small_models import TINY, classifier

from mmrest import ResT
from mmrest.checkpoint import CheckpointError, to_image_classifier

pytest.importorskip('mmpretrain')
from mmpretrain.apis import get_model  # noqa: E402
from mmpretrain.registry import MODELS  # noqa: E402


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


@pytest.fixture
def published():
    model = ResT(arch=TINY, out_indices=(3,))
    model.init_weights()
    head = {'head.weight': torch.randn(5, 32), 'head.bias': torch.randn(5)}
    return {**model.state_dict(), **head}


def by_init_cfg(path, **options):
    init_cfg = dict(type='Pretrained', checkpoint=path)
    model = MODELS.build(classifier(init_cfg=init_cfg, **options))
    model.init_weights()
    return model


def by_pretrained(path, **options):
    model = MODELS.build(classifier(pretrained=path, **options))
    model.init_weights()
    return model


def by_get_model(path, **options):
    cfg = Config(dict(model=classifier(**options), default_scope='mmpretrain'))
    return get_model(cfg, pretrained=path)


WAYS = pytest.mark.parametrize('way', [by_init_cfg, by_pretrained, by_get_model])


@WAYS
@pytest.mark.parametrize('form', ['', 'model', 'state_dict', 'module.', 'own'])
def test_loads_backbone_and_head(save, published, way, form):
    content = {form: published} if form in ('model', 'state_dict') else published
    if form == 'module.':
        content = {form + name: value for name, value in published.items()}
    if form == 'own':
        content = dict(state_dict=to_image_classifier(published), meta={})
    model = way(save(content))
    assert torch.equal(model.head.fc.weight, published['head.weight'])
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, published[name]), name


@WAYS
def test_another_number_of_classes(save, published, way):
    """The head is new, as MMEngine says; the backbone is loaded."""
    model = way(save(dict(model=published)), num_classes=3)
    assert model.head.fc.weight.shape == (3, 32)
    name = 'stage3.1.mlp.fc1.weight'
    assert torch.equal(model.backbone.state_dict()[name], published[name])


@WAYS
@pytest.mark.parametrize(
    'change, found',
    [
        (dict(depths=[1, 1, 3, 1]), r'Missing in the file .*stage3\.2'),
        (dict(depths=[1, 1, 1, 1]), r'Not in the model .*stage3\.1'),
        (dict(mlp_ratios=4), r'Other shapes .*mlp\.fc1'),
    ],
)
def test_another_arch(save, published, way, change, found):
    path = save(dict(model=published))
    with pytest.raises(CheckpointError, match=found):
        way(path, arch={**TINY, **change})


@WAYS
@pytest.mark.parametrize('wrapper', ['model', 'state_dict'])
def test_backbone_alone_or_of_something_else(save, published, way, wrapper):
    backbone = {k: v for k, v in published.items() if not k.startswith('head.')}
    for state in (backbone, {'encoder.weight': torch.ones(3)}):
        with pytest.raises(CheckpointError, match='init_cfg of the backbone'):
            way(save({wrapper: state}))


def test_without_the_final_norm_it_is_no_published_file(published):
    without = {k: v for k, v in published.items() if not k.startswith('norm.')}
    assert to_image_classifier(published) and not to_image_classifier(without)


def test_own_file_of_another_width(save, published):
    """MMEngine would warn and leave random weights."""
    path = save(dict(state_dict=to_image_classifier(published)))
    with pytest.raises(CheckpointError, match='Other shapes'):
        by_get_model(path, arch={**TINY, 'mlp_ratios': 3})


def test_other_loading_is_left_alone(published):
    """A part by PyTorch's own function: adapters, a head."""
    model = MODELS.build(classifier())
    head = {'head.fc.weight': torch.ones(5, 32), 'head.fc.bias': torch.ones(5)}
    model.load_state_dict(head, strict=False)
    assert float(model.head.fc.weight.detach().min()) == 1
    model.load_state_dict(model.state_dict())
    model.load_state_dict({}, strict=False)
