"""What the built distributions carry, and that installing them works."""

import re
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import mmrest

STACKS = re.compile(r'^(onedl-)?mm(cv|engine|det|detection|seg\w*|pretrain)\b')

# Another project's config, read as its own program would read it.
READ = """
import mmrest
from mmengine.config import Config
from mmengine.hub import get_config, get_model
from pathlib import Path
cfg = Config.fromfile('project.py')
found = [cfg.model.backbone.type, cfg.model.backbone.arch, cfg.work_dir]
found.append(get_config('mmrest::retinanet/rest_lite_fpn_1x.py').model.type)
found.append(type(get_model('mmrest::imagenet/rest_lite_8xb128_in1k.py')).__name__)
folder = Path(mmrest.__file__).parent / '.mim' / 'names'
for file in sorted(folder.glob('*_rest_small_fpn_1x.py')):  # in a wheel
    found.append(Config.fromfile(file).model.type)
print()
print(*found)
"""


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_in(folder: Path, *endings: str) -> set[str]:
    return {
        file.relative_to(folder.parent).as_posix()
        for file in folder.rglob('*')
        if file.is_file() and '__pycache__' not in file.parts
        if not endings or file.suffix in endings
    }


@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith('.dist-info/METADATA')]
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_carries_the_package_and_its_configs_and_nothing_else(wheel, source):
    found = {name for name in names(wheel) if '.dist-info/' not in name}
    mim = {'model-index.yml', *files_in(source / 'configs', '.py', '.yml')}
    mim |= files_in(source / 'tools', '.py', '.sh')
    # MIM finds a config by the name of its file
    configs = (source / 'configs').glob('[!_]*/*.py')
    mim |= {f'names/{path.parent.name}_{path.name}' for path in configs}
    package = files_in(source / 'mmrest', '.py', '.cpp')
    package = {name for name in package if not name.startswith('mmrest/.mim/')}
    wanted = package | {'mmrest/py.typed'} | {f'mmrest/.mim/{name}' for name in mim}
    assert len(mim) > 80
    assert found == wanted
    assert any(name.endswith('/LICENSE') for name in names(wheel))


def test_model_index_names_files_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:

        def read(name):
            return yaml.safe_load(archive.read(f'mmrest/.mim/{name}'))

        metafiles = read('model-index.yml')['Import']
        models = [model for name in metafiles for model in read(name)['Models']]
        scripts = [info for info in archive.infolist() if info.filename.endswith('.sh')]
    assert models
    assert {f'mmrest/.mim/{model["Config"]}' for model in models} <= names(wheel)
    assert scripts
    assert all(info.external_attr >> 16 & 0o100 for info in scripts), 'executable'


@pytest.mark.slow
def test_leftovers_of_an_earlier_build_stay_out(build, source, wheel):
    for stale in ('mmrest/gone.py', 'mmrest/.mim/configs/gone.py'):
        path = source / 'build' / 'lib' / stale
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('')
    assert names(build('build_wheel')) == names(wheel)


@pytest.mark.slow
def test_wheel_from_sdist_is_the_same(build, wheel, tmp_path):
    with tarfile.open(build('build_sdist')) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    assert (unpacked / 'tests' / 'test_packaging').is_dir()
    assert names(build('build_wheel', unpacked)) == names(wheel)


@pytest.mark.slow
@pytest.mark.parametrize('hook', ['build_wheel', 'build_editable'])
def test_configs_can_be_inherited_wherever_mmrest_is_installed(
    hook, build, wheel, scratch, tmp_path
):
    project = tmp_path / 'project'
    project.mkdir()
    (project / 'project.py').write_text(
        "_base_ = 'mmrest::mask_rcnn/rest_base_fpn_1x.py'\nwork_dir = 'mine'\n"
    )
    before = set(scratch.site.rglob('*'))
    built = wheel if hook == 'build_wheel' else build(hook)
    scratch.pip('install', '--no-deps', '--no-index', str(built))
    result = scratch.run('-W', 'ignore', '-c', READ, cwd=project)
    named = ['MaskRCNN', 'RetinaNet'] if hook == 'build_wheel' else []
    printed = ['ResT', 'base', 'mine', 'RetinaNet', 'ImageClassifier', *named]
    assert result.stdout.splitlines()[-1].split() == printed

    # without mmrest in the process: one file with everything
    scratch.run(
        *('-m', 'mmrest.config', 'mask_rcnn/rest_base_fpn_1x', '--output', 'base.py'),
        cwd=project,
    )
    read = (
        "from mmengine.config import Config; cfg = Config.fromfile('base.py', "
        'import_custom_modules=False); print(cfg.model.backbone.arch); import sys; '
        "assert 'mmrest' not in sys.modules"
    )
    assert scratch.run('-c', read, cwd=project).stdout.split() == ['base']

    scratch.pip('uninstall', '-y', 'mmrest')
    left = {path for path in scratch.site.rglob('*') if '__pycache__' not in path.parts}
    assert left - before == set()


def test_no_stack_is_a_hard_requirement(metadata):
    by_extra: dict = {}
    for line in metadata.get_all('Requires-Dist'):
        found = re.search(r'extra == [\'"](\w+)[\'"]', line)
        extra = found.group(1) if found else None
        by_extra.setdefault(extra, set()).add(re.match(r'[\w-]+', line).group())
    assert by_extra[None] == {'torch', 'numpy'}
    assert {'mmengine', 'mmcv', 'mmdet', 'pycocotools'} <= by_extra['det']
    assert {'mmengine', 'mmcv', 'mmsegmentation', 'ftfy', 'regex'} <= by_extra['seg']
    assert {'mmengine', 'mmcv', 'mmpretrain'} <= by_extra['cls']
    assert {'pytest', 'pytest-xdist', 'mypy'} <= by_extra['dev']
    assert not any(STACKS.match(name) for name in by_extra['dev'] | by_extra['docs'])
    assert metadata['Version'] == mmrest.__version__


@pytest.mark.parametrize('stack', ['openmmlab', 'onedl'])
def test_stack_is_pinned(repo, stack):
    lines = (repo / 'requirements' / f'{stack}.txt').read_text().splitlines()
    packages = [line for line in lines if STACKS.match(line)]
    assert len(packages) == 5
    assert all('==' in line for line in packages)
    assert all(line.startswith('onedl-') == (stack == 'onedl') for line in packages)
    assert any(re.match(r'numpy.*<', line) for line in lines)


def test_tools_of_pre_commit_are_those_of_dev(repo):
    lines = (repo / 'requirements' / 'dev.txt').read_text().splitlines()
    dev = dict(line.split('==') for line in lines if '==' in line)
    hooks = (repo / '.pre-commit-config.yaml').read_text()
    for tool in ('ruff', 'codespell'):
        assert f'rev: v{dev[tool]}' in hooks
