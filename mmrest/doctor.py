"""``python -m mmrest.doctor``: what is installed, what does not fit, and the fix.

It must run where other imports fail, so this file only imports the standard library.
Packages are imported in another process, because a broken library may end it.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any, NamedTuple, Optional

Facts = dict[str, Any]


class Requirement(NamedTuple):
    """A module, and the distribution of each stack that provides it."""

    module: str
    openmmlab: str  # distribution of OpenMMLab, and of OneDL unless given below
    versions: str = ''
    onedl: str = ''
    onedl_versions: str = ''


NEEDED = ('numpy', 'torch', 'mmengine', 'mmcv')
OPTIONAL = ('torchvision', 'cv2', 'pycocotools', 'mmdet', 'mmseg', 'mmpretrain')
REQUIREMENTS = (
    Requirement('numpy', 'numpy'),
    Requirement('torch', 'torch', '>=2.4'),
    Requirement('torchvision', 'torchvision'),
    # the last setuptools with pkg_resources, which OpenMMLab's mmengine imports
    Requirement('pkg_resources', 'setuptools', '<81', 'setuptools', ''),
    Requirement('cv2', 'opencv-python'),
    Requirement('pycocotools', 'pycocotools'),
    Requirement('mmengine', 'mmengine', '>=0.10.4,<1', 'onedl-mmengine', '>=0.10.4,<1'),
    Requirement('mmcv', 'mmcv', '>=2.0,<2.2', 'onedl-mmcv', '>=2.3,<3'),
    Requirement('mmdet', 'mmdet', '>=3.3,<4', 'onedl-mmdetection', '>=3.3,<4'),
    Requirement(
        'mmseg', 'mmsegmentation', '>=1.2.2,<2', 'onedl-mmsegmentation', '>=1.2.2,<2'
    ),
    Requirement('mmpretrain', 'mmpretrain', '>=1.2,<2', 'onedl-mmpretrain', '>=1.2,<2'),
)
BY_MODULE = {each.module: each for each in REQUIREMENTS}
OPENCVS = (
    'opencv-python',
    'opencv-python-headless',
    'opencv-contrib-python',
    'opencv-contrib-python-headless',
)
# Distributions with the same modules, of which only one may be installed
TWINS = (
    ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'),
    *((each.openmmlab, each.onedl) for each in REQUIREMENTS if each.module != 'mmcv'),
    OPENCVS,
)
PYTHONS = ((3, 9), (3, 12))

TORCH_PAIR = 'pip install "torch===2.13.0" torchvision==0.28.0'
BUILD_MMCV = (
    'Run `make env`; or, with torch already installed: pip uninstall -y {mmcv}; pip '
    'install "setuptools<81" wheel ninja psutil; MMCV_WITH_OPS=1 pip install '
    '{mmcv}=={version} --no-build-isolation --no-binary {mmcv} --no-cache-dir (about 9 '
    'minutes on two cores; needs a C++ compiler). mmcv is written for C++17 and torch '
    f'2.14 needs C++20: with that, first {TORCH_PAIR}. With CUDA, first look for a '
    'prebuilt wheel for your torch and CUDA: OneDL publishes some.'
)
TORCHVISION = (
    'torchvision does not belong to this torch',
    'torch 2.N belongs to torchvision 0.(N+15), from the same index: a +cpu or +cu '
    'build of the one does not load with another build of the other. For yours: pip '
    f'install "torchvision=={{vision}}.*". The tested pair: {TORCH_PAIR}',
)
# Causes of import errors: pattern, problem, fix. The first match counts.
CAUSES = (
    (
        r'(?P<it>lib(?:GL|EGL|gthread|glib|SM|Xext|Xrender|X11|xcb)\b[\w.-]*).*'
        'cannot open shared object',
        'OpenCV needs {it}, a library of desktops, which is missing',
        'pip uninstall -y opencv-python; pip install opencv-python-headless. Or '
        'install the library: apt-get install libgl1 libglib2.0-0',
    ),
    (
        r'numpy\.dtype size changed|compiled using NumPy 1|_ARRAY_API not found|'
        r'numpy\.core\.multiarray failed|compiled against (ABI|API) version',
        '{name} was compiled for another NumPy (ABI)',
        'Install a newer build: pip install -U --force-reinstall --no-deps {name}; if '
        'there is none: pip install "numpy<2"',
    ),
    ('pkg_resources', 'pkg_resources is missing', 'pip install "setuptools<81"'),
    (
        r'MMCV==\S+ is used but incompatible',
        '{mmcv} does not fit: {mmcv}{wanted} is needed',
        BUILD_MMCV,
    ),
    (
        r'MMEngine==\S+ is used but incompatible',
        '{name} does not accept this mmengine',
        'pip install "{mmengine}>=0.10.4,<1"',
    ),
    ('torchvision::nms does not exist', *TORCHVISION),
    (
        '(undefined symbol|symbol not found).*mmcv|mmcv.*(undefined symbol|not found)',
        'the compiled operators of mmcv belong to another torch',
        BUILD_MMCV,
    ),
    (
        r'mmcv\._ext',
        'mmcv has no compiled operators (mmcv._ext): it was built without torch',
        BUILD_MMCV,
    ),
    (
        r"module 'cv2|partially init\w+ .*cv2",
        'OpenCV is damaged, as after installing or removing a second build of it',
        f'pip uninstall -y {" ".join(OPENCVS)}; pip install opencv-python',
    ),
    (r"No module named '(?P<it>(?!mmrest)\w+)", '{it} is missing', '{install}'),
)


@dataclass(frozen=True)
class Finding:
    """A problem with the installation.

    Attributes:
        what: What is wrong.
        found: What was seen; may be empty.
        fix: What to do.
        level: ``'error'`` or ``'warning'``.
    """

    what: str
    found: str
    fix: str
    level: str = 'error'


# ---------------------------------------------------------------- facts

# Runs in the other process. For each module it prints its name, which is needed after a
# crash, and a line of JSON.
_IMPORT = r"""
import contextlib, importlib, importlib.util, io, json, os, sys, warnings
warnings.simplefilter('ignore')
out = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)

