"""Deprecated: what was here is in ``mmrest.hooks``, ``optim`` and ``strategies``."""

import sys
import warnings

from . import hooks, strategies
from .hooks import *  # noqa: F403
from .hooks import atomic_checkpoint, nonfinite
from .optim import *  # noqa: F403
from .optim import layer_decay
from .strategies import *  # noqa: F403

warnings.warn(
    'mmrest.engine is now mmrest.hooks, mmrest.optim and mmrest.strategies',
    DeprecationWarning,
    stacklevel=2,
)

# Pure-Python configs import classes from the modules that were here.
for _name, _module in dict(
    checkpointing=atomic_checkpoint,
    fsdp=strategies.fsdp,
    label_range=hooks.label_range,
    numerics=nonfinite,
    optim=layer_decay,
    preemption=hooks.preemption,
).items():
    sys.modules[f'{__name__}.{_name}'] = _module
