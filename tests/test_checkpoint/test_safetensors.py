"""Files of safetensors, wherever a checkpoint is read or written."""

import json
import sys

import pytest
import torch
from mmengine.runner import CheckpointLoader
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mmrest.checkpoint import (
    CheckpointError,
    check_load_from,
    load_pretrained,
    read_checkpoint,
    read_state_dict,
)
from mmrest.converters import ConversionError, publish


@pytest.fixture
def path(tmp_path, weights):
    save_file(weights, tmp_path / 'linear.safetensors')
    return str(tmp_path / 'linear.safetensors')


@pytest.mark.parametrize('name', ['linear.safetensors', 'linear.pth'])
def test_reading(path, tmp_path, weights, name):
    """The content decides, not the name."""
    other = tmp_path / name
    (tmp_path / 'linear.safetensors').rename(other)
    assert read_checkpoint(other)['meta'] == {}
    read = read_state_dict(other, torch.device('cpu'))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[k], weights[k]) for k in weights)
    model = nn.Linear(3, 4)
    load_pretrained(model, other)
    assert torch.equal(model.weight, weights['weight'])
    check_load_from(model, other)


@pytest.mark.usefixtures('safe_loading')
def test_mmengine_reads_it_in_our_tools(path, weights):
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    assert torch.equal(checkpoint['state_dict']['bias'], weights['bias'])


def test_from_a_url(server, weights):
    url, root = server
    save_file(weights, root / 'linear.safetensors')
    assert read_state_dict(f'{url}/linear.safetensors').keys() == weights.keys()


@pytest.mark.parametrize('share', [0.01, 0.5, 0.99])
def test_damaged(path, share):
    content = open(path, 'rb').read()
    with open(path, 'wb') as file:
        file.write(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match='is not a usable checkpoint') as error:
        read_checkpoint(path)
    assert path in str(error.value)


def test_page_of_that_name(tmp_path):
    (tmp_path / 'x.safetensors').write_text('<html>please log in</html>')
    with pytest.raises(CheckpointError, match='HTML'):
        read_checkpoint(tmp_path / 'x.safetensors')


def test_without_the_package(path, save, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        read_checkpoint(path)
    source = save({'state_dict': weights})
    assert read_state_dict(source)  # the other format needs none of it
    with pytest.raises(ConversionError, match='pip install safetensors'):
        publish(source, tmp_path / 'out.safetensors')


def test_what_it_cannot_hold(save, weights, tmp_path):
    source = save({'state_dict': {**weights, 'layer._extra_state': None}})
    with pytest.raises(ConversionError, match='_extra_state. Publish it as .pth'):
        publish(source, tmp_path / 'x.safetensors')
    assert publish(source, tmp_path / 'x.pth').exists()


def test_publishing(save, weights, tmp_path):
    """What JSON knows of meta comes back; shared and cut tensors are written."""
    state = {**weights, 'tied': weights['weight'], 'cut': weights['weight'][:, :2].t()}
    meta = dict(epoch=12, dataset_meta=dict(classes=('a', 'b')), made=torch.ones(1))
    source = save({'state_dict': state, 'meta': meta, 'optimizer': {}})
    written = publish(source, tmp_path / 'linear.pth', format='safetensors')
    assert written.name.startswith('linear-') and written.suffix == '.safetensors'
    checkpoint = read_checkpoint(written)
    assert checkpoint['meta'] == dict(epoch=12, dataset_meta=dict(classes=['a', 'b']))
    assert checkpoint['state_dict'].keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in checkpoint['state_dict'].items())
    # by the name of the output alone; and again, from the one format into the other
    assert publish(source, tmp_path / 'linear.safetensors', force=True) == written
    assert (
        read_checkpoint(publish(written, tmp_path / 'back.pth'))['meta']['epoch'] == 12
    )
    with safe_open(written, framework='pt') as file:
        assert json.loads(file.metadata()['mmrest_meta'])['epoch'] == 12
