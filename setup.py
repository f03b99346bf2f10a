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


setup(cmdclass={'build_py': BuildPy})
