"""Requirements and versions, as pip sees them."""

import re
import zipfile
from email.parser import Parser

import pytest

STACKS = re.compile(r'^(onedl-)?mm(cv|engine|det|detection|seg\w*|pretrain)\b')


@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith('.dist-info/METADATA')]
        return Parser().parsestr(archive.read(name).decode())


def requirements(metadata, extra=None):
    """Yields the requirements of an extra; without one, the hard ones."""
    for line in metadata.get_all('Requires-Dist'):
        requirement, _, marker = line.partition(';')
        found = re.search(r'extra == [\'"](\w+)[\'"]', marker)
        if (found.group(1) if found else None) == extra:
            yield requirement.strip()


def project(requirement):
    return re.match(r'[\w-]+', requirement).group()


def test_no_stack_is_a_hard_requirement(metadata):
    hard = list(requirements(metadata))
    assert {project(line) for line in hard} == {'torch', 'numpy'}


@pytest.mark.parametrize(
    ('extra', 'wanted'),
    [
        ('det', {'mmengine', 'mmcv', 'mmdet', 'pycocotools'}),
        ('seg', {'mmengine', 'mmcv', 'mmsegmentation', 'ftfy', 'regex'}),
        ('cls', {'mmengine', 'mmcv', 'mmpretrain'}),
    ],
)
def test_extras(metadata, extra, wanted):
    found = {
        re.match(r'[\w-]+', line).group() for line in requirements(metadata, extra)
    }
    assert found == wanted


def test_dev_extra_is_the_requirement_file(metadata, repo):
    lines = (repo / 'requirements' / 'dev.txt').read_text().splitlines()
    wanted = {project(line) for line in lines if line[0] != '#'}
    found = {
        re.match(r'[\w-]+', line).group() for line in requirements(metadata, 'dev')
    }
    assert found == wanted
    assert not any(STACKS.match(name) for name in found)


def test_version_is_the_packages(metadata):
    import mmrest

    assert metadata['Version'] == mmrest.__version__


@pytest.mark.parametrize('stack', ['openmmlab', 'onedl'])
def test_stack_is_pinned(repo, stack):
    lines = (repo / 'requirements' / f'{stack}.txt').read_text().splitlines()
    packages = [line for line in lines if STACKS.match(line)]
    assert len(packages) == 5
    assert all('==' in line for line in packages)
    assert all(line.startswith('onedl-') == (stack == 'onedl') for line in packages)


def test_tools_of_pre_commit_are_those_of_dev(repo):
    dev = dict(
        line.split('==')
        for line in (repo / 'requirements' / 'dev.txt').read_text().splitlines()
        if '==' in line
    )
    hooks = (repo / '.pre-commit-config.yaml').read_text()
    for tool in ('ruff', 'codespell'):
        assert f'rev: v{dev[tool]}' in hooks
