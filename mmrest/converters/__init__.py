"""Published ResT detectors as mmdet models, and back.

====================  ====================================================
``layout.py``         names and shapes of a detector, under both names
``detectron2.py``     state dict to state dict, both ways
``files.py``          checkpoint files around them, written whole or not
``cli.py``            what the tools in ``tools/model_converters`` share
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
