import warnings
from typing import Any

from mmengine.registry import MODELS

from . import rest_ablations  # noqa: F401  registers the variants
from .rest import ResT
from .restv2 import ResTV2

__all__ = ['ResT', 'ResTV2']

# Registries of the first releases, and the prefixes that replace them
_REGISTRIES = dict(STEMS='stem', POSITIONS='pos', ATTENTIONS='attn')


class _PartRegistry:
    """Registers parts under the names that :func:`.utils.build_part` looks up."""

    def __init__(self, place: str) -> None:
        self._start = f'rest_{place}_'

    def register_module(
        self, name: str, force: bool = False, module: Any = None
    ) -> Any:
        return MODELS.register_module(self._start + name, force, module)


def __getattr__(name: str) -> Any:
    if name not in _REGISTRIES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    start = f'rest_{_REGISTRIES[name]}_'
    warnings.warn(
        f"{__name__}.{name} is deprecated. Register the part in MMEngine's MODELS: a "
        f"class registered as 'mine' or as '{start}mine' is used as 'mine'.",
        DeprecationWarning,
        stacklevel=2,
    )
    return _PartRegistry(_REGISTRIES[name])
