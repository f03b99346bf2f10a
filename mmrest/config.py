"""The configs of this package: ``mmrest::`` names, and whole configs as one file.

MMEngine resolves ``_base_ = 'mmrest::mask_rcnn/rest_base_fpn_1x.py'`` if mmrest is
imported before the config is read. For a program that does not import it, write the
config with all inherited fields into one file::

    python -m mmrest.config mask_rcnn/rest_base_fpn_1x --output my_base.py
"""

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Optional, Union

from mmengine.config import Config

from .checkpoint.atomic import atomic_path

SCOPE = 'mmrest'


def config_root() -> Path:
    """Return the folder of the configs.

    Raises:
        FileNotFoundError: If the installed package has no configs.
    """
    folder = Path(__file__).resolve().parent / '.mim' / 'configs'
    if not folder.is_dir():
        raise FileNotFoundError(
            f'the configs of mmrest are not in {folder}; reinstall mmrest'
        )
    return folder.resolve()


def find_config(name: str) -> str:
    """Find the file of a config of this package.

    Args:
        name (str): The config's path below ``configs/``, e.g.
            ``'mmrest::mask_rcnn/rest_base_fpn_1x.py'``. ``mmrest::`` and ``.py`` may
            be omitted.

    Raises:
        FileNotFoundError: If there is no such config, with the most similar names.
    """
    prefix = f'{SCOPE}::'
    relative = name[len(prefix) :] if name.startswith(prefix) else name
    root = config_root()
    for path in (root / relative, root / f'{relative}.py'):
        if path.is_file():
            return str(path)
    known = [file.relative_to(root).as_posix() for file in root.rglob('*.py')]
    close = get_close_matches(relative, known, n=3) or sorted(known)
    raise FileNotFoundError(
        f'mmrest has no config {relative!r}. Did you mean one of: {", ".join(close)}? '
        f'(looked in {root})'
    )


def write_config(name: str, output: Union[str, Path]) -> Path:
    """Write a config of this package, with all that it inherits, into one file.

    Args:
        name (str): As for :func:`find_config`.
        output (str | Path): The file to write.

    Returns:
        Path: The file.

    Raises:
        FileNotFoundError: If there is no such config, or no folder for the file.
        FileExistsError: If the file exists.
        ValueError: If the file's name does not end in ``.py``.
    """
    source = find_config(name)
    text = Config.fromfile(source, import_custom_modules=False).pretty_text
    path = Path(output)
    if path.suffix != '.py':
        raise ValueError(f'{output}: the name of the file must end in .py')
    title = Path(source).relative_to(config_root()).as_posix()
    if os.path.lexists(path):
        raise FileExistsError(f'{output} exists')
    content = f'# {SCOPE}::{title} with everything that it inherits\n{text}'
    with atomic_path(path) as temporary:
        Path(temporary).write_text(content, encoding='utf-8')
    return path


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run ``python -m mmrest.config``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m mmrest.config',
        description='Write a config of mmrest, with all that it inherits, as one file.',
    )
    parser.add_argument('config', help='e.g. mask_rcnn/rest_base_fpn_1x')
    parser.add_argument('--output', required=True, help='the file; must not exist')
    args = parser.parse_args(argv)
    try:
        path = write_config(args.config, args.output)
    except FileExistsError:
        error = f'{args.output} exists and is not replaced; give another --output'
    except (OSError, ValueError) as failure:
        error = str(failure)
    else:
        print(f'{path}: mmrest::{args.config} as one file')
        return 0
    print(error, file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
