"""Reading checkpoints: safely, from any published form, and with exactness.

====================  ====================================================
``reading.py``        a file or URL becomes the object that it holds
``diagnosis.py``      what a file that is no checkpoint is instead
``state_dicts.py``    the tensors in it, whatever they are wrapped in
``loading.py``        tensors go into a module: all that fit, or none
``runner_check.py``   will mmengine's ``load_from`` do what is meant?
``classifier.py``     published classifiers in MMPretrain's model
``safe_globals.py``   what safe loading needs for mmengine's own checkpoints
``addresses.py``      mmengine's own loader reads addresses safely
``latest.py``         which checkpoint a run continues from
``writing.py``        files that are written whole or not at all
====================  ====================================================
"""

from .atomic import CheckpointWriteError
from .classifier import PublishedClassifierHook, to_image_classifier
from .errors import CheckpointError
from .load_from import check_load_from
from .loading import LoadReport, load_pretrained
from .reading import read_checkpoint
from .resume import check_agreement, find_latest, inspect_latest
from .safe_globals import allow_mmengine_checkpoints, force_safe_loading
from .state_dict import read_state_dict
from .url_loaders import read_addresses_safely

__all__ = [
    'CheckpointError',
    'CheckpointWriteError',
    'LoadReport',
    'PublishedClassifierHook',
    'allow_mmengine_checkpoints',
    'check_agreement',
    'check_load_from',
    'find_latest',
    'force_safe_loading',
    'inspect_latest',
    'load_pretrained',
    'read_addresses_safely',
    'read_checkpoint',
    'read_state_dict',
    'to_image_classifier',
]
