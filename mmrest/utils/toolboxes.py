"""Models of mmrest under the names of the toolboxes, such as ``mmdet.ResT``."""

from contextlib import suppress
from importlib import import_module
from pathlib import Path

from .config_types import TOOLBOXES


def register_in_toolboxes(model: type) -> None:
    """Register a model with each installed toolbox, in addition to MMEngine's registry.

    MMEngine finds a name without scope in the parents of a registry. Within the scope
    mmdet, however, it looks for ``type='mmdet.ResT'`` in mmdet's own registry only.
    """
    for toolbox in TOOLBOXES:
        try:
            registry = import_module(f'{toolbox}.registry').MODELS
        except Exception:  # not installed, or it refuses a version of another package
            continue
        if model.__name__ not in registry.module_dict:
            registry.register_module(module=model)


def list_in_mmpretrain() -> None:
    """Add the ImageNet models to ``mmpretrain.list_models`` and ``get_model``."""
    mim = Path(__file__).parents[1] / '.mim'
    with suppress(Exception):  # as above, or a wheel without configs
        hub = import_module('mmpretrain.apis.model').ModelHub
        metafile = mim / 'configs' / 'imagenet' / 'metafile.yml'
        hub.register_model_index(metafile, config_prefix=mim)
