"""ResT, an efficient multi-scale vision Transformer, for OpenMMLab.

Importing the package registers its classes with MMEngine and its ImageNet models with
MMPretrain, makes ``mmrest::`` a scope of configs, and lets PyTorch's safe loading read
MMEngine's own checkpoints. It changes nothing else.
"""

import sys

from .version import __version__

__all__ = ['__version__']

# `python -m mmrest.doctor` must run even if the imports below fail. At this point,
# sys.argv only holds `-m` in Python 3.9.
_argv = getattr(sys, 'orig_argv', None)
if 'mmrest.doctor' not in (_argv or ()) and (_argv or sys.argv[:1] != ['-m']):
    try:
        from mmengine.config.utils import MODULE2PACKAGE

        from . import datasets, hooks, optim, strategies
        from .checkpoint import allow_mmengine_checkpoints
        from .models import ResT, ResTV2
        from .utils.toolboxes import list_in_mmpretrain, register_in_toolboxes
    # a missing package, another one's check of versions, NumPy's ABI
    except (ImportError, AssertionError, ValueError) as error:
        raise ImportError(
            f'mmrest cannot be imported: {error}. It needs torch, mmengine and mmcv, '
            'in versions that fit one another; `python -m mmrest.doctor` says what is '
            'installed and how to mend it.'
        ) from error
    # MMEngine looks for `.mim/configs` next to this module. Next to that of the
    # distribution `mmrest`, it would find none of an editable install.
    MODULE2PACKAGE['mmrest'] = 'mmrest.config'
    allow_mmengine_checkpoints()
    register_in_toolboxes(ResT)
    register_in_toolboxes(ResTV2)
    list_in_mmpretrain()
    __all__ += ['ResT', 'ResTV2', 'datasets', 'hooks', 'optim', 'strategies']
