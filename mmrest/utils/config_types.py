"""The ``type`` of a config, as a name or a class.

MMEngine's text configs name classes (``type='mmdet.CocoMetric'``). Its pure-Python
configs contain the classes themselves (``type=CocoMetric``).
"""

from typing import Any, Optional, Union

from mmengine.registry import Registry

TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')


def find_type(cfg: dict, registry: Registry) -> Optional[type]:
    """Find the class that a config builds; None if ``type`` is missing or unknown.

    A name, with or without a scope, is looked up in the default scope of ``registry``,
    then in its parents.
    """
    kind = cfg.get('type')
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(cfg.get('_scope_')) as scoped:
        return scoped.get(kind)


def type_name(cfg_or_type: Union[dict, str, type, None, Any]) -> str:
    """Return the class name of a config or of its ``type``, without scope and module.

    It is ``'CocoMetric'`` for ``'mmdet.CocoMetric'`` as well as for the class, and
    empty without a ``type``.
    """
    kind = cfg_or_type.get('type') if isinstance(cfg_or_type, dict) else cfg_or_type
    if kind is None:
        return ''
    if isinstance(kind, str):
        return kind.rpartition('.')[2]
    return getattr(kind, '__name__', type(kind).__name__)


def find_toolbox(cfg: dict) -> Optional[str]:
    """Find the toolbox of a whole config; None if it is unknown.

    It is ``default_scope``. If that is missing or None, as in pure-Python configs, the
    type of the model decides.
    """
    if cfg.get('default_scope'):
        return cfg['default_scope']
    model = cfg.get('model') or {}
    kind = model.get('type')
    module = kind if isinstance(kind, str) else getattr(kind, '__module__', '')
    packages = (model.get('_scope_'), module.partition('.')[0])
    return next((name for name in packages if name in TOOLBOXES), None)
