"""Builds mmrest. What the package is, pyproject.toml says."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Starts from an empty folder.

    pip builds in the source tree, where setuptools leaves ``build/`` behind. A file
    that was deleted since would go into the next wheel.
    """

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / 'mmrest', ignore_errors=True)
        super().run()
        if not self.editable_mode:
            self._name_configs()

    def _name_configs(self) -> None:
        """Give MIM, which looks for a config by its file's name, one name for each."""
        mim = Path(self.build_lib) / 'mmrest' / '.mim'
        names = mim / 'names'
        names.mkdir()
        for config in mim.glob('configs/[!_]*/*.py'):
            path = config.relative_to(mim).as_posix()
            name = f'{config.parent.name}_{config.name}'
            (names / name).write_text(f"_base_ = '../{path}'\n", encoding='utf-8')


setup(cmdclass={'build_py': BuildPy})