def box():
    import torch
    return torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.ones(1), 0.5

def notes(name, module, fact):
    if name == 'torch':
        cuda = module.version.cuda
        gpus = module.cuda.device_count() if module.cuda.is_available() else 0
        return [f'CUDA {cuda} build' if cuda else 'CPU build',
                f'{gpus} GPU' if gpus else 'no GPU to be seen']
    if name == 'torchvision':
        importlib.import_module('torchvision.ops').nms(*box())
    if name == 'pycocotools':
        importlib.import_module('pycocotools.mask')
    if name == 'cv2':
        module.imread
    if name == 'mmengine':
        collect = importlib.import_module('mmengine.utils.dl_utils').collect_env
        fact['environment'] = {key: str(value) for key, value in collect().items()}
    if name == 'mmcv.ops':
        module.nms(*box())
        cuda = module.get_compiling_cuda_version()
        return ['compiled, work', 'for CPUs only' if cuda == 'not available'
                else f'for CUDA {cuda}']
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
                fact['notes'] = notes(name, module, fact)
    except BaseException as error:
        said = f'{type(error).__name__}: {error}'
        cause = error.__cause__
        if cause is not None and str(cause) not in said:
            said += f' (from {type(cause).__name__}: {cause})'
        # Some libraries print the reason and raise something else.
        fact.update(error=said, printed=text.getvalue().strip()[-2000:])
    print(json.dumps(fact), file=out, flush=True)
