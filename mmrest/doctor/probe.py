"""Collects the facts: what is installed, and what happens on importing it.

Each module is imported in another process, for a broken library may end it.
"""

import importlib.metadata
import json
import platform
import re
import subprocess
import sys

MODULES = (
    'numpy',
    'torch',
    'torchvision',
    'pkg_resources',
    'cv2',
    'pycocotools',
    'mmengine',
    'mmcv',
    'mmcv.ops',
    'mmdet',
    'mmseg',
    'mmpretrain',
    'mmrest',
)

# Distributions of which the versions, or the presence beside another, matter.
DISTRIBUTIONS = (
    *('torch', 'torchvision', 'numpy', 'setuptools', 'pycocotools', 'mmrest'),
    *('mmengine', 'mmcv', 'mmcv-full', 'mmcv-lite'),
    *('mmdet', 'mmsegmentation', 'mmpretrain'),
    *('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection'),
    *('onedl-mmsegmentation', 'onedl-mmpretrain'),
    *('opencv-python', 'opencv-python-headless'),
    *('opencv-contrib-python', 'opencv-contrib-python-headless'),
)

TIMEOUT = 300  # seconds for all imports of one process, on a cold disk

# Runs in the other process: one line of JSON a module, preceded by its name, so that
# after a crash it is known which one was being imported.
_IMPORT = r"""
import contextlib, importlib, importlib.util, io, json, os, sys, warnings
warnings.simplefilter('ignore')
out = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)

def notes(name, module):
    if name == 'torch':
        cuda = module.version.cuda
        gpus = module.cuda.device_count() if module.cuda.is_available() else 0
        return [f'CUDA {cuda} build' if cuda else 'CPU build',
                f'{gpus} GPU' if gpus else 'no GPU to be seen']
    if name == 'torchvision':
        import torch
        box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        importlib.import_module('torchvision.ops').nms(box, torch.ones(1), 0.5)
    if name == 'pycocotools':
        importlib.import_module('pycocotools.mask')
    if name == 'cv2':
        module.imread
    if name == 'mmcv.ops':
        import torch
        box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        module.nms(box, torch.ones(1), 0.5)
        cuda = module.get_compiling_cuda_version()
        return ['compiled, work', 'for the CPU alone' if cuda == 'not available'
                else f'for CUDA {cuda}']
    if name == 'mmrest':
        hooks = {getattr(finder, '__name__', '') for finder in sys.meta_path}
        known = 'MmrestConfigScope' in hooks
        return ['mmrest:: configs known everywhere' if known
                else 'mmrest:: configs known only after importing mmrest']
    return []

for name in sys.argv[1:]:
    print(name, file=out, flush=True)
    fact = {'found': True, 'version': None, 'error': None, 'notes': []}
    text = io.StringIO()
    try:
        if importlib.util.find_spec(name.partition('.')[0]) is None:
            fact['found'] = False
        else:
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                module = importlib.import_module(name)
                fact['version'] = getattr(module, '__version__', None)
                fact['notes'] = notes(name, module)
    except BaseException as error:
        said = f'{type(error).__name__}: {error}'
        cause = error.__cause__
        if cause is not None and str(cause) not in said:
            said += f' (from {type(cause).__name__}: {cause})'
        # Some libraries print the reason and raise something else.
        printed = text.getvalue().strip()
        fact['error'] = said
        fact['printed'] = printed[-2000:]
    print(json.dumps(fact), file=out, flush=True)
"""


def probe() -> dict:
    """Returns the facts that :func:`mmrest.doctor.checks.diagnose` judges.

    Returns:
        ``python``, ``executable`` and ``platform`` (str); ``distributions``, a dict of
        name to version of those that are installed; ``modules``, a dict of name to a
        dict with ``found`` (bool), ``version`` (str or None), ``error`` (str or
        None), ``notes`` (list of str) and, with an error, ``printed`` (str).
    """
    distributions = {}
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version:  # None where only the folder of its metadata is left
            distributions[name] = version
    modules = import_all(MODULES)
    for name in ('torchvision', 'pycocotools', 'mmcv.ops'):
        modules[name]['version'] = modules[name]['version'] or distributions.get(
            name.partition('.')[0]
        )
    modules['cv2']['notes'] = [name for name in distributions if 'opencv' in name]
    modules['pkg_resources']['version'] = distributions.get('setuptools')
    return {
        'python': platform.python_version(),
        'executable': sys.executable,
        'platform': f'{platform.system()} {platform.machine()}',
        'distributions': distributions,
        'modules': modules,
    }


def import_all(names) -> dict:
    """Imports each module in a process of its own kind; see :func:`probe`."""
    facts = {}
    waiting = list(names)
    while waiting:
        output, ending = _run(waiting)
        lines = output.splitlines()
        for name, fact in zip(lines[::2], lines[1::2]):
            facts[name] = json.loads(fact)
        if len(lines) % 2:
            facts[lines[-1]] = _broken(f'the process {ending} while importing it')
        elif not lines:  # not even Python starts as it should
            facts[waiting[0]] = _broken(f'the process {ending} before any import')
        waiting = [name for name in waiting if name not in facts]
    return {name: facts[name] for name in names}


def _run(names):
    command = [sys.executable, '-c', _IMPORT, *names]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b'').decode(), f'hung for {TIMEOUT} s'
    code = result.returncode
    ending = f'was ended by signal {-code}' if code < 0 else f'ended with code {code}'
    return result.stdout.decode(), ending


def _broken(error: str) -> dict:
    return {'found': True, 'version': None, 'error': error, 'notes': []}


def release(version: str) -> tuple:
    """Returns the numbers of a version: ``'2.13+cpu'`` -> ``(2, 13, 0)``."""
    numbers = [int(part) for part in re.findall(r'\d+', version.split('+')[0])]
    return tuple([*numbers, 0, 0, 0][:3])
