"""Weights and images that follow from names, shapes and seeds alone.

Two models whose state dicts have the same keys get the same weights from
:func:`fill`, so the golden arrays in ``tests/data`` need no weight file. The rule
is fixed: the arrays were made with it by the published implementation.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _draw(key: str, shape: Sequence[int], gains: dict[str, float]) -> np.ndarray:
    rng = _rng(zlib.crc32(key.encode()))
    if key.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    if key.endswith('running_var'):
        return rng.uniform(0.5, 1.5, shape)
    if key.endswith('running_mean'):
        return 0.1 * rng.standard_normal(shape)
    if key.endswith('bias'):
        return 0.02 * rng.standard_normal(shape)
    if len(shape) == 1:  # the weight of a norm
        return 1 + 0.1 * rng.standard_normal(shape)
    gain = next((value for part, value in gains.items() if part in key), 1.0)
    return gain * rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


def fill(
    state_dict: dict[str, Tensor], gains: Optional[dict[str, float]] = None
) -> dict[str, Tensor]:
    """Overwrite every tensor in place; ``gains`` maps parts of keys to factors."""
    for key, tensor in state_dict.items():
        value = np.asarray(_draw(key, tuple(tensor.shape), gains or {}))
        tensor.copy_(torch.from_numpy(value).to(tensor.dtype))
    return state_dict


def image(shape: Sequence[int], seed: int = 0) -> Tensor:
    """A standard-normal float32 image batch."""
    return torch.from_numpy(_rng(seed).standard_normal(shape).astype(np.float32))