"""
_TIMEOUT = 300  # seconds for all imports of one process, on a cold disk


def collect_facts() -> Facts:
    """Collect the facts that :func:`diagnose` needs.

    Returns:
        dict: ``python``, ``executable`` and ``platform`` (str); ``distributions``, the
        versions of installed distributions by name; ``modules``, a dict by name of
        dicts with ``found`` (bool), ``version`` (str or None), ``error`` (str or None),
        ``notes`` (list of str) and, with an error, ``printed`` (str); ``environment``,
        MMEngine's own report, if MMEngine can be imported.
    """
    distributions = {}
    for name in sorted({name for row in TWINS for name in row if name} | {'mmrest'}):
        with suppress(metadata.PackageNotFoundError):
            distributions[name] = metadata.version(name)
    # the version is None if only the folder of the metadata is left
    distributions = {name: v for name, v in distributions.items() if v}
    modules = import_all([*BY_MODULE, 'mmcv.ops', 'mmrest'])
    for each in REQUIREMENTS:
        fact = modules[each.module]
        fact['version'] = fact['version'] or distributions.get(each.openmmlab)
    modules['cv2']['notes'] = [name for name in OPENCVS if name in distributions]
    return dict(
        python=platform.python_version(),
        executable=sys.executable,
        platform=f'{platform.system()} {platform.machine()}',
        distributions=distributions,
        modules=modules,
        environment=modules['mmengine'].pop('environment', {}),
    )


def import_all(names: Sequence[str]) -> dict[str, dict]:
    """Import each module in another process; see :func:`collect_facts`."""
    facts: dict[str, dict] = {}
    while waiting := [name for name in names if name not in facts]:
        try:
            result = subprocess.run(
                [sys.executable, '-c', _IMPORT, *waiting],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_TIMEOUT,
            )
            output, ending = result.stdout, f'ended with status {result.returncode}'
            if result.returncode < 0:
                ending = f'was ended by signal {-result.returncode}'
        except subprocess.TimeoutExpired as error:
            output, ending = error.stdout or b'', f'hung for {_TIMEOUT} s'
        lines = output.decode().splitlines()
        facts.update(zip(lines[::2], map(json.loads, lines[1::2])))
        if len(lines) % 2 or not lines:  # without lines, Python itself did not start
            culprit = lines[-1] if lines else waiting[0]
            error_text = f'the process {ending} while importing it'
            facts[culprit] = dict(found=True, version=None, error=error_text, notes=[])
    return {name: facts[name] for name in names}


# ---------------------------------------------------------------- diagnosis


def diagnose(facts: Facts, require: Sequence[str] = NEEDED) -> list[Finding]:
    """Find problems, without side effects.

    Args:
        facts (dict): The result of :func:`collect_facts`.
        require (Sequence[str]): Modules that must be installed.

    Returns:
        list[Finding]: Errors first, and causes before their consequences. An unknown
        import error is only included if there is no other error.
    """
    modules = facts['modules']
    findings = [*_check_twins(facts), *_check_versions(facts)]
    unexplained: list[Finding] = []
    for name, fact in modules.items():
        if fact['found'] and fact['error'] is not None:
            finding = _explain(name, fact, facts)
            (findings if finding.fix else unexplained).append(finding)
    if 'mmengine' in facts['distributions']:
        require = [*require, 'pkg_resources']
    for name in require:
        if not modules[name]['found']:
            findings.append(Finding(f'{name} is missing', '', _install(name, facts)))
    notes = [*modules['torch']['notes'], *modules['mmcv.ops']['notes']]
    if 'for CPUs only' in notes and any(re.match(r'\d+ GPU', n) for n in notes):
        what = 'torch sees a GPU, but mmcv was compiled for CPUs only'
        fix = (
            'Take a prebuilt mmcv wheel for your torch and CUDA (OneDL publishes '
            'some), or install the CUDA toolkit of that version and compile mmcv again '
            'with FORCE_CUDA=1.'
        )
        findings.append(Finding(what, '; '.join(notes), fix))
    if not any(finding.level == 'error' for finding in findings):
        fix = 'Reinstall it; importing it in Python shows the whole error.'
        findings += [replace(finding, fix=fix) for finding in unexplained[:1]]
    unique: dict[str, Finding] = {}
    for finding in findings:
        unique.setdefault(finding.what, finding)
    return sorted(unique.values(), key=lambda finding: finding.level)


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: ``'2.13+cpu'`` gives ``(2, 13, 0)``."""
    numbers = [int(part) for part in re.findall(r'\d+', version.split('+')[0])]
    return tuple([*numbers, 0, 0, 0][:3])


