"""Safe loading in MMEngine's own loaders.

MMEngine reads ``http(s)://`` addresses and names of model zoos through ``torch.hub``,
which by default runs the code in a pickle. OneDL's MMEngine does the same with files
that safe loading refused. The tools of this repository prevent both.
"""

import os
import warnings
from typing import Any

from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from .reading import is_url, read_checkpoint, read_file
from .safe_globals import (
    ALLOWED,
    FORCE_SAFE,
    FORCE_UNSAFE,
    allow_mmengine_checkpoints,
)

# local files, and addresses of the web
_SCHEMES = ('', 'http://', 'https://')


def force_safe_loading() -> bool:
    """Make every reading of a checkpoint in this process and its children a safe one.

    For programs, such as the tools; ``import mmrest`` does not call it. Until the
    process ends,

    - an environment variable makes every ``torch.load`` a safe one, whatever its
      arguments. A variable to the contrary is removed with a warning.
    - MMEngine's loaders of files and of ``http(s)://`` addresses are replaced by
      :func:`read_checkpoint`. ``load_from`` thus reads safetensors, and errors say what
      is wrong with a file.

    It may be called repeatedly.

    Returns:
        bool: Whether it took effect. False before torch 2.6, where MMEngine's own
        checkpoints could not be resumed any more.
    """
    if not allow_mmengine_checkpoints():
        return False
    if os.environ.pop(FORCE_UNSAFE, None):
        warnings.warn(
            f'{FORCE_UNSAFE} is ignored: checkpoints are loaded safely here. To load '
            'an object of your own, allow-list it with '
            'torch.serialization.add_safe_globals in a module that '
            '`custom_imports` names.',
            stacklevel=2,
        )
    os.environ[FORCE_SAFE] = '1'
    CheckpointLoader.register_scheme(
        prefixes=_SCHEMES, loader=load_from_safe_reader, force=True
    )
    if hasattr(mmengine_checkpoint, 'get_torch_safe_globals'):
        # OneDL's MMEngine allow-lists the real objects while it reads
        mmengine_checkpoint.get_torch_safe_globals = lambda: list(ALLOWED)
    return True


def load_from_safe_reader(filename: str, map_location: Any = None) -> Any:
    """Read a file or address; MMEngine logs the name of this function."""
    if is_url(filename):
        return read_checkpoint(filename, map_location)
    return read_file(os.path.expanduser(filename), filename, map_location)
