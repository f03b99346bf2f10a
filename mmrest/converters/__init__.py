"""Conversion of published ResT detectors to mmdet models, and back.

====================  ====================================================
``layout.py``         names and shapes of a detector, in both forms
``detectron2.py``     conversion of state dicts, both ways
``files.py``          conversion of checkpoint files
``cli.py``            command lines of the tools in ``tools/model_converters``
====================  ====================================================
"""

from .detectron2 import (
    Conversion,
    ConversionError,
    recognise,
    to_detectron2,
    to_mmdet,
)
from .files import convert_to_detectron2, convert_to_mmdet, publish
from .layout import Detector, Entry, entries

__all__ = [
    'Conversion',
    'ConversionError',
    'Detector',
    'Entry',
    'convert_to_detectron2',
    'convert_to_mmdet',
    'entries',
    'publish',
    'recognise',
    'to_detectron2',
    'to_mmdet',
]
