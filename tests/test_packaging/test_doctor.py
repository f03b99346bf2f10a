"""The doctor: its judgement of made-up facts, and the real command."""

import copy
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrest.doctor import (
    NEEDED,
    REQUIREMENTS,
    diagnose,
    fits,
    import_all,
    release,
    render,
    stack_name,
)

VERSIONS = {
    'numpy': '2.4.6',
    'torch': '2.13.0',
    'torchvision': '0.28.0',
    'pkg_resources': None,
    'cv2': '4.11.0',
    'pycocotools': '2.0.11',
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmcv.ops': '2.1.0',
    'mmdet': '3.3.0',
    'mmseg': '1.2.2',
    'mmpretrain': '1.2.0',
    'mmrest': '0.1.0',
}


@pytest.fixture
def facts():
    """A machine on which everything fits."""
    distributions = {
        name: version
        for name, version in VERSIONS.items()
        if version and '.' not in name
    }
    distributions['mmsegmentation'] = distributions.pop('mmseg')
    distributions['opencv-python'] = distributions.pop('cv2')
    distributions['setuptools'] = '80.9.0'
    modules = {
        name: {'found': True, 'version': version, 'error': None, 'notes': []}
        for name, version in VERSIONS.items()
    }
    modules['torch']['notes'] = ['CPU build', 'no GPU to be seen']
    modules['mmcv.ops']['notes'] = ['compiled, work', 'for CPUs only']
    return {
        'python': '3.11.7',
        'executable': '/usr/bin/python3',
        'platform': 'Linux x86_64',
        'distributions': distributions,
        'modules': modules,
    }


def breaks(*modules, error, printed='', **versions):
    """Returns a change of the facts: modules that fail, and other versions."""

    def change(facts):
        for name in modules:
            facts['modules'][name].update(error=error, printed=printed)
        for name, version in versions.items():
            facts['distributions'][name.replace('_', '-')] = version

    return change


def lacks(*modules):
    def change(facts):
        for name in modules:
            facts['modules'][name].update(found=False, version=None)
            facts['distributions'].pop(name, None)

    return change


def on_gpu(facts):
    facts['modules']['torch']['notes'] = ['CUDA 12.8 build', '2 GPU']


def onedl(facts):
    for each in REQUIREMENTS:
        if each.onedl.startswith('onedl-'):
            version = facts['distributions'].pop(each.openmmlab)
            facts['distributions'][each.onedl] = version
    facts['distributions'].update({'onedl-mmcv': '2.3.6', 'setuptools': '84.0.0'})


def onedl_without_ops(facts):
    onedl(facts)
    breaks('mmcv.ops', error="ModuleNotFoundError: No module named 'mmcv._ext'")(facts)


GATE = (
    'AssertionError: MMCV==2.2.0 is used but incompatible. Please install '
    'mmcv>=2.0.0rc4, <2.2.0.'
)
NO_GL = 'ImportError: libGL.so.1: cannot open shared object file: No such file'
ABI = (
    'ValueError: numpy.dtype size changed, may indicate binary incompatibility. '
    'Expected 96 from C header, got 88 from PyObject'
)
SYMBOL = 'ImportError: /x/mmcv/_ext.so: undefined symbol: _ZNK3c1010TensorImpl4sizeEv'
NMS = 'RuntimeError: operator torchvision::nms does not exist'

