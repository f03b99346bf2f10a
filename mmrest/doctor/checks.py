"""Judges the facts that ``probe`` collected: no imports, no side effects."""

import re
from dataclasses import dataclass

from .probe import release

REQUIRED = ('numpy', 'torch', 'mmengine', 'mmcv')
OPTIONAL = ('torchvision', 'mmdet', 'mmseg', 'mmpretrain', 'pycocotools', 'cv2')

PYTHONS = ((3, 9), (3, 12))
# From this torch on, its headers need C++20; mmcv's operators are written for C++17.
TORCH_TOO_NEW = (2, 14)
# The first setuptools without pkg_resources.
SETUPTOOLS_TOO_NEW = (81,)

# The same modules: OpenMMLab's distribution, OneDL's.
TWINS = {
    'mmengine': 'onedl-mmengine',
    'mmcv': 'onedl-mmcv',
    'mmdet': 'onedl-mmdetection',
    'mmsegmentation': 'onedl-mmsegmentation',
    'mmpretrain': 'onedl-mmpretrain',
}
DESKTOP_LIBRARY = r'lib(GL|EGL|gthread|glib|SM|ICE|Xext|Xrender|X11|xcb)\b[\w.-]*'
OPENCVS = (
    'opencv-python',
    'opencv-python-headless',
    'opencv-contrib-python',
    'opencv-contrib-python-headless',
)

BUILD_MMCV = (
    'With torch already installed: pip uninstall -y {mmcv}; pip install '
    '"setuptools<81" wheel ninja psutil; MMCV_WITH_OPS=1 pip install {mmcv}=={version} '
    '--no-build-isolation --no-binary {mmcv} --no-cache-dir (about 9 minutes on two '
    'cores; needs a C++ compiler). With CUDA, first look for a prebuilt wheel for your '
    'torch and CUDA.'
)
INSTALL = {
    'mmcv': 'Run `make env`, or: ' + BUILD_MMCV,
    'mmseg': 'pip install {mmsegmentation} ftfy regex',
    'mmdet': 'pip install {mmdet}',
    'mmpretrain': 'pip install {mmpretrain}',
    'mmengine': 'pip install {mmengine}',
    'cv2': 'pip install opencv-python-headless',
}


@dataclass(frozen=True)
class Finding:
    """One thing that does not fit.

    Attributes:
        level: ``'error'`` or ``'warning'``.
        what: What is wrong.
        found: What was seen; may be empty.
        fix: What to do.
    """

    level: str
    what: str
    found: str
    fix: str


def diagnose(facts: dict, require=REQUIRED) -> list:
    """Judges the facts.

    Args:
        facts: What :func:`mmrest.doctor.probe.probe` returns.
        require: Modules that must be installed.

    Returns:
        The findings, root causes first; an import error that repeats another
        module's is left out.
    """
    names = _names(facts['distributions'])
    findings = [*_stacks(facts), *_versions(facts, names), *_opencv(facts)]
    findings += _imports(facts, names, findings)
    findings += _missing(facts, names, require)
    findings += _warnings(facts)
    unique = {}
    for finding in findings:
        unique.setdefault(finding.what, finding)
    return sorted(unique.values(), key=lambda finding: finding.level)


def stack_name(distributions: dict) -> str:
    """Returns whose packages are installed: OpenMMLab's, OneDL's, both or none."""
    whose = {
        'OneDL' if name.startswith('onedl-') else 'OpenMMLab'
        for name in _stack_of(distributions)
    }
    return ' and '.join(sorted(whose, reverse=True)) or 'none'


def _names(distributions: dict) -> dict:
    """What to call the packages in a fix: those of the stack that is installed."""
    onedl = any(name.startswith('onedl-') for name in distributions)
    names = {name: twin if onedl else name for name, twin in TWINS.items()}
    default = '2.3.6' if onedl else '2.1.0'
    names['version'] = distributions.get(names['mmcv'], default)
    return names


def _stacks(facts: dict):
    installed = facts['distributions']
    both = [name for name, twin in TWINS.items() if {name, twin} <= set(installed)]
    if both:
        pairs = [f'{name} {installed[name]}' for name in both]
        pairs += [f'{TWINS[name]} {installed[TWINS[name]]}' for name in both]
        names = ' '.join([*both, *(TWINS[name] for name in both)])
        yield Finding(
            'error',
            'two stacks are installed over each other: they have the same modules',
            ', '.join(pairs),
            f'pip uninstall -y {names}; then install the ones of one stack again, or '
            'run `make env STACK=openmmlab` or `make env STACK=onedl`.',
        )
    elif ' and ' in stack_name(installed):
        yield Finding(
            'warning',
            'packages of OpenMMLab and of OneDL are mixed',
            ', '.join(_stack_of(installed)),
            'Take all of them from one stack; no mixture is tested.',
        )
    mmcvs = [name for name in ('mmcv-full', 'mmcv-lite') if name in installed]
    if mmcvs:
        yield Finding(
            'error',
            f'{mmcvs[0]} has the same module as mmcv and lacks what mmdet needs',
            f'{mmcvs[0]} {installed[mmcvs[0]]}',
            f'pip uninstall -y mmcv {" ".join(mmcvs)}, then: '
            + INSTALL['mmcv'].format(**_names(installed)),
        )


