"""What mmengine's own loader reads from elsewhere, it reads safely.

``load_from``, ``init_cfg`` and the inferencers read through mmengine's
``CheckpointLoader``. For ``http(s)://`` addresses and the names of model zoos it
goes through ``torch.hub``, whose default is to run what a pickle asks for, and
onedl-mmengine does so for every file that safe loading refused. mmengine lets a
scheme's loader be replaced; this is done here, when ``mmrest`` is imported.
"""

import functools
import os
from typing import Any, Callable

from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from .reading import read_checkpoint, read_file, weights_only_forced
from .safe_globals import mmengine_globals_allowed, stand_ins_only

ADDRESSES = ('http://', 'https://')
# Names of model zoos and other storage, and mmengine's functions that know them.
NAMES = (
    (('modelzoo://', 'torchvision://'), 'load_from_torchvision'),
    (('open-mmlab://', 'openmmlab://'), 'load_from_openmmlab'),
    ('mmcls://', 'load_from_mmcls'),
    ('pavi://', 'load_from_pavi'),
    ((r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), 'load_from_ceph'),
)


def read_addresses_safely() -> bool:
    """Have mmengine's ``CheckpointLoader`` read addresses safely.

    It can be called any number of times. Local files are read safely by mmengine
    itself (by PyTorch's default), and after this call by onedl-mmengine too.

    Returns:
        bool: Whether it was done. False before torch 2.6, where the checkpoints
        that mmengine's Runner writes could no longer be read.
    """
    if not mmengine_globals_allowed():
        return False
    register = CheckpointLoader.register_scheme
    register(prefixes=ADDRESSES, loader=load_from_http, force=True)
    for prefixes, name in NAMES:
        loader = getattr(mmengine_checkpoint, name, None)
        if loader is not None:
            register(prefixes=prefixes, loader=_safely(loader), force=True)
    if hasattr(mmengine_checkpoint, 'get_torch_safe_globals'):  # onedl-mmengine
        register(prefixes='', loader=load_from_local, force=True)
    return True


def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Read an address; mmengine logs the name of this function."""
    return read_checkpoint(filename, map_location)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a file; mmengine logs the name of this function."""
    return read_file(os.path.expanduser(filename), filename, map_location)


def _safely(loader: Callable) -> Callable:
    if hasattr(loader, '__wrapped__'):
        return loader

    @functools.wraps(loader)
    def load(filename: str, map_location: Any = None) -> Any:
        with stand_ins_only(), weights_only_forced():
            return loader(filename, map_location)

    return load