# name: what happened, the problem named, the fix named
FAILURES = {
    'no operators': (
        breaks('mmcv.ops', error="ModuleNotFoundError: No module named 'mmcv._ext'"),
        'no compiled operators',
        'MMCV_WITH_OPS=1 pip install mmcv==2.1.0 --no-build-isolation',
    ),
    'no operators, OneDL': (
        onedl_without_ops,
        'no compiled operators',
        'pip install onedl-mmcv==2.3.6',
    ),
    'operators of another torch': (
        breaks('mmcv.ops', error=SYMBOL),
        'belong to another torch',
        '--no-cache-dir',
    ),
    'torch too new to compile mmcv': (
        breaks(
            'mmcv.ops',
            error="ModuleNotFoundError: No module named 'mmcv._ext'",
            torch='2.14.1',
            torchvision='0.29.1',
        ),
        'no compiled operators',
        'torch===2.13.0',
    ),
    'mmcv too new for mmdet': (
        breaks('mmdet', 'mmseg', error=GATE, mmcv='2.2.0'),
        'mmcv does not fit: mmcv>=2.0,<2.2',
        'mmcv==2.1.0',
    ),
    'mmcv too old for mmdet': (
        breaks('mmdet', error=GATE.replace('2.2.0 is', '1.7.2 is'), mmcv='1.7.2'),
        'mmcv does not fit: mmcv>=2.0,<2.2',
        'mmcv==2.1.0',
    ),
    'mmengine too old': (
        breaks(
            'mmdet',
            error='AssertionError: MMEngine==0.6.0 is used but incompatible. Please',
            mmengine='0.6.0',
        ),
        'mmengine does not fit',
        'mmengine>=',
    ),
    'no pkg_resources': (
        breaks(
            'mmengine', error="ModuleNotFoundError: No module named 'pkg_resources'"
        ),
        'pkg_resources is missing',
        'setuptools<81',
    ),
    'setuptools too new': (
        breaks(error='', setuptools='82.0.1'),
        'setuptools does not fit',
        'setuptools<81',
    ),
    'numpy ABI': (
        breaks('pycocotools', error=ABI),
        'pycocotools was compiled for another NumPy',
        '--force-reinstall --no-deps pycocotools',
    ),
    'numpy 2 below an old torch': (
        breaks(
            'torch',
            error='RuntimeError: Numpy is not available',
            printed='A module that was compiled using NumPy 1.x cannot be run in 2.0',
        ),
        'torch was compiled for another NumPy',
        'numpy<2',
    ),
    'torchvision of another torch, by version': (
        breaks(error='', torchvision='0.27.0'),
        'torchvision does not belong to this torch',
        'torchvision==0.28.*',
    ),
    'torchvision of another build': (
        breaks('torchvision', error=NMS, torch='2.13.0+cpu'),
        'torchvision does not belong to this torch',
        'same index',
    ),
    'no libGL': (
        breaks('cv2', 'mmcv', 'mmcv.ops', 'mmdet', error=NO_GL),
        'OpenCV needs libGL.so.1',
        'opencv-python-headless',
    ),
    'no glib': (
        breaks('cv2', error=NO_GL.replace('libGL.so.1', 'libgthread-2.0.so.0')),
        'OpenCV needs libgthread-2.0.so.0',
        'libglib2.0-0',
    ),
    'two OpenCV builds, damaged': (
        breaks(
            'cv2',
            error="AttributeError: module 'cv2' has no attribute 'imread'",
            opencv_python_headless='4.11.0',
        ),
        'installed over each other',
        'uninstall -y opencv-python opencv-python-headless',
    ),
    'two OpenCV versions': (
        breaks(error='', opencv_python_headless='4.9.0.80'),
        'installed over each other',
        'uninstall -y opencv-python opencv-python-headless',
    ),
    'OpenCV damaged by an uninstall': (
        breaks('cv2', error="AttributeError: module 'cv2' has no attribute 'imread'"),
        'OpenCV is damaged',
        'pip install opencv-python',
    ),
    'both stacks': (
        breaks(error='', onedl_mmengine='0.10.12', onedl_mmcv='2.3.6'),
        'installed over each other',
        'uninstall -y mmcv onedl-mmcv mmengine onedl-mmengine',
    ),
    'mmcv-full': (
        breaks(error='', mmcv_full='1.7.2'),
        'installed over each other',
        'uninstall -y mmcv mmcv-full',
    ),
    'Python too new': (
        lambda facts: facts.update(python='3.14.0'),
        'Python 3.14 is not supported',
        'python3.11',
    ),
    'mmseg without ftfy': (
        breaks('mmseg', error="ModuleNotFoundError: No module named 'ftfy'"),
        'ftfy is missing',
        'pip install ftfy',
    ),
    'mmcv for the CPU on a GPU machine': (
        on_gpu,
        'compiled for CPUs only',
        'FORCE_CUDA=1',
    ),
    'mmengine missing': (
        lacks('mmengine'),
        'mmengine is missing',
        'install "mmengine>=',
    ),
    'torch missing': (lacks('torch'), 'torch is missing', '"torch>=2.4"'),
    'unheard of': (
        breaks('mmpretrain', error='TypeError: what a surprise'),
        'mmpretrain cannot be imported',
        'whole error',
    ),
    'crash': (
        breaks('torch', error='the process was ended by signal 4 while importing it'),
        'torch cannot be imported',
        'Reinstall',
    ),
}


def test_nothing_to_say_when_all_fits(facts):
    assert diagnose(facts) == []
    assert 'fits together' in render(facts, [])


@pytest.mark.parametrize('case', FAILURES)
def test_known_failure(case, facts):
    change, problem, fix = FAILURES[case]
    change(facts)
    errors = [finding for finding in diagnose(facts) if finding.level == 'error']
    matching = [finding for finding in errors if problem in finding.what]
    assert len(matching) == 1, errors
    assert fix in matching[0].fix
    # The root cause comes alone or first, not buried in what follows from it.
    assert errors[0] is matching[0]
    text = render(facts, errors)
    assert problem in text
    assert '{' not in text


def test_one_failure_is_told_once(facts):
    change, _, _ = FAILURES['no libGL']
    change(facts)
    assert len(diagnose(facts)) == 1


def test_consequences_of_a_known_failure_are_not_told(facts):
    breaks('mmcv.ops', error="ModuleNotFoundError: No module named 'mmcv._ext'")(facts)
    breaks('mmdet', error='TypeError: something that follows from it')(facts)
    assert len(diagnose(facts)) == 1


