"""Hooks of MMEngine's Runner, in its root registry."""

from .atomic_checkpoint import AtomicCheckpointHook, WholeCheckpointHook
from .label_range import LabelRangeError, LabelRangeHook
from .nonfinite import CheckNonFiniteHook, NonFiniteError
from .preemption import Preempted, PreemptionHook, StopSignals, WorkerShield

__all__ = [
    'AtomicCheckpointHook',
    'CheckNonFiniteHook',
    'LabelRangeError',
    'LabelRangeHook',
    'NonFiniteError',
    'Preempted',
    'PreemptionHook',
    'StopSignals',
    'WholeCheckpointHook',
    'WorkerShield',
]
