"""Inference: images go in, predictions, pictures and attention come out.

=========================  =======================================================
``inferencer.py``          a config and a checkpoint become predictions
``inputs.py``              images of files, folders, addresses, videos and cameras
``outputs.py``             pictures, videos and JSON in a folder
``attention.py``           what a point of an image attends to
``attention_pictures.py``  pictures of it
=========================  =======================================================
"""

from .attention import PointAttention, StageAttention, attend, attend_in_network
from .inferencer import InferenceError, Inferencer, init_inferencer
from .inputs import read_image, read_inputs
from .outputs import OutputFolder, infer

__all__ = [
    'InferenceError',
    'Inferencer',
    'OutputFolder',
    'PointAttention',
    'StageAttention',
    'attend',
    'attend_in_network',
    'infer',
    'init_inferencer',
    'read_image',
    'read_inputs',
]
