"""Hooks and what else MMEngine's Runner takes from this package."""

from .label_range import LabelRangeHook

__all__ = ['LabelRangeHook']
