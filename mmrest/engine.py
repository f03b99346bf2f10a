"""Deprecated: what was here is in ``mmrest.hooks``, ``optim`` and ``strategies``."""

import warnings

from .hooks import *  # noqa: F403
from .optim import *  # noqa: F403
from .strategies import *  # noqa: F403

warnings.warn(
    'mmrest.engine is now mmrest.hooks, mmrest.optim and mmrest.strategies',
    DeprecationWarning,
    stacklevel=2,
)
