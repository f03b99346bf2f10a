"""ResT, the efficient multi-scale vision Transformer, for OpenMMLab.

Importing the package registers its classes with MMEngine and its ImageNet models with
MMPretrain, makes ``mmrest::`` known as a scope of configs, and lets PyTorch's safe
loading read MMEngine's own checkpoints. It changes nothing else in the process.
"""

import sys

from .version import __version__

__all__ = ['__version__']

# `python -m mmrest.doctor` must run where the imports below fail. Python 3.9 shows no
# more than the `-m` at this point.
_argv = getattr(sys, 'orig_argv', None)
if 'mmrest.doctor' not in (_argv or ()) and (_argv or sys.argv[:1] != ['-m']):
    try:
        from mmengine.config.utils import MODULE2PACKAGE

        from . import datasets, hooks, optim, strategies
        from .checkpoint import allow_mmengine_checkpoints
        from .models import ResT, ResTV2
        from .utils.toolboxes import list_in_mmpretrain, register_in_toolboxes
    # ImportError: missing; AssertionError: a version gate; ValueError: NumPy's ABI
    except (ImportError, AssertionError, ValueError) as error:
        raise ImportError(
            f'mmrest cannot be imported: {error}. It needs torch, mmengine and mmcv, '
            'in versions that fit one another; `python -m mmrest.doctor` says what is '
            'installed and how to mend it.'
        ) from error
    # MMEngine looks for `.mim/configs` next to this module. Given the distribution
    # `mmrest`, it would look in site-packages, where an editable install has none.
    MODULE2PACKAGE['mmrest'] = 'mmrest.config'
    allow_mmengine_checkpoints()
    register_in_toolboxes(ResT)
    register_in_toolboxes(ResTV2)
    list_in_mmpretrain()
    __all__ += ['ResT', 'ResTV2', 'datasets', 'hooks', 'optim', 'strategies']