def fits(version: str, wanted: str) -> bool:
    """Whether a version is in a range of ``>=`` and ``<``, such as ``>=2.0,<2.2``."""
    return all(
        (release(version) >= release(clause)) is clause.startswith('>=')
        for clause in filter(None, wanted.split(','))
    )


def stack_name(distributions: dict[str, str]) -> str:
    """Return whose packages are installed: OpenMMLab, OneDL, both or none."""
    stacks = {
        'OneDL' if name.startswith('onedl-') else 'OpenMMLab'
        for name in distributions
        if any(name in each and each.module.startswith('mm') for each in REQUIREMENTS)
    }
    return ' and '.join(sorted(stacks, reverse=True)) or 'none'


def _of_stack(each: Requirement, facts: Facts) -> tuple[str, str]:
    """The distribution and versions of a requirement in the installed stack."""
    if each.onedl and 'OneDL' in stack_name(facts['distributions']):
        return each.onedl, each.onedl_versions
    return each.openmmlab, each.versions


def _words(facts: Facts) -> dict[str, str]:
    """The words that the texts above need."""
    mmcv, wanted = _of_stack(BY_MODULE['mmcv'], facts)
    mmengine, _ = _of_stack(BY_MODULE['mmengine'], facts)
    version = facts['distributions'].get(mmcv, '')
    if not (version and fits(version, wanted)):
        version = '2.3.6' if mmcv.startswith('onedl-') else '2.1.0'
    vision = f'0.{release(facts["distributions"].get("torch", ""))[1] + 15}'
    return dict(
        mmcv=mmcv, wanted=wanted, version=version, mmengine=mmengine, vision=vision
    )


def _install(module: str, facts: Facts) -> str:
    if module == 'mmcv':
        return BUILD_MMCV.format(**_words(facts))
    each = BY_MODULE.get(module, Requirement(module, module))
    name, wanted = _of_stack(each, facts)
    command = f'pip install "{name}{wanted}"' if wanted else f'pip install {name}'
    return command + (' ftfy regex' if module == 'mmseg' else '')


def _check_twins(facts: Facts) -> Iterator[Finding]:
    installed = facts['distributions']
    over_each_other = []
    for row in TWINS:
        names = [name for name in dict.fromkeys(row) if name in installed]
        if len(names) < 2:
            continue
        works = row == OPENCVS and facts['modules']['cv2']['error'] is None
        if works and len({installed[name] for name in names}) == 1:
            yield Finding(
                'several builds of OpenCV are installed over each other',
                ', '.join(names),
                f'Keep one: pip uninstall -y {" ".join(names)}; pip install {names[0]}',
                'warning',
            )
        else:
            over_each_other += names
    if over_each_other:
        yield Finding(
            'packages are installed over each other: they have the same modules',
            ', '.join(f'{name} {installed[name]}' for name in over_each_other),
            f'pip uninstall -y {" ".join(over_each_other)}; then install those of one '
            'stack, and one build of OpenCV; or run `make env STACK=openmmlab` or '
            '`make env STACK=onedl`.',
        )
    elif ' and ' in stack_name(installed):
        yield Finding(
            'packages of OpenMMLab and of OneDL are mixed',
            ', '.join(name for name in installed if 'mm' in name),
            'Take all of them from one stack; no mixture is tested.',
            'warning',
        )


