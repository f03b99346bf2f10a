"""Models of mmrest under the names of the toolboxes, such as ``mmdet.ResT``."""

from contextlib import suppress
from importlib import import_module
from pathlib import Path

from .config_types import TOOLBOXES


def register_in_toolboxes(model: type) -> None:
    """Register a model with each toolbox that is installed, beside MMEngine's registry.

    MMEngine looks a name without scope up in the parents of a registry, but
    ``type='mmdet.ResT'`` within the scope mmdet in mmdet's own registry alone.
    """
    for toolbox in TOOLBOXES:
        try:
            registry = import_module(f'{toolbox}.registry').MODELS
        except Exception:  # not installed, or it refuses another package's version
            continue
        if model.__name__ not in registry.module_dict:
            registry.register_module(module=model)


def list_in_mmpretrain() -> None:
    """Let ``mmpretrain.list_models`` and ``get_model`` know the ImageNet models."""
    mim = Path(__file__).parents[1] / '.mim'
    with suppress(Exception):  # as above, or a wheel without configs
        hub = import_module('mmpretrain.apis.model').ModelHub
        metafile = mim / 'configs' / 'imagenet' / 'metafile.yml'
        hub.register_model_index(metafile, config_prefix=mim)
