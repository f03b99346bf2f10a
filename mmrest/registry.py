"""The scope ``mmrest`` in MMEngine's registries.

MMEngine marks parts that a config inherits from ``mmrest::`` with ``_scope_='mmrest'``,
and imports this module to build them. The configs of mmrest are configs of mmdet, mmseg
or mmpretrain, so names are looked up in the toolbox of the config's ``default_scope``.
"""

from typing import Optional

from mmengine import registry as mmengine_registry
from mmengine.registry import DefaultScope, Registry
from mmengine.utils import get_object_from_string

SCOPE = 'mmrest'


class ToolboxRegistry(Registry):
    """Looks names up in the registry of the toolbox in use."""

    def get(self, key: str) -> Optional[type]:
        """Find a class by its name, with or without a scope; None if there is none.

        Raises:
            KeyError: If it is unknown which toolbox is in use, and several have
                different classes of this name.
        """
        scope, name = self.split_scope_key(key)
        if scope not in (None, SCOPE):
            # MMEngine has taken the scope off mmrest.hooks.X, and would look for X in a
            # module hooks, which may be the user's
            found = get_object_from_string(f'{SCOPE}.{key}')
            if found is not None:
                return found
        if scope not in (None, SCOPE) or '.' in name:
            return super().get(key)
        toolbox = _toolbox_in_use()
        if toolbox is not None:
            with self.root.switch_scope_and_registry(toolbox) as registry:
                found = registry.get(name)
            if found is not None:
                return found
        # a hub or an inferencer may build a model of another toolbox
        return self._get_from_any(name)

    def _get_from_any(self, name: str) -> Optional[type]:
        classes = {}
        for scope, child in list(self.root.children.items()):
            if child is not self:
                child.import_from_location()
                if name in child.module_dict:
                    classes[scope] = child.module_dict[name]
        if len(set(classes.values())) > 1:
            raise KeyError(
                f'{name} is in {" and in ".join(classes)}. Say which is meant, e.g. '
                f"mmengine.registry.init_default_scope('{next(iter(classes))}')."
            )
        if not classes:
            return super().get(name)
        toolbox, found = next(iter(classes.items()))
        # a MaskRCNN is from mmdet, so its parts are looked up there
        current = DefaultScope.get_current_instance()
        if len(classes) == 1 and current is not None:
            current.toolbox = toolbox
        return found


def _toolbox_in_use() -> Optional[str]:
    """The default scope under the ``mmrest`` that MMEngine has set temporarily."""
    for scope in reversed(list(DefaultScope._instance_dict.values())):
        if scope.scope_name != SCOPE:
            return scope.scope_name
        if hasattr(scope, 'toolbox'):
            return scope.toolbox
    return None


for _root in vars(mmengine_registry).values():
    if isinstance(_root, Registry) and _root.parent is None:
        # without a location MMEngine would look for mmrest.utils.register_all_modules
        ToolboxRegistry(_root.name, parent=_root, scope=SCOPE, locations=[SCOPE])
