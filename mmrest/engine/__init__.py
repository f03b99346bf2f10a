"""Hooks and what else MMEngine's Runner takes from this package."""

from .label_range import LabelRangeHook
from .optim import LayerDecayOptimWrapperConstructor

__all__ = ['LayerDecayOptimWrapperConstructor', 'LabelRangeHook']
