"""MMEngine's own checkpoints are read under safe loading, and nothing else."""

import functools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import toy_run
from mmengine.logging import HistoryBuffer
from toy_run import train

from mmrest.checkpoint import (
    CheckpointError,
    allow_mmengine_checkpoints,
    force_safe_loading,
    read_checkpoint,
    read_state_dict,
)
from mmrest.checkpoint import safe_globals as module
from mmrest.checkpoint.safe_globals import ALLOWED

pytestmark = pytest.mark.skipif(
    not module.mmengine_globals_allowed(),
    reason='before torch 2.6 nothing can be allow-listed under another name',
)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    """A run of four epochs: its folder and its state at the end."""
    folder = tmp_path_factory.mktemp('whole')
    return folder, train(folder)


@pytest.mark.slow
def test_resume_in_a_fresh_process(whole_run, tmp_path, repo):
    """Resumed after two epochs, a run ends as if it had not been stopped."""
    folder, expected = whole_run
    out = tmp_path / 'state.json'
    done = subprocess.run(
        [sys.executable, toy_run.__file__, tmp_path, folder / 'epoch_2.pth', out],
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(repo)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    state = json.loads(out.read_text())
    assert state == expected
    assert state['kind'] == 'HistoryBuffer' and len(state['loss']) == 8


@pytest.fixture
def nothing_allowed():
    """Take what is allow-listed away for the time of a test."""
    present = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(present)


def test_without_it_torch_refuses(whole_run, nothing_allowed):
    """If this fails, mmengine has changed and the allow-list can go."""
    with pytest.raises(pickle.UnpicklingError, match='was not an allowed global'):
        torch.load(whole_run[0] / 'epoch_2.pth', weights_only=True)


def test_what_such_a_checkpoint_needs(whole_run, nothing_allowed):
    """Nothing else is allow-listed than what the checkpoint names."""
    names = set(
        torch.serialization.get_unsafe_globals_in_checkpoint(
            str(whole_run[0] / 'epoch_2.pth')
        )
    )
    allowed = {name for _, name in ALLOWED}
    assert names <= allowed
    # the names of the other numpy, empty data, and a stand-in for its own state
    assert {
        name
        for name in allowed - names
        if not name.startswith(('numpy.core.', 'numpy._core.'))
    } == {'builtins.bytes', f'{module.__name__}._Array'}


def test_weights_of_such_a_checkpoint(whole_run):
    folder, expected = whole_run
    state = read_state_dict(folder / 'epoch_4.pth')
    assert list(state) == list(expected['weights'])
    hub = read_checkpoint(folder / 'epoch_4.pth')['message_hub']
    history = hub['log_scalars']['train/loss']
    assert type(history) is HistoryBuffer
    assert history.data[0].tolist() == expected['loss']
    assert type(history.data[0]) is np.ndarray
    assert history.current() == expected['loss'][-1]


def test_called_twice():
    before = set(torch.serialization.get_safe_globals())
    assert allow_mmengine_checkpoints() and allow_mmengine_checkpoints()
    # onedl-mmengine has an allow-list of its own, with which ours would collide
    twin = hasattr(module.mmengine_checkpoint, 'get_torch_safe_globals')
    expected = before if twin else before | set(ALLOWED)
    assert set(torch.serialization.get_safe_globals()) == expected


def test_real_functions_are_not_allowed():
    real = [getattr, eval, exec, __import__, functools.partial, np.dtype, np.ndarray]
    real += [np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0], HistoryBuffer]
    allow_mmengine_checkpoints()
    values = [
        item[0] if isinstance(item, tuple) else item
        for item in torch.serialization.get_safe_globals()
    ]
    assert not [f for f in real if any(f is v for v in values)]


