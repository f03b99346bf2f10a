"""Builds and installs mmrest: the package, its configs and its tools."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# What goes into mmrest/.mim, where MIM and MMEngine look for a package's configs.
MIM = ('configs', 'tools', 'model-index.yml')

# Makes `mmrest::` known to MMEngine; see mmrest/config_scope.py.
PTH = 'mmrest-config-scope.pth'


def read_version() -> str:
    """Reads the version without importing the package, which needs torch."""
    text = (ROOT / 'mmrest' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'$", text, re.MULTILINE).group(1)


def mim_files():
    """Yields the files for ``mmrest/.mim``, relative to the source tree."""
    for name in MIM:
        source = ROOT / name
        files = source.rglob('*') if source.is_dir() else [source]
        for file in sorted(files):
            if file.is_file() and '__pycache__' not in file.parts:
                yield file.relative_to(ROOT)


class BuildPy(build_py):
    """Adds ``.mim`` to the package and puts the .pth file beside it.

    Python reads .pth files in site-packages alone. setuptools' own ``data_files`` go
    elsewhere and are left out of editable installs, hence the copy made here. An
    editable install needs no ``.mim``: the configs stand beside the package.
    """

    def run(self):
        if not self.editable_mode:
            # What an earlier build left here would end up in the wheel.
            shutil.rmtree(Path(self.build_lib) / 'mmrest', ignore_errors=True)
        super().run()
        for source, target in self._extra_files():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)

    def get_outputs(self, include_bytecode=1):
        outputs = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return outputs
        return outputs + [str(target) for _, target in self._extra_files()]

    def _extra_files(self):
        if self.editable_mode:
            # The folder that becomes the editable wheel.
            folder = Path(self.get_finalized_command('install').install_lib)
            return [(ROOT / PTH, folder / PTH)]
        folder = Path(self.build_lib)
        mim = folder / 'mmrest' / '.mim'
        files = [(ROOT / file, mim / file) for file in mim_files()]
        return [(ROOT / PTH, folder / PTH), *files]


# OpenMMLab and its continuation OneDL install the same modules under different
# names, so neither may be a hard requirement: pip would put one over the other.
# The extras name OpenMMLab's packages; requirements/ has pinned lists of both.
MM = ['mmengine>=0.10.4,<1', 'mmcv>=2.0.0,<2.2']
DET = [*MM, 'mmdet>=3.3.0,<4', 'pycocotools']
SEG = [*MM, 'mmsegmentation>=1.2.2,<2', 'ftfy', 'regex']
CLS = [*MM, 'mmpretrain>=1.2.0,<2']
DEV = [
    line
    for line in (ROOT / 'requirements' / 'dev.txt').read_text().splitlines()
    if line and not line.startswith('#')
]

setup(
    name='mmrest',
    version=read_version(),
    description='ResT backbones for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8')
    if (ROOT / 'README.md').exists()
    else '',
    long_description_content_type='text/markdown',
    author='The mmrest contributors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='ResT, backbone, object detection, instance segmentation, MMDetection',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Operating System :: MacOS',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    packages=find_packages(include=['mmrest', 'mmrest.*']),
    cmdclass={'build_py': BuildPy},
    python_requires='>=3.9',
    install_requires=['torch>=2.0', 'numpy'],
    extras_require={'det': DET, 'seg': SEG, 'cls': CLS, 'dev': DEV},
    zip_safe=False,
)
