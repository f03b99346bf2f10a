"""Files of PaddlePaddle.

``tests/data/paddle_*.pdparams`` were written by PaddlePaddle 3.3 from models of its own
layers, with weights by ``weights_rule.py``: a ResT by
``paddle.save(model.state_dict(), path, protocol=2)``, a ResTV2 by
``paddle.save({'model': model.state_dict(), 'epoch': 3}, path)``.
"""

import os
import pickle
import shutil
import tracemalloc
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from weights_rule import fill, image

from mmrest import ResT, ResTV2
from mmrest.checkpoint import (
    CheckpointError,
    load_pretrained,
    read_checkpoint,
    read_state_dict,
    safe_globals,
)

ARCH = dict(
    embed_dims=[4, 4, 4, 4],
    num_heads=[1, 2, 2, 2],
    depths=[1, 1, 2, 1],
    sr_ratios=[2, 2, 2, 1],
    mlp_ratios=1,
)
KINDS = {'rest': (ResT, {}), 'restv2': (ResTV2, dict(out_norm='final'))}


def build(kind, arch=ARCH, **options):
    cls, fixed = KINDS[kind]
    return cls(arch, **fixed, **options)


def arrays_of(model):
    """A state dict as the port in PaddleViT has it."""
    names = {'.running_mean': '._mean', '.running_var': '._variance'}
    arrays = {}
    for name, tensor in model.state_dict().items():
        for i in range(1, 5):
            name = name.replace(f'stage{i}.', f'stages.{i - 1}.')
            name = name.replace(f'patch_embed_{i}.', f'patch_embeds.{i - 2}.')
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if not name.endswith('num_batches_tracked'):
            array = tensor.numpy()
            arrays[name] = array.T if array.ndim == 2 else array
    return arrays


