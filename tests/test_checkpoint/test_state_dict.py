"""The forms in which weights are published."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrest.checkpoint import CheckpointError, read_state_dict
from mmrest.checkpoint.state_dict import (
    PREFIXES,
    find_state_dict,
    prefixes_in,
    shared_prefix,
)


@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict', 'state_dict_ema'])
@pytest.mark.parametrize(
    'prefix',
    [
        '',
        'module.',
        'backbone.',
        'backbone.bottom_up.',
        'module.backbone.',
        'module.backbone.bottom_up.',
        'backbone.module.',
        '_orig_mod.',
        'module._orig_mod.backbone.',
    ],
)
def test_forms(save, weights, wrapper, prefix):
    state = {prefix + k: v for k, v in weights.items()}
    content = {wrapper: state, 'epoch': 3, 'optimizer': {}} if wrapper else state
    read = read_state_dict(save(content))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[k], weights[k]) for k in weights)


def test_the_rest_of_a_detector_stays(save, weights):
    """Where other parts are there too, names are kept."""
    state = {f'module.backbone.{k}': v for k, v in weights.items()}
    state['module.neck.conv.weight'] = torch.ones(1)
    assert list(read_state_dict(save({'state_dict': state}))) == [
        'backbone.weight',
        'backbone.bias',
        'neck.conv.weight',
    ]


def test_several_wrappers(weights):
    averaged = {k: v + 1 for k, v in weights.items()}
    content = {'state_dict': weights, 'state_dict_ema': averaged, 'model': weights}
    found = find_state_dict(content, 'x.pth')
    assert found.wrapper == 'state_dict_ema'
    assert torch.equal(found.tensors['bias'], averaged['bias'])
    # an entry that a run left empty is passed over
    for empty in (None, {}, 'none'):
        found = find_state_dict({**content, 'state_dict_ema': empty}, 'x.pth')
        assert found.wrapper == 'state_dict'


def test_wrapper_in_a_wrapper(weights):
    found = find_state_dict({'state_dict': {'model': weights}}, 'x.pth')
    assert found.wrapper == 'state_dict.model'
    assert found.tensors.keys() == weights.keys()


def test_a_module_may_be_called_model(weights):
    """Bare tensors whose names begin with `model` are no wrapper."""
    content = OrderedDict({'model.weight': weights['weight'], 'model': torch.ones(1)})
    assert find_state_dict(content, 'x.pth').tensors.keys() == content.keys()


def test_values_that_are_no_tensors(weights):
    content = {'state_dict': {**weights, 'version': 2, 'layer._extra_state': None}}
    found = find_state_dict(content, 'x.pth')
    assert found.tensors.keys() == weights.keys()
    assert found.others == {'version': 'int', 'layer._extra_state': 'NoneType'}


@pytest.mark.parametrize(
    'content, found',
    [
        ([1, 2], 'holds a list'),
        (torch.ones(2), 'holds a Tensor'),
        ('text', 'holds a str'),
        ({}, 'empty dict'),
        ({'a': 1, 'model': 'resnet'}, r"no tensors.*'a' \(int\), 'model' \(str\)"),
        ({'model': {'a': 1}}, 'no tensors'),
        ({'net': {'w': torch.ones(1)}, 'epoch': 1}, "tensors under 'net'.*save them"),
    ],
)
def test_no_tensors(save, content, found):
    with pytest.raises(CheckpointError, match=found):
        read_state_dict(save(content))


CHAINS = st.lists(st.sampled_from(PREFIXES), max_size=4).map(''.join)
NAMES = st.lists(
    st.text('abcxyz_0123.', min_size=1, max_size=9), min_size=1, max_size=6, unique=True
)


@given(chain=CHAINS, names=NAMES)
def test_shared_prefix(chain, names):
    """Whatever chain of prefixes all names have is found and nothing more."""
    names = [f'{chain}x{name}' for name in names]
    assert shared_prefix(names) == chain
    chains = prefixes_in(names)
    assert chains[0] == '' and chain in chains
    assert shared_prefix([*names, 'x']) == ''