class Call:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class Forged(HistoryBuffer):
    """Pickled as a HistoryBuffer of any state."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return HistoryBuffer, (), self.state


EMPTY = np.array([])
GOOD = {'max_length': 9, '_log_history': EMPTY, '_count_history': EMPTY}


@pytest.mark.parametrize(
    'content',
    [
        Call(getattr, (HistoryBuffer, '__init__')),
        Call(getattr, (HistoryBuffer, '__init_subclass__')),
        Call(getattr, (HistoryBuffer([1], [1]), 'min')),
        Call(getattr, (torch.Tensor, 'numpy')),
        Call(np.dtype, ('O',)),
        Call(np.dtype, ([('a', 'O')],)),
        Call(np.dtype, ('V8',)),
        Call(np.dtype, ('f4,f4',)),
        Call(np.dtype, ('(2,)f4',)),
        Call(np.dtype, ('M8[s]',)),
        Call(np.ndarray, ((2,), 'O', b'1' * 16)),
        Call(HistoryBuffer, ([1], [1])),
        Call(bytes, (10**6,)),
        Forged({}),
        Forged([('max_length', 1)]),
        Forged({**GOOD, 'max_length': 'x'}),
        Forged({**GOOD, '_log_history': [1.0]}),
        Forged({**GOOD, '_log_history': np.array(['a'])}),
        Forged({**GOOD, '_count_history': np.zeros((2, 2))}),
        np.array([None]),
        np.array([HistoryBuffer([1], [1])]),
        np.array(['2020-01-01'], dtype='M8[D]'),
        np.void(b'12'),
    ],
)
def test_misuse_of_the_allowed_names(save, content):
    path = save({'state_dict': {'w': torch.ones(1)}, 'x': content})
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        allow_mmengine_checkpoints()
        torch.load(path, weights_only=True)


class ForgedArray:
    """An array of one object, whose pointer the file makes up.

    With the real numpy.dtype allow-listed, looking at it ends the process.
    """

    class Dtype:
        def __reduce__(self):
            fields = {'a': (np.dtype('f8'), 0)}
            return (
                np.dtype,
                ('f8', False, True),
                (3, '|', None, ('a',), fields, 8, 1, 1),
            )

    def __reduce__(self):
        reconstruct = np.array(0).__reduce__()[0]
        state = (1, (1,), ForgedArray.Dtype(), False, b'A' * 8)
        return reconstruct, (np.ndarray, (0,), b'b'), state


def test_forged_dtype(save):
    """Fields and flags of a forged dtype come to nothing: a number is a number."""
    path = save({'x': ForgedArray(), 'w': torch.ones(1)})
    array = read_checkpoint(path)['x']
    assert array.dtype == np.float64 and array.dtype.fields is None
    assert array.dtype.flags == 0 and not array.dtype.hasobject
    assert array[0] == np.frombuffer(b'A' * 8)[0]


def test_statistics_of_the_class_stay(save):
    """A file cannot change how all losses of the process are averaged."""
    before = dict(HistoryBuffer._statistics_methods)
    forged = Forged({**GOOD, 'statistics_methods': {'mean': 'x', 'new': 'y'}, 'z': 1})
    history = read_checkpoint(save({'x': forged, 'w': torch.ones(1)}))['x']
    assert HistoryBuffer._statistics_methods == before
    assert not hasattr(history, 'z') and history.max_length == 9


def test_beside_allow_lists_of_others(save, nothing_allowed):
    """Reading does not depend on what a user allow-listed, nor changes it."""
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    path = save({'x': buffer, 'y': np.float32(2), 'w': torch.ones(1)})
    forged = save({'x': np.array([None])}, 'forged.pth')
    reconstruct, scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    real = [getattr, np.dtype, np.ndarray, reconstruct, scalar, HistoryBuffer, slice]
    torch.serialization.add_safe_globals(real)
    assert allow_mmengine_checkpoints()
    assert set(torch.serialization.get_safe_globals()) == set(real)
    assert read_checkpoint(path)['x'].mean() == 1.5
    with pytest.raises(CheckpointError):
        read_checkpoint(forged)
    assert set(torch.serialization.get_safe_globals()) == set(real)


def test_before_torch_2_6(monkeypatch, save, weights):
    monkeypatch.setattr(torch, '__version__', '2.1.2+cu121')
    before = torch.serialization.get_safe_globals()
    assert allow_mmengine_checkpoints() is False
    assert force_safe_loading() is False
    assert torch.serialization.get_safe_globals() == before
    assert read_state_dict(save({'model': weights})).keys() == weights.keys()
