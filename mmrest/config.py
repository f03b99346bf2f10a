"""Makes ``mmrest::`` a scope of MMEngine's configs.

With it ``_base_ = 'mmrest::mask_rcnn/rest_base_fpn_1x.py'`` works in any project.
MMEngine resolves only the scopes of the projects it knows by name, hence the two
additions of :func:`register_config_scope`. A config may be read long before anything
imports ``mmrest``, so ``mmrest-config-scope.pth``, which is installed beside the
package, has the interpreter call :func:`find_spec` of this file when MMEngine's
config module is about to be imported. For that reason this file imports nothing but
the standard library and is loaded without its package.
"""

import importlib
import importlib.machinery
from difflib import get_close_matches
from pathlib import Path

SCOPE = 'mmrest'
CONFIG_MODULE = 'mmengine.config.config'


def config_root() -> Path:
    """Returns the folder that the ``mmrest::`` names are relative to.

    An installed package carries the configs in ``.mim`` (where MIM looks for them);
    in a source tree they stand beside the package.

    Raises:
        FileNotFoundError: If neither folder exists.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / '.mim' / 'configs', package.parent / 'configs')
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f'the configs of mmrest are neither in {candidates[0]} nor in '
        f'{candidates[1]}; reinstall mmrest'
    )


def find_config(name: str) -> str:
    """Returns the path of a config of this package.

    Args:
        name: The config's path below ``configs/``, with or without the leading
            ``mmrest::``, e.g. ``'mmrest::mask_rcnn/rest_base_fpn_1x.py'``.

    Raises:
        FileNotFoundError: If there is no such config; names the closest ones.
    """
    prefix = f'{SCOPE}::'
    relative = name[len(prefix) :] if name.startswith(prefix) else name
    root = config_root()
    path = root / relative
    if path.is_file():
        return str(path)
    known = [file.relative_to(root).as_posix() for file in root.rglob('*.py')]
    close = get_close_matches(relative, known, n=3) or sorted(known)
    raise FileNotFoundError(
        f'mmrest has no config {relative!r}. Did you mean one of: {", ".join(close)}? '
        f'(looked in {root})'
    )


def register_config_scope() -> None:
    """Adds the scope to MMEngine, once; imports ``mmengine.config``."""
    _extend(importlib.import_module(CONFIG_MODULE))


def find_spec(path):
    """Finds MMEngine's config module so that the scope is added once it is loaded.

    Called by ``mmrest-config-scope.pth`` for that one module.

    Args:
        path: The search path that the import system hands to a finder.

    Returns:
        The module's usual spec with a loader that also adds the scope; None where
        MMEngine cannot be found, which leaves the error to the import system.
    """
    spec = importlib.machinery.PathFinder.find_spec(CONFIG_MODULE, path)
    if spec is not None and spec.loader is not None:
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _extend(module)

        spec.loader.exec_module = exec_module
    return spec


def _extend(module) -> None:
    """Adds the scope to the already loaded module ``mmengine.config.config``."""
    utils = importlib.import_module('mmengine.config.utils')
    # For what looks the scope up in MMEngine's table (mmengine.hub, registries).
    utils.MODULE2PACKAGE.setdefault(SCOPE, SCOPE)

    config = module.Config
    resolve = config._get_cfg_path
    if getattr(resolve, 'knows_mmrest', False):
        return

    # MMEngine's own way to the file fails for editable installs and for setuptools
    # without pkg_resources. It would also tag what it read with the registry scope
    # `mmrest`; a base of ours is to mean the same as one read by its path, so it
    # keeps to the `default_scope` that it sets (mmdet, mmseg or mmpretrain).
    def get_cfg_path(cfg_path, filename):
        if cfg_path.startswith(f'{SCOPE}::'):
            return find_config(cfg_path), None
        return resolve(cfg_path, filename)

    get_cfg_path.knows_mmrest = True
    config._get_cfg_path = staticmethod(get_cfg_path)