def dump(content, path, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


def assert_filled(model, but=()):
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(but)) and 'num_batches' not in name:
            expected = fill({name: torch.empty_like(tensor)})[name]
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize('kind', KINDS)
def test_real_files(kind, data_dir):
    path = str(data_dir / f'paddle_{kind}.pdparams')
    model = build(kind, init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    assert_filled(model, but=('norm1', 'norm2', 'norm3', 'norm_'))
    classifier = build(kind, out_indices=(3,))
    classifier.head = nn.Linear(4, 5)
    report = load_pretrained(classifier, path)
    assert not report.missing_keys and not report.unexpected_keys
    assert_filled(classifier)


@pytest.mark.parametrize('extra', [False, True])
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_protocols(protocol, extra, tmp_path):
    model = build('rest', out_indices=(3,))
    fill(model.state_dict())
    content = arrays_of(model)
    if extra:
        content['StructuredToParameterName@@'] = dict.fromkeys(content, 'linear_0')
    path = dump(content, tmp_path / 'x.pdparams', protocol)
    other = build('rest', out_indices=(3,))
    load_pretrained(other, path)
    assert_filled(other)


@pytest.mark.parametrize('protocol', [2, 5])
def test_unusual_arrays(protocol, tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    content = OrderedDict(
        fortran=np.asfortranarray(x),
        big_endian=x.astype('>f4'),
        half=x.astype(np.float16),
        cube=x.reshape(3, 2, 2),
        number=np.array(3.0),
        empty=np.zeros((0, 2)),
        scalar=np.float32(2),
    )
    read = read_state_dict(dump(content, tmp_path / 'x.pdparams', protocol))
    for name in ('fortran', 'big_endian', 'half'):
        assert torch.equal(read[name].float(), torch.from_numpy(x.T)), name
    assert torch.equal(read['cube'], torch.from_numpy(x.reshape(3, 2, 2)))
    assert read['number'] == 3 and read['half'].dtype == torch.float16
    assert read['empty'].shape == (2, 0) and 'scalar' not in read


def test_published_model(tmp_path, data_dir):
    """The outputs of the published code come out."""
    model = build('rest', 'lite')
    fill(model.state_dict())
    path = dump(arrays_of(model), tmp_path / 'rest_lite.pdparams')
    loaded = build('rest', 'lite', init_cfg=dict(type='Pretrained', checkpoint=path))
    loaded.init_weights()
    golden = np.load(data_dir / 'golden_backbone64.npz')
    with torch.no_grad():
        outs = loaded.eval()(image((2, 3, 64, 96), 0))
    for stage, out in enumerate(outs, start=1):
        name = f'rest_lite/stage{stage}'
        expected = golden[name]
        error = np.abs(out.numpy() - expected).max() / np.abs(expected).max()
        assert error <= 2.5 * golden[f'{name}/published_float32_distance']


class Reduced:
    """Pickled as the call of a function, whose result may get a state."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


OBJECTS = np.empty(1, dtype=object)
FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
REBUILD = np.zeros(1).__reduce_ex__(2)[0]
REFUSED = {
    'os.system': Reduced(os.system, ('true',)),
    'eval': Reduced(eval, ('1',)),
    'getattr': Reduced(getattr, (b'', 'join')),
    'a class': types.SimpleNamespace(lr=1),
    'objects': OBJECTS,
    'records': np.zeros(1, dtype=[('x', 'i4')]),
    'objects in a buffer': Reduced(
        FROM_BUFFER, (b'12345678', np.dtype('O'), (1,), 'C')
    ),
    'a codec': Reduced(pickle.codecs.encode, ('x', 'rot13')),
}


@pytest.mark.parametrize('protocol', [2, 5])
@pytest.mark.parametrize('what', REFUSED)
def test_refused(what, protocol, tmp_path):
    """Anything but arrays is."""
    content = {'norm.weight': np.ones(4), 'extra': [{'x': REFUSED[what]}]}
    path = dump(content, tmp_path / 'x.pdparams', protocol)
    with pytest.raises(CheckpointError, match='safe loading refuses') as error:
        read_checkpoint(path)
    assert path in str(error.value)


def test_nothing_is_changed_by_a_file(tmp_path):
    """A pickle may set attributes of the functions that it is given."""
    stand_ins = [stand_in for stand_in, _ in safe_globals.ALLOWED]
    before = [set(vars(stand_in)) for stand_in in stand_ins]
    for function in (FROM_BUFFER, REBUILD, np.ndarray, np.dtype, OrderedDict):
        # the opcodes of the function, of a state, and BUILD
        opcodes = pickle.dumps(function, 2)[:-1]
        opcodes += pickle.dumps((None, {'__defaults__': (1,), 'x': 1}), 2)[2:-1]
        (tmp_path / 'x.pdparams').write_bytes(opcodes + b'b.')
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / 'x.pdparams')
    assert [set(vars(stand_in)) for stand_in in stand_ins] == before
    assert all(getattr(f, '__defaults__', None) != (1,) for f in stand_ins)


def test_a_few_bytes_take_no_memory(tmp_path):
    """A pickle says at which index of a list it remembers an object."""
    index = (2**26).to_bytes(4, 'little')
    (tmp_path / 'x.pdparams').write_bytes(b'\x80\x02}r' + index + b'.')
    tracemalloc.start()
    read_checkpoint(tmp_path / 'x.pdparams')
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (pickle.dumps([np.ones(2)]), 'it holds a list'),
        (pickle.dumps({'a': np.ones(99)})[:-50], r'a part is damaged \(\w+'),
        (b'\x80\x04garbage', 'a part is damaged'),
        (b'', 'empty'),
        (b'<html>please log in</html>', 'HTML'),
        (pickle.dumps({'a': 1}), 'holds no tensors'),
        (pickle.dumps({'a': np.array(['text'])}), 'holds no tensors'),
    ],
)
def test_unusable(content, message, tmp_path):
    (tmp_path / 'x.pdparams').write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / 'x.pdparams')


def test_other_names(tmp_path, data_dir):
    """Of another generation, and with another ending."""
    path = data_dir / 'paddle_restv2.pdparams'
    with pytest.raises(CheckpointError, match="set type='ResTV2'"):
        load_pretrained(build('rest'), path)
    shutil.copy(path, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'its name ends in \.pdparams'):
        read_checkpoint(tmp_path / 'x.pth')


def test_torch_file_of_that_name(tmp_path, weights):
    torch.save(weights, tmp_path / 'x.pdparams')
    assert read_state_dict(tmp_path / 'x.pdparams').keys() == weights.keys()