@pytest.mark.parametrize('module', ['mmdet', 'mmseg', 'mmpretrain', 'pycocotools'])
def test_optional_modules_may_be_missing_unless_required(module, facts):
    lacks(module)(facts)
    assert diagnose(facts) == []
    (finding,) = diagnose(facts, require=(*NEEDED, module))
    assert finding.what == f'{module} is missing'


def test_warning_alone_is_no_failure(facts):
    breaks(error='', opencv_python_headless='4.11.0')(facts)
    (finding,) = diagnose(facts)
    assert finding.level == 'warning'
    assert 'several builds of OpenCV' in finding.what


def test_onedl_alone_fits_without_pkg_resources(facts):
    onedl(facts)
    facts['modules']['pkg_resources']['found'] = False
    assert diagnose(facts) == []


@pytest.mark.parametrize(
    ('installed', 'name'),
    [
        ([], 'none'),
        (['torch', 'mmcv', 'mmdet'], 'OpenMMLab'),
        (['onedl-mmengine'], 'OneDL'),
        (['mmdet', 'onedl-mmcv'], 'OpenMMLab and OneDL'),
    ],
)
def test_stack_name(installed, name):
    assert stack_name(dict.fromkeys(installed, '1.0')) == name


def test_packages_of_both_stacks_side_by_side_are_a_warning(facts):
    facts['distributions']['onedl-mmpretrain'] = '1.3.6'
    del facts['distributions']['mmpretrain']
    (finding,) = diagnose(facts)
    assert finding.level == 'warning'
    assert 'mixed' in finding.what


@settings(max_examples=40)
@given(
    error=st.text(),
    printed=st.text(),
    version=st.text(alphabet='0123456789.+rcdevpost', max_size=20),
    name=st.sampled_from(sorted(VERSIONS)),
)
def test_any_error_is_told(error, printed, version, name):
    facts = {
        'python': '3.11.7',
        'executable': 'python',
        'platform': 'Linux',
        'distributions': dict.fromkeys(
            ('torch', 'torchvision', 'mmcv', 'mmdet'), version
        ),
        'modules': {
            module: {'found': True, 'version': version, 'error': None, 'notes': []}
            for module in VERSIONS
        },
    }
    facts['modules'][name].update(error=error, printed=printed)
    before = copy.deepcopy(facts)
    findings = diagnose(facts)
    assert any(finding.level == 'error' for finding in findings)
    assert render(facts, findings)
    assert facts == before


def test_version_ranges():
    assert release('2.13.0+cpu') == (2, 13, 0)
    assert release('81') == (81, 0, 0)
    assert fits('2.0.0rc4', '>=2.0,<2.2') and fits('5', '')
    assert not fits('2.2.0', '>=2.0,<2.2') and not fits('1.7.2', '>=2.0,<2.2')


# --- the real command ---


@pytest.mark.slow
def test_this_environment_fits(run, tmp_path):
    command = [sys.executable, '-m', 'mmrest.doctor', '--json']
    result = run([*command, '--require', 'mmdet', 'torchvision'], cwd=tmp_path)
    report = json.loads(result.stdout)
    assert report['fits'] is True
    assert report['facts']['modules']['torch']['version'].startswith('2.')
    assert 'compiled, work' in report['facts']['modules']['mmcv.ops']['notes']
    assert 'GCC' in report['facts']['environment']  # MMEngine's own report


def test_command_runs_where_nothing_is_installed(bare, repo, tmp_path):
    (bare.site / 'here.pth').write_text(f'{repo}\n')
    result = bare.run('-m', 'mmrest.doctor', cwd=tmp_path, check=False)
    assert result.returncode == 1, result.stderr
    for name in NEEDED:
        assert f'error: {name} is missing' in result.stdout
    assert 'make env' in result.stdout


@pytest.mark.slow
def test_command_survives_a_library_that_crashes(run, tmp_path):
    (tmp_path / 'cv2.py').write_text('import os; os.kill(os.getpid(), 11)')
    (tmp_path / 'pycocotools.py').write_text('raise SystemExit(3)')
    (tmp_path / 'torchvision.py').write_text('print("noise on stdout"); 1 / 0')
    command = [sys.executable, '-m', 'mmrest.doctor', '--json']
    result = run(command, PYTHONPATH=str(tmp_path), cwd=tmp_path, check=False)
    assert result.returncode == 1
    facts = json.loads(result.stdout)['facts']['modules']
    assert 'signal 11' in facts['cv2']['error']
    assert facts['torchvision']['error'].startswith('ZeroDivisionError')
    assert facts['torchvision']['printed'] == 'noise on stdout'
    assert facts['pycocotools']['error'].startswith('SystemExit')
    assert facts['numpy']['error'] is None


def test_absent_module_is_not_an_error():
    facts = import_all(['surely_no_such_module'])
    assert facts['surely_no_such_module']['found'] is False