def _stack_of(installed: dict) -> list:
    return [name for pair in TWINS.items() for name in pair if name in installed]


def _versions(facts: dict, names: dict):
    installed = facts['distributions']
    python = release(facts['python'])[:2]
    if not PYTHONS[0] <= python <= PYTHONS[1]:
        yield Finding(
            'error',
            f'Python {python[0]}.{python[1]} is not supported by mmcv',
            facts['executable'],
            'Use Python 3.9 to 3.12, e.g. make env PYTHON=python3.11.',
        )
    if 'mmdet' in installed and 'mmcv' in installed:
        mmcv, mmdet = installed['mmcv'], installed['mmdet']
        if release(mmdet)[0] == 3 and not (2, 0) <= release(mmcv) < (2, 2):
            yield _gate(mmcv, names)
    torch, vision = installed.get('torch'), installed.get('torchvision')
    if torch and vision and release(torch)[0] == 2:
        wanted = (0, release(torch)[1] + 15)
        if release(vision)[:2] != wanted:
            yield _torchvision(torch, vision)
    setuptools = installed.get('setuptools', '0')
    no_pkg_resources = facts['modules']['pkg_resources']
    if 'mmengine' in installed and (
        release(setuptools) >= SETUPTOOLS_TOO_NEW or not no_pkg_resources['found']
    ):
        yield _pkg_resources(installed.get('setuptools', 'missing'))


def _opencv(facts: dict):
    installed = facts['distributions']
    found = [name for name in OPENCVS if name in installed]
    if len(found) < 2:
        return
    broken = facts['modules']['cv2']['error'] is not None
    differ = len({installed[name] for name in found}) > 1
    yield Finding(
        'error' if broken or differ else 'warning',
        'several builds of OpenCV are installed over each other: they share one folder',
        ', '.join(f'{name} {installed[name]}' for name in found),
        f'pip uninstall -y {" ".join(found)}; pip install opencv-python (or '
        'opencv-python-headless where there is no desktop).',
    )


def _gate(mmcv: str, names: dict) -> Finding:
    return Finding(
        'error',
        'mmdet and mmseg do not accept this mmcv',
        f'mmcv {mmcv}; mmdet 3.3 and mmseg 1.2 want mmcv>=2.0.0rc4,<2.2.0',
        BUILD_MMCV.format(**{**names, 'version': '2.1.0'}),
    )


def _torchvision(torch: str, vision: str) -> Finding:
    minor = release(torch)[1]
    return Finding(
        'error',
        'torchvision does not belong to this torch',
        f'torch {torch}, torchvision {vision}',
        f'pip install "torchvision==0.{minor + 15}.*" (torch 2.N belongs to '
        'torchvision 0.(N+15)), from the same index as torch: a +cpu or +cu build of '
        'the one does not load with another build of the other. The tested pair: '
        'pip install "torch===2.13.0" torchvision==0.28.0',
    )


def _pkg_resources(setuptools: str) -> Finding:
    return Finding(
        'error',
        'pkg_resources is gone, which mmengine needs',
        f'setuptools {setuptools}',
        'pip install "setuptools<81"',
    )


# --- what an import error means ---


def _imports(facts: dict, names: dict, known: list):
    """Explains every module that is there and cannot be imported."""
    seen = set()
    for name, fact in facts['modules'].items():
        error = fact['error']
        if not fact['found'] or error is None:
            continue
        finding = _explain(name, fact, facts, names)
        if finding is None:
            if any(finding.level == 'error' for finding in [*known, *seen]):
                continue  # most likely a consequence; it shows again if not
            finding = Finding(
                'error',
                f'{name} cannot be imported',
                error,
                f'Reinstall it; `python -c "import {name}"` shows the whole error.',
            )
        if finding not in seen:
            seen.add(finding)
            yield finding


