"""Names that lead to models: MMEngine's hub, inferencers, MMPretrain's list."""

import mmpretrain
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine import hub
from mmengine.infer import BaseInferencer
from mmengine.registry import DefaultScope, init_default_scope

import mmrest
from mmrest import weights
from mmrest.utils.results import read_index

pytestmark = pytest.mark.usefixtures('no_scope')

MODELS = {
    'retinanet/rest_lite_fpn_1x.py': 'RetinaNet',
    'semantic_fpn/rest_lite_fpn_80k_ade20k_512x512.py': 'EncoderDecoder',
    'imagenet/rest_lite_8xb128_in1k.py': 'ImageClassifier',
}


@pytest.mark.parametrize('scope', ['mmrest', 'mmdet'])
@pytest.mark.parametrize('name', MODELS)
def test_hub(name, scope):
    """Whatever toolbox was in use before."""
    init_default_scope(scope)
    if scope == 'mmrest':
        DefaultScope.get_current_instance().toolbox = 'mmseg'
    assert hub.get_config(f'mmrest::{name}').model.type == MODELS[name]
    with torch.device('meta'):
        model = hub.get_model(f'mmrest::{name}')
    assert type(model).__name__ == MODELS[name]
    assert type(model.backbone) is mmrest.ResT


@pytest.mark.slow
def test_published_file_by_name(tmp_path, monkeypatch):
    """What `python -m mmrest.weights` puts there is what the names look for."""
    monkeypatch.chdir(tmp_path)
    model = hub.get_model('mmrest::imagenet/rest_lite_8xb128_in1k.py')
    state = model.state_dict()
    published = {
        name.replace('backbone.', '').replace('head.fc.', 'head.'): tensor
        for name, tensor in state.items()
    }
    torch.save(published, 'mine.pth')
    weights.fetch('rest_lite', start='mine.pth')
    by_hub = hub.get_model('mmrest::imagenet/rest_lite_8xb128_in1k.py', pretrained=True)
    name = 'imagenet_rest_lite_8xb128_in1k'
    by_list = mmpretrain.get_model(name, pretrained=True)
    for found in (by_hub, by_list):
        for key, tensor in found.state_dict().items():
            assert torch.equal(tensor, state[key]), key


def test_lists():
    names = {model['Name'] for model in read_index()}
    classifiers = {name for name in names if name.startswith('imagenet_')}
    assert set(mmpretrain.list_models('*imagenet_rest*')) == classifiers
    assert set(BaseInferencer.list_models('mmrest')) == names


@pytest.mark.slow
def test_inferencer(tmp_path):
    model = hub.get_model('mmrest::retinanet/rest_lite_fpn_1x.py')
    meta = dict(dataset_meta=dict(classes=[str(i) for i in range(80)]))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'x.pth')
    inferencer = DetInferencer(
        'retinanet_rest_lite_fpn_1x',
        weights=str(tmp_path / 'x.pth'),
        scope='mmrest',
        device='cpu',
    )
    result = inferencer(np.zeros((32, 32, 3), np.uint8))
    assert len(result['predictions']) == 1
