"""What ``torch.load(weights_only=True)`` needs for MMEngine's own checkpoints.

A checkpoint of MMEngine's Runner holds, beside tensors and plain values, the
history of the losses: ``HistoryBuffer`` objects of numpy arrays, pickled with
``builtins.getattr`` for the buffers' four methods. torch refuses all of these
unless they are allow-listed.

The usual advice is to allow-list the real ones. That is not safe: ``getattr``
reaches any function, and with ``numpy.dtype`` a file can describe an array of
objects over bytes of its own choice, so that numpy follows pointers that the file
made up. So what is allow-listed here under those names are stand-ins that do what
such a checkpoint needs and nothing else: numeric and text arrays from bytes, and
the four methods.
"""

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer

FORCE_SAFE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
FORCE_UNSAFE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'

STATISTICS = ('min', 'max', 'mean', 'current')
# bool, signed, unsigned, float, complex, bytes, text: no objects, no records
PLAIN_KINDS = 'biufcSU'
BYTE_ORDERS = (('<',), ('>',), ('|',), ('=',))
MAX_NDIM = 32

_ENVIRONMENT = threading.RLock()


class _Dtype:
    """Stands in for ``numpy.dtype`` while a checkpoint is read."""

    def __init__(self, code: Any = None, align: Any = False, copy: Any = True):
        if not isinstance(code, str):
            raise refusal(f'the numpy dtype {code!r}')
        self.dtype = _plain(np.dtype(code))

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, ...): of a plain type
        # only the byte order means anything
        if not (isinstance(state, tuple) and state[1:2] in BYTE_ORDERS):
            raise refusal('the state of a numpy dtype')
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that takes its content from a pickle only if it is plain data."""

    def __new__(cls) -> '_Array':
        return super().__new__(cls, (0,))

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise refusal('the state of a numpy array')
        version, shape, dtype, fortran, raw = state
        plain = (
            version == 1
            and isinstance(shape, tuple)
            and len(shape) <= MAX_NDIM
            and all(isinstance(n, int) and n >= 0 for n in shape)
            and isinstance(raw, bytes)
        )
        if not plain:
            raise refusal('a numpy array of other things than numbers and text')
        super().__setstate__((1, shape, real_dtype(dtype), bool(fortran), raw))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # saved again, it is a plain array
        return self.view(np.ndarray).__reduce_ex__(protocol)


class _ArrayType:
    """Stands in for ``numpy.ndarray``, the argument of ``_reconstruct``."""


class _HistoryBuffer(HistoryBuffer):
    """Becomes a ``HistoryBuffer`` of two arrays, whatever else a file says."""

    def __init__(self) -> None:  # called with arguments only by a forged file
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        # the file's `statistics_methods` would replace those of the class
        self._set_default_statistics()
        state = state if isinstance(state, dict) else {}
        arrays = [state.get(key) for key in ('_log_history', '_count_history')]
        max_length = state.get('max_length')
        if not isinstance(max_length, int) or not all(
            isinstance(x, np.ndarray) and x.ndim == 1 and x.dtype.kind in 'biuf'
            for x in arrays
        ):
            raise refusal('the state of a HistoryBuffer')
        self.max_length = max_length
        self._log_history, self._count_history = (np.array(x) for x in arrays)
        self.__class__ = HistoryBuffer


def _reconstruct(*args: Any) -> _Array:
    return _Array()


def _scalar(dtype: Any, raw: Any = None) -> Any:
    dtype = real_dtype(dtype)
    if not isinstance(raw, bytes) or len(raw) != dtype.itemsize:
        raise refusal('the value of a numpy scalar')
    # a text of no letters has no bytes to read
    return np.frombuffer(raw, dtype)[0] if raw else dtype.type()


def _no_bytes() -> bytes:
    return b''


def _statistics_method(owner: Any, name: Any) -> Any:
    known = owner is HistoryBuffer or owner is _HistoryBuffer
    if not known or name not in STATISTICS:
        raise refusal(f'builtins.getattr({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name)


def real_dtype(dtype: Any) -> np.dtype:
    """Return the numpy dtype that a stand-in holds, if it is of plain data."""
    return _plain(dtype.dtype if isinstance(dtype, _Dtype) else dtype)


def _plain(dtype: Any) -> np.dtype:
    # a forged dtype can be of a numeric kind and have fields
    if not (
        isinstance(dtype, np.dtype)
        and dtype.kind in PLAIN_KINDS
        and dtype.fields is None
        and dtype.subdtype is None
    ):
        raise refusal(f'the numpy dtype {dtype!r}')
    return dtype


def refusal(what: str) -> pickle.UnpicklingError:
    """The error that :mod:`.reading` turns into a ``RefusedError``."""
    return pickle.UnpicklingError(f'mmrest refuses {what}')


# numpy 2 moved its core; a file names the numpy that wrote it
ALLOWED: tuple[tuple[Any, str], ...] = (
    (_HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_statistics_method, 'builtins.getattr'),
    (_reconstruct, 'numpy.core.multiarray._reconstruct'),
    (_reconstruct, 'numpy._core.multiarray._reconstruct'),
    (_scalar, 'numpy.core.multiarray.scalar'),
    (_scalar, 'numpy._core.multiarray.scalar'),
    (_ArrayType, 'numpy.ndarray'),
    (_Dtype, 'numpy.dtype'),
    (_no_bytes, 'builtins.bytes'),  # how empty data is pickled
    # made by _reconstruct; torch sets the state of allow-listed types alone
    (_Array, f'{__name__}._Array'),
)


def mmengine_globals_allowed() -> bool:
    """Whether this torch can allow-list what mmengine's checkpoints hold.

    torch 2.4 and 2.5 have ``add_safe_globals`` but cannot name a stand-in.
    """
    release = torch.__version__.split('+')[0].split('.')
    return (int(release[0]), int(release[1])) >= (2, 6)


def allow_mmengine_checkpoints() -> bool:
    """Let safe loading read the checkpoints that mmengine's Runner writes.

    Without it, torch 2.6 and later refuse to resume any run of mmengine. It can
    be called any number of times. Nothing that runs code is allow-listed, see
    the head of this file; a payload is refused as before.

    Returns:
        bool: Whether such checkpoints can be read. False before torch 2.6, where
        nothing is changed.
    """
    if not mmengine_globals_allowed():
        return False
    if hasattr(mmengine_checkpoint, 'get_torch_safe_globals'):
        return True  # onedl-mmengine allow-lists the real ones while it reads
    present = set(torch.serialization.get_safe_globals())
    # nor would a mixture with the real ones work, should a user have added them
    if np.dtype not in present and not present.issuperset(ALLOWED):
        torch.serialization.add_safe_globals(list(ALLOWED))
    return True


@contextmanager
def stand_ins_only() -> Iterator[None]:
    """Read with the stand-ins, even where the real ones are allow-listed.

    What else has been allow-listed stays so. No-op before torch 2.6.
    """
    if not mmengine_globals_allowed():
        yield
        return
    present = torch.serialization.get_safe_globals()
    names = {name for _, name in ALLOWED}
    others = [item for item in present if _path(item) not in names]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*others, *ALLOWED])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(present)


def _path(item: Any) -> str:
    if isinstance(item, tuple):
        return item[1]
    return f'{item.__module__}.{item.__qualname__}'


@contextmanager
def weights_only_forced() -> Iterator[None]:
    """Have every ``torch.load`` be a safe one, whatever its caller asks for."""
    # one thread at a time: another's end must not switch safety off here
    with _ENVIRONMENT:
        names = (FORCE_SAFE, FORCE_UNSAFE)
        before = {name: os.environ.pop(name, None) for name in names}
        os.environ[FORCE_SAFE] = '1'
        try:
            yield
        finally:
            del os.environ[FORCE_SAFE]
            os.environ.update({k: v for k, v in before.items() if v is not None})
