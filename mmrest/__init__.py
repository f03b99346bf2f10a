"""ResT, the efficient multi-scale vision Transformer, for OpenMMLab.

Importing the package registers ``ResT`` in MMEngine's root registry.
"""

import sys

from .version import __version__

# `python -m mmrest.doctor` must run where the imports below fail. While the package
# of a `-m` module is imported, Python 3.9 shows no more than the `-m`.
_for_doctor = 'mmrest.doctor' in getattr(sys, 'orig_argv', sys.argv) or (
    not hasattr(sys, 'orig_argv') and sys.argv[:1] == ['-m']
)

__all__ = ['__version__']

if not _for_doctor:
    try:
        from . import datasets, hooks  # noqa: F401  registers hooks and steps
        from .checkpoint import allow_mmengine_checkpoints, read_addresses_safely
        from .config import register_config_scope
        from .models import ResT
    # ImportError: missing; AssertionError: a version gate; ValueError: numpy's ABI
    except (ImportError, AssertionError, ValueError) as error:
        raise ImportError(
            f'mmrest cannot be imported: {error}. It needs torch, mmengine and mmcv, '
            'in versions that fit one another; `python -m mmrest.doctor` says what is '
            'installed and how to mend it.'
        ) from error
    register_config_scope()
    allow_mmengine_checkpoints()
    read_addresses_safely()
    __all__ += ['ResT']
