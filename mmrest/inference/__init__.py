"""Inference: images go in, predictions, pictures and attention come out.

================  ==============================================================
``inferencer.py`` a config and a checkpoint become predictions, drawn or as JSON
``inputs.py``     images of files, folders, addresses, videos and cameras
``outputs.py``    pictures, videos and JSON in a folder
================  ==============================================================
"""

from .inferencer import InferenceError, Inferencer, init_inferencer
from .inputs import read_image, read_inputs
from .outputs import OutputFolder, infer

__all__ = [
    'InferenceError',
    'Inferencer',
    'OutputFolder',
    'infer',
    'init_inferencer',
    'read_image',
    'read_inputs',
]
