"""Checkpoints: read safely, load exactly, choose one to resume, write whole.

=======================  ====================================================
``reading.py``           a file or URL becomes the object that it holds
``safetensors_files.py`` the format of safetensors
``paddle_files.py``      the format of PaddlePaddle
``safe_globals.py``      what safe loading needs for MMEngine's checkpoints
``url_loaders.py``       safe loading of whatever a process reads
``state_dict.py``        the tensors in a file, whatever they are wrapped in
``comparison.py``        those of a file against those of a module
``loading.py``           tensors go into a module: all that fit, or none
``classifier.py``        published classifiers in MMPretrain's model
``load_from.py``         will MMEngine load what is meant?
``resume.py``            which checkpoint a run continues from
``atomic.py``            files that are written whole or not at all
=======================  ====================================================
"""

from .atomic import CheckpointWriteError
from .classifier import (
    PublishedClassifierHook,
    load_published_classifier,
    to_image_classifier,
)
from .load_from import check_content, check_load_from, check_parent_init
from .loading import LoadReport, load_pretrained, pretrained_options
from .reading import CheckpointError, CheckpointNotFoundError, read_checkpoint
from .resume import choose_checkpoint, find_latest, inspect_latest
from .safe_globals import allow_mmengine_checkpoints
from .state_dict import read_state_dict
from .url_loaders import force_safe_loading

__all__ = [
    'CheckpointError',
    'CheckpointNotFoundError',
    'CheckpointWriteError',
    'LoadReport',
    'PublishedClassifierHook',
    'allow_mmengine_checkpoints',
    'check_content',
    'check_load_from',
    'check_parent_init',
    'choose_checkpoint',
    'find_latest',
    'force_safe_loading',
    'inspect_latest',
    'load_pretrained',
    'load_published_classifier',
    'pretrained_options',
    'read_checkpoint',
    'read_state_dict',
    'to_image_classifier',
]
