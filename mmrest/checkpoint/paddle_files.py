"""Checkpoints of PaddlePaddle (``.pdparams``), read without PaddlePaddle.

``paddle.save(model.state_dict(), path)`` writes a pickle of a dict from names to numpy
arrays. The unpickler here accepts such arrays and plain values only.

Names and linear layers are those of PaddleViT's port of ResT. They are converted to the
published ones: ``stages.0.1`` becomes ``stage1.1``, ``patch_embeds.0`` becomes
``patch_embed_2`` (ResT) or ``patch_2`` (ResTV2), and matrices are transposed.
"""

import pickle
import re
from typing import Any, Callable, Union

import numpy as np
import torch

from .safe_globals import ALLOWED, real_dtype, refusal


def is_paddle(path: str) -> bool:
    """Whether a file has this format, by its suffix and first byte."""
    if not path.endswith('.pdparams'):
        return False
    with open(path, 'rb') as file:
        return file.read(1) == pickle.PROTO


def read_paddle(path: str, device: Union[str, torch.device] = 'cpu') -> dict[str, Any]:
    """Read a file, with tensors instead of arrays and with the published names.

    Raises:
        pickle.UnpicklingError: If the file asks for anything but arrays.
        ValueError: If it does not hold a dict.
    """
    with open(path, 'rb') as file:
        content = _ArrayUnpickler(file).load()
    if not isinstance(content, dict):
        raise ValueError(f'it holds a {type(content).__name__}, not a dict of arrays')
    return _convert(content, device)


# In Python, since a file of a few bytes can make the one in C allocate 32 GB
class _ArrayUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Callable:
        function = _FUNCTIONS.get(f'{module}.{name}')
        if function is None:
            raise refusal(f'{module}.{name}')
        # a new function each time, since a pickle can set its attributes
        return lambda *args: function(*args)

    def persistent_load(self, pid: Any) -> Any:
        raise refusal('a reference to another file')


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(buffer, real_dtype(dtype)).reshape(shape, order=order)


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != 'latin1':
        raise refusal(f'_codecs.encode({encoding!r})')
    return text.encode('latin1')


_FUNCTIONS: dict[str, Callable] = {
    **{name: f for f, name in ALLOWED if name.startswith(('numpy.', 'builtins.bytes'))},
    'numpy.core.numeric._frombuffer': _from_buffer,  # protocol 5
    'numpy._core.numeric._frombuffer': _from_buffer,
    '_codecs.encode': _encode,  # bytes in protocol 2
    '__builtin__.bytes': bytes,
    'collections.OrderedDict': dict,
    # Paddle pickles tensors in a nested dict as tuple((name, array))
    'builtins.tuple': tuple,
    '__builtin__.tuple': tuple,
}


def _convert(content: dict, device: Any) -> dict[str, Any]:
    """Convert arrays to tensors and names to the published ones."""
    is_v2 = any('patch_embeds.0.proj.' in str(name) for name in content)
    patch_embed = 'patch' if is_v2 else 'patch_embed'
    converted: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]
        if isinstance(value, dict):
            value = _convert(value, device)
        if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
            value = _tensor(value).to(device)
        converted[_published_name(str(name), patch_embed)] = value
    return converted


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.ndim == 2:  # of a linear layer, whose weight is (in, out) in Paddle
        array = array.T
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder('='), order='C'))


def _published_name(name: str, patch_embed: str) -> str:
    name = re.sub(r'\bstages\.(\d+)', lambda m: f'stage{int(m[1]) + 1}', name)
    name = re.sub(
        r'\bpatch_embeds\.(\d+)', lambda m: f'{patch_embed}_{int(m[1]) + 2}', name
    )
    name = re.sub(r'\._mean$', '.running_mean', name)
    return re.sub(r'\._variance$', '.running_var', name)
