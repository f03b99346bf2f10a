"""Optimizer wrappers and their constructors, in MMEngine's root registry."""

from . import amp  # noqa: F401  registers its wrapper
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['LayerDecayOptimWrapperConstructor']
