"""What a ``type`` in a config stands for, be it text or a class.

MMEngine's text configs name classes (``type='mmdet.CocoMetric'``); its pure-Python
configs give the class itself (``type=CocoMetric``).
"""

from typing import Any, Optional, Union

from mmengine.registry import Registry

TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')


def find_type(cfg: dict, registry: Registry) -> Optional[type]:
    """Find the class that a config would build.

    Args:
        cfg (dict): A config with ``type``, a class or a name, with or without a scope.
        registry (Registry): Where names are looked up: first in the default scope,
            then in its parents.

    Returns:
        type | None: None if there is no ``type``, or the name is not registered.
    """
    kind = cfg.get('type')
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(cfg.get('_scope_')) as scoped:
        return scoped.get(kind)


def type_name(cfg_or_type: Union[dict, str, type, None, Any]) -> str:
    """Name what a config would build, without scope and module.

    Args:
        cfg_or_type (dict | str | type | None): A config with ``type``, or such a type.

    Returns:
        str: For example ``'CocoMetric'``, for ``'mmdet.CocoMetric'`` and for the class
        alike; empty if there is no ``type``.
    """
    kind = cfg_or_type.get('type') if isinstance(cfg_or_type, dict) else cfg_or_type
    if kind is None:
        return ''
    if isinstance(kind, str):
        return kind.rpartition('.')[2]
    return getattr(kind, '__name__', type(kind).__name__)


def find_toolbox(cfg: dict) -> Optional[str]:
    """Find the toolbox that a config is written for.

    Args:
        cfg (dict): A whole config. Where ``default_scope`` is missing or None, as in
            pure-Python configs, the type of its model decides.

    Returns:
        str | None: ``default_scope``, ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``;
        None if neither field tells.
    """
    if cfg.get('default_scope'):
        return cfg['default_scope']
    model = cfg.get('model') or {}
    kind = model.get('type')
    module = kind if isinstance(kind, str) else getattr(kind, '__module__', '')
    packages = (model.get('_scope_'), module.partition('.')[0])
    return next((name for name in packages if name in TOOLBOXES), None)
