"""What a ``type`` in a config stands for, be it text or a class.

MMEngine's text configs name classes (``type='mmdet.CocoMetric'``); its pure-Python
configs give the class itself (``type=CocoMetric``).
"""

from typing import Any, Optional, Union

from mmengine.registry import Registry

TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')


def find_type(cfg: dict, registry: Registry) -> Optional[type]:
    """Find the class that a config would build.

    A name, with or without a scope, is looked up in the default scope of ``registry``,
    then in its parents. It is None if there is no ``type``, or an unknown one.
    """
    kind = cfg.get('type')
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(cfg.get('_scope_')) as scoped:
        return scoped.get(kind)


def type_name(cfg_or_type: Union[dict, str, type, None, Any]) -> str:
    """Name what a config, or its ``type``, would build, without scope and module.

    It is ``'CocoMetric'`` for ``'mmdet.CocoMetric'`` and for the class alike; empty if
    there is no ``type``.
    """
    kind = cfg_or_type.get('type') if isinstance(cfg_or_type, dict) else cfg_or_type
    if kind is None:
        return ''
    if isinstance(kind, str):
        return kind.rpartition('.')[2]
    return getattr(kind, '__name__', type(kind).__name__)


def find_toolbox(cfg: dict) -> Optional[str]:
    """Find the toolbox that a whole config is written for; None if nothing tells.

    It is ``default_scope``. Where that is missing or None, as in pure-Python configs,
    the type of the model decides.
    """
    if cfg.get('default_scope'):
        return cfg['default_scope']
    model = cfg.get('model') or {}
    kind = model.get('type')
    module = kind if isinstance(kind, str) else getattr(kind, '__module__', '')
    packages = (model.get('_scope_'), module.partition('.')[0])
    return next((name for name in packages if name in TOOLBOXES), None)
