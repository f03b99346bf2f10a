"""ResT, the efficient multi-scale vision Transformer, for OpenMMLab.

Importing the package registers ``ResT`` in MMEngine's root registry.
"""

import sys

from .version import __version__

# `python -m mmrest.doctor` must run where the imports below fail.
_DOCTOR = 'mmrest.doctor'

if _DOCTOR in getattr(sys, 'orig_argv', ()):
    __all__ = ['__version__']
else:
    try:
        from .checkpoint import allow_mmengine_checkpoints
        from .config_scope import register_config_scope
        from .models import ResT
    except ImportError as error:
        raise ImportError(
            f'mmrest cannot be imported: {error}. It needs torch, mmengine and mmcv, '
            'in versions that fit one another; `python -m mmrest.doctor` says what is '
            'installed and how to mend it.'
        ) from error
    register_config_scope()
    allow_mmengine_checkpoints()
    __all__ = ['ResT', '__version__']
