"""Checkpoints: read safely, load completely, choose one to resume, write atomically.

=======================  ====================================================
``reading.py``           read a file or URL, with safe loading
``safetensors_files.py`` files of safetensors
``paddle_files.py``      files of PaddlePaddle
``safe_globals.py``      what safe loading needs for MMEngine's checkpoints
``url_loaders.py``       safe loading in MMEngine's own loaders
``state_dict.py``        find the tensors in a checkpoint
``comparison.py``        compare tensors with those of a module
``loading.py``           load all tensors that fit, or none
``classifier.py``        published classifiers in MMPretrain's model
``load_from.py``         check what MMEngine is about to load
``resume.py``            choose the checkpoint from which a run continues
``atomic.py``            write files completely or not at all
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