def _check_versions(facts: Facts) -> Iterator[Finding]:
    installed = facts['distributions']
    python = release(facts['python'])[:2]
    if not PYTHONS[0] <= python <= PYTHONS[1]:
        yield Finding(
            f'Python {python[0]}.{python[1]} is not supported by mmcv',
            facts['executable'],
            'Use Python 3.9 to 3.12, e.g. make env PYTHON=python3.11.',
        )
    for each in REQUIREMENTS:
        name, wanted = _of_stack(each, facts)
        if name == 'setuptools' and 'mmengine' not in installed:
            continue
        if name in installed and not fits(installed[name], wanted):
            yield Finding(
                f'{name} does not fit: {name}{wanted} is needed',
                f'{name} {installed[name]}',
                _install(each.module, facts),
            )
    torch, vision = installed.get('torch'), installed.get('torchvision')
    if torch and vision and release(torch)[0] == 2:
        if release(vision)[:2] != (0, release(torch)[1] + 15):
            yield _explain('torchvision', {'error': ''}, facts)


def _explain(name: str, fact: dict, facts: Facts) -> Finding:
    """Explain an error on import; without a fix if it is unknown."""
    error, installed = fact['error'], facts['distributions']
    text = f'{name}: {error}\n{fact.get("printed", "")}'
    words = dict(_words(facts), name=name)
    if name == 'torchvision' and 'torch' in installed:
        what, fix = TORCHVISION
        pair = f'torch {installed["torch"]}, torchvision {installed.get(name)}'
        return Finding(what, error or pair, fix.format(**words))
    for pattern, what, fix in CAUSES:
        match = re.search(pattern, text, re.DOTALL)
        it = match.groupdict().get('it') if match else None
        if match and not facts['modules'].get(it, {}).get('found'):
            words.update(it=it or '', install=_install(it or '', facts))
            return Finding(what.format(**words), error, fix.format(**words))
    return Finding(f'{name} cannot be imported', error, '')


# ---------------------------------------------------------------- command line


def render(facts: Facts, findings: Sequence[Finding]) -> str:
    """Return the report as text."""
    lines = [
        f'mmrest doctor: Python {facts["python"]} ({facts["executable"]}), '
        f'{facts["platform"]}',
        f'  {"stack":<13} {stack_name(facts["distributions"])}',
    ]
    for name, fact in facts['modules'].items():
        state = '; '.join([fact['version'] or 'found', *fact['notes']])
        if fact['error'] is not None:
            state += f'; BROKEN: {fact["error"]}'
        lines.append(f'  {name:<13} {state if fact["found"] else "not installed"}')
    lines += [
        f'  {key:<13} {value}'
        for key, value in facts.get('environment', {}).items()
        if re.search('CUDA|GPU|GCC|NVCC', key) and '\n' not in value
    ]
    for finding in findings:
        lines += ['', f'{finding.level}: {finding.what}']
        lines += [f'  found: {finding.found}'] if finding.found else []
        lines += [f'  fix:   {finding.fix}']
    errors = sum(finding.level == 'error' for finding in findings)
    summary = f'{errors} problem{"s" if errors > 1 else ""} found'
    lines += ['', summary if errors else 'Everything that is installed fits together.']
    return '\n'.join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the report.

    Returns:
        int: 0 if everything that is installed fits, 1 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mmrest.doctor',
        description='Print what is installed, what does not fit, and the fix.',
    )
    parser.add_argument('--json', action='store_true', help='print JSON instead')
    parser.add_argument(
        '--require',
        nargs='+',
        default=[],
        choices=OPTIONAL,
        metavar='MODULE',
        help=f'optional modules that must be there: {", ".join(OPTIONAL)}',
    )
    args = parser.parse_args(argv)

    facts = collect_facts()
    findings = diagnose(facts, require=(*NEEDED, *args.require))
    fit = not any(finding.level == 'error' for finding in findings)
    if args.json:
        report = dict(fits=fit, facts=facts, findings=[asdict(f) for f in findings])
        print(json.dumps(report, indent=2))
    else:
        print(render(facts, findings))
    return 0 if fit else 1


if __name__ == '__main__':
    sys.exit(main())