def _explain(name: str, fact: dict, facts: dict, names: dict):
    """Returns the finding for a known failure, or None."""
    text = f'{fact["error"]}\n{fact.get("printed", "")}'
    error = fact['error']
    torch = facts['distributions'].get('torch', '')
    vision = facts['distributions'].get('torchvision', '')

    match = re.search(
        r'lib(GL|EGL|gthread|glib|SM|Xext|Xrender|X11|xcb)\b[\w.-]*', text
    )
    if match and 'cannot open shared object' in text:
        return Finding(
            'error',
            f'OpenCV needs {match.group()}, a library of desktops, which is missing',
            error,
            'pip uninstall -y opencv-python; pip install opencv-python-headless. Or '
            'install the library: apt-get install libgl1 libglib2.0-0',
        )
    if re.search(
        r'numpy\.dtype size changed|compiled using NumPy 1|_ARRAY_API not found|'
        r'numpy\.core\.multiarray failed|compiled against (ABI|API) version',
        text,
    ):
        culprit = 'torch' if name == 'torch' else name
        return Finding(
            'error',
            f'{culprit} was compiled for another NumPy (ABI)',
            f'numpy {facts["distributions"].get("numpy", "?")}: {error}',
            f'Install a newer build: pip install -U --force-reinstall --no-deps '
            f'{culprit}; if there is none (torch before 2.3): pip install "numpy<2"',
        )
    if 'pkg_resources' in text:
        return _pkg_resources(facts['distributions'].get('setuptools', 'missing'))
    match = re.search(r'(MMCV|MMEngine)==(\S+) is used but incompatible', text)
    if match and match.group(1) == 'MMCV':
        return _gate(match.group(2), names)
    if match:
        return Finding(
            'error',
            f'{name} does not accept this mmengine',
            error,
            'pip install "mmengine>=0.10.4,<1"'
            if names['mmengine'] == 'mmengine'
            else 'pip install onedl-mmengine==0.10.12',
        )
    if name == 'torchvision' or 'torchvision::nms does not exist' in text:
        return _torchvision(torch, vision) if torch else None
    if 'mmcv._ext' in text or (name == 'mmcv.ops' and _is_abi(text)):
        return _no_ops(error, torch, names)
    if name in ('cv2', 'mmcv') and re.search(
        r"module 'cv2|partially init\w+ .*cv2", text
    ):
        return Finding(
            'error',
            'OpenCV is damaged, as after installing or removing a second build of it',
            error,
            f'pip uninstall -y {" ".join(OPENCVS)}; pip install opencv-python',
        )
    match = re.search(r"No module named '([\w.]+)'", text)
    if match and not match.group(1).startswith('mmrest'):
        module = match.group(1).partition('.')[0]
        absent = facts['modules'].get(module, {'found': False})
        fix = INSTALL.get(module, f'pip install {module}').format(**names)
        if not absent['found']:
            return Finding('error', f'{module} is missing', f'{name}: {error}', fix)
    return None


def _is_abi(text: str) -> bool:
    return bool(re.search('undefined symbol|symbol not found', text, re.IGNORECASE))


def _no_ops(error: str, torch: str, names: dict) -> Finding:
    if torch and release(torch) >= TORCH_TOO_NEW:
        return Finding(
            'error',
            'mmcv has no operators, and this torch is too new to compile them',
            f'torch {torch}: {error}',
            'torch 2.14 and later need C++20, mmcv is written for C++17: pip install '
            '"torch===2.13.0" torchvision==0.28.0, and then: '
            + BUILD_MMCV.format(**names),
        )
    what = (
        'the compiled operators of mmcv belong to another torch'
        if _is_abi(error)
        else 'mmcv has no compiled operators (mmcv._ext): it was built without torch'
    )
    return Finding('error', what, error, BUILD_MMCV.format(**names))


# --- what is not there, and what is only worth knowing ---


def _missing(facts: dict, names: dict, require):
    for name in require:
        if not facts['modules'][name]['found']:
            yield Finding(
                'error',
                f'{name} is missing',
                '',
                INSTALL.get(name, f'pip install {name}').format(**names),
            )


def _warnings(facts: dict):
    torch, ops = facts['modules']['torch'], facts['modules']['mmcv.ops']
    has_gpu = any(re.match(r'\d+ GPU', note) for note in torch['notes'])
    if has_gpu and 'for the CPU alone' in ops['notes']:
        yield Finding(
            'error',
            'torch sees a GPU, but mmcv was compiled for the CPU alone',
            '; '.join([*torch['notes'], *ops['notes']]),
            'Take a prebuilt mmcv wheel for your torch and CUDA, or install the CUDA '
            'toolkit of that version and compile mmcv again with FORCE_CUDA=1.',
        )
    mmrest = facts['modules']['mmrest']
    if mmrest['found'] and any('only after importing' in n for n in mmrest['notes']):
        yield Finding(
            'warning',
            'configs cannot inherit from mmrest:: before mmrest is imported',
            'mmrest is on the path but not installed',
            'pip install -e . --no-deps --no-build-isolation, in the repository',
        )
