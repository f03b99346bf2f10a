"""Safe loading of whatever a process reads, MMEngine's own loaders included.

MMEngine reads ``http(s)://`` addresses and the names of model zoos through
``torch.hub``, whose default is to run what a pickle asks for. OneDL's MMEngine does so
for every file that safe loading refused. The tools of this repository forbid it.
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

    For programs, such as the tools of this repository; importing ``mmrest`` does none
    of it. Two things are changed, until the process ends:

    - An environment variable of torch makes every ``torch.load`` a safe one, whatever
      its caller asks for. A setting to the contrary is dropped with a warning.
    - MMEngine's loaders of files and of ``http(s)://`` addresses become
      :func:`read_checkpoint`. So ``load_from`` reads safetensors, and errors say what
      is wrong with a file.

    It can be called any number of times.

    Returns:
        bool: Whether it took effect. False before torch 2.6, where MMEngine's own
        checkpoints could no longer be resumed.
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
