"""Inference: predictions, pictures and attention of images.

=========================  =======================================================
``inferencer.py``          predictions of a config and a checkpoint
``inputs.py``              images from files, folders, URLs, videos and cameras
``outputs.py``             pictures, videos and JSON in a folder
``attention.py``           the attention of a point in an image
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
