"""Deprecated names of ``mmrest.hooks``, ``mmrest.optim`` and ``mmrest.strategies``."""

import warnings

from .hooks import (
    CheckNonFiniteHook,
    LabelRangeError,
    LabelRangeHook,
    NonFiniteError,
    Preempted,
    PreemptionHook,
    StopSignals,
    WholeCheckpointHook,
)
from .optim import LayerDecayOptimWrapperConstructor
from .strategies import BlockFSDPStrategy, rest_block_wrap_policy

__all__ = [
    'BlockFSDPStrategy',
    'CheckNonFiniteHook',
    'LayerDecayOptimWrapperConstructor',
    'LabelRangeError',
    'LabelRangeHook',
    'NonFiniteError',
    'Preempted',
    'PreemptionHook',
    'StopSignals',
    'WholeCheckpointHook',
    'rest_block_wrap_policy',
]

warnings.warn(
    'mmrest.engine is now mmrest.hooks, mmrest.optim and mmrest.strategies',
    DeprecationWarning,
    stacklevel=2,
)
