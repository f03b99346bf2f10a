"""What ``torch.load(weights_only=True)`` needs for MMEngine's own checkpoints.

Besides tensors and plain values, a checkpoint of MMEngine's Runner holds the history of
the losses. It consists of ``HistoryBuffer`` objects with numpy arrays, pickled with
``builtins.getattr`` for four of their methods. torch refuses all of these unless they
are allow-listed.

The usual advice is to allow-list the real objects. That is not safe: ``getattr``
reaches any function. With ``numpy.dtype``, a file can describe an array of objects over
bytes of its own choice, so that numpy follows forged pointers. Here, stand-ins are
allow-listed under those names. They only do what such a checkpoint needs: make numeric
and text arrays from bytes, and return the four methods.
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
        # (version, byte order, subarray, names, fields, ...); for a plain type only
        # the byte order matters
        if not (isinstance(state, tuple) and state[1:2] in BYTE_ORDERS):
            raise refusal('the state of a numpy dtype')
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that accepts only plain data from a pickle."""

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
    """Becomes a ``HistoryBuffer`` of two arrays; other state in a file is ignored."""

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
    # np.frombuffer refuses an empty string
    return np.frombuffer(raw, dtype)[0] if raw else dtype.type()


def _no_bytes() -> bytes:
    return b''


def _statistics_method(owner: Any, name: Any) -> Any:
    known = owner is HistoryBuffer or owner is _HistoryBuffer
    if not known or name not in STATISTICS:
        raise refusal(f'builtins.getattr({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name)


def real_dtype(dtype: Any) -> np.dtype:
    """Return the numpy dtype of a stand-in, if it is one of plain data."""
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


# numpy 2 moved its core, and files contain the names of the numpy that wrote them
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
    # torch sets the state of allow-listed types only
    (_Array, f'{__name__}._Array'),
)


def mmengine_globals_allowed() -> bool:
    """Whether this torch can allow-list the objects in MMEngine's checkpoints.

    torch 2.4 and 2.5 have ``add_safe_globals``, but cannot name a stand-in.
    """
    release = torch.__version__.split('+')[0].split('.')
    return (int(release[0]), int(release[1])) >= (2, 6)


def allow_mmengine_checkpoints() -> bool:
    """Let safe loading read the checkpoints that MMEngine's Runner writes.

    Without it, torch 2.6 and later cannot resume a run of MMEngine. Nothing that runs
    code is allow-listed, see the top of this file. It may be called repeatedly.

    Returns:
        bool: Whether such checkpoints can be read. False before torch 2.6, where
        nothing is changed.
    """
    if not mmengine_globals_allowed():
        return False
    if hasattr(mmengine_checkpoint, 'get_torch_safe_globals'):
        return True  # onedl-mmengine allow-lists the real ones while it reads
    present = set(torch.serialization.get_safe_globals())
    # a mixture with the real ones, should a user have added them, would not work
    if np.dtype not in present and not present.issuperset(ALLOWED):
        torch.serialization.add_safe_globals(list(ALLOWED))
    return True


@contextmanager
def stand_ins_only() -> Iterator[None]:
    """Read with the stand-ins, even if the real objects are allow-listed.

    Other allow-listed objects are kept. It does nothing before torch 2.6.
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
    """Make every ``torch.load`` a safe one, whatever its arguments."""
    # one thread at a time, since another one must not turn safety off at its end
    with _ENVIRONMENT:
        names = (FORCE_SAFE, FORCE_UNSAFE)
        before = {name: os.environ.pop(name, None) for name in names}
        os.environ[FORCE_SAFE] = '1'
        try:
            yield
        finally:
            del os.environ[FORCE_SAFE]
            os.environ.update({k: v for k, v in before.items() if v is not None})
