"""Hooks and what else MMEngine's Runner takes from this package."""

from ..optim.layer_decay import LayerDecayOptimWrapperConstructor
from ..strategies.fsdp import BlockFSDPStrategy, rest_block_wrap_policy
from .atomic_checkpoint import WholeCheckpointHook
from .label_range import LabelRangeError, LabelRangeHook
from .nonfinite import CheckNonFiniteHook, NonFiniteError
from .preemption import PreemptionHook
from .stop_signals import Preempted, StopSignals

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
