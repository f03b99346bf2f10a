# the variants register themselves
from . import attentions, positions, stems  # noqa: F401
from .parts import ATTENTIONS, POSITIONS, STEMS
from .rest import ResT

__all__ = ['ATTENTIONS', 'POSITIONS', 'STEMS', 'ResT']
