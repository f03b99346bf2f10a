"""What the built distributions carry, and that installing them works."""

import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

# Config.fromfile in a process that has not imported mmrest.
READ = """
import sys
from mmengine.config import Config
assert 'mmrest' not in sys.modules
cfg = Config.fromfile('project.py', import_custom_modules=False)
assert 'mmrest' not in sys.modules
print(cfg.model.backbone.type, cfg.model.backbone.arch, cfg.work_dir)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody else's project, with one config."""
    folder = tmp_path / 'project'
    folder.mkdir()
    (folder / 'project.py').write_text(
        "_base_ = 'mmrest::mask_rcnn/rest_base_fpn_1x.py'\nwork_dir = 'mine'\n"
    )
    return folder


def names(wheel: Path) -> set:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_carries_every_config_and_tool(wheel, repo):
    files = names(wheel)
    for folder in ('configs', 'tools'):
        wanted = {
            f'mmrest/.mim/{file.relative_to(repo).as_posix()}'
            for file in (repo / folder).rglob('*')
            if file.is_file() and '__pycache__' not in file.parts
        }
        assert len(wanted) > 5
        assert wanted <= files
    assert 'mmrest-config-scope.pth' in files
    assert any(name.endswith('/licenses/LICENSE') for name in files) or any(
        name.endswith('.dist-info/LICENSE') for name in files
    )


def test_wheel_carries_the_whole_package_and_nothing_else(wheel, repo):
    files = {name for name in names(wheel) if '.dist-info/' not in name}
    package = {
        file.relative_to(repo).as_posix()
        for file in (repo / 'mmrest').rglob('*')
        if file.is_file() and '__pycache__' not in file.parts
    }
    rest = {name for name in files if not name.startswith('mmrest/.mim/')}
    assert rest == package | {'mmrest-config-scope.pth'}


def test_model_index_names_files_of_the_wheel(wheel):
    files = names(wheel)
    with zipfile.ZipFile(wheel) as archive:

        def read(name):
            return yaml.safe_load(archive.read(f'mmrest/.mim/{name}'))

        models = [
            model
            for metafile in read('model-index.yml')['Import']
            for model in read(metafile)['Models']
        ]
    assert models
    assert {f'mmrest/.mim/{model["Config"]}' for model in models} <= files


def test_scripts_stay_executable(wheel):
    with zipfile.ZipFile(wheel) as archive:
        scripts = [info for info in archive.infolist() if info.filename.endswith('.sh')]
    assert scripts
    assert all(info.external_attr >> 16 & 0o100 for info in scripts)


def test_leftovers_of_an_earlier_build_stay_out(build, source, wheel):
    for stale in ('mmrest/gone.py', 'mmrest/.mim/configs/gone.py'):
        path = source / 'build' / 'lib' / stale
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('')
    assert names(build('build_wheel')) == names(wheel)


def test_wheel_from_sdist_is_the_same(build, wheel, tmp_path):
    with tarfile.open(build('build_sdist')) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    assert (unpacked / 'tests' / 'test_packaging').is_dir()
    assert names(build('build_wheel', unpacked)) == names(wheel)


@pytest.mark.parametrize('hook', ['build_wheel', 'build_editable'])
def test_installed_scope_works_and_leaves_nothing_behind(hook, build, scratch, project):
    before = set(scratch.site.rglob('*'))
    scratch.pip('install', '--no-deps', '--no-index', str(build(hook)))
    result = scratch.run('-c', READ, cwd=project)
    assert result.stdout.split() == ['ResT', 'base', 'mine']

    scratch.pip('uninstall', '-y', 'mmrest')
    after = {
        path for path in scratch.site.rglob('*') if '__pycache__' not in path.parts
    }
    assert after - before == set()
    result = scratch.run('-c', READ, cwd=project, check=False)
    assert 'mmrest' in result.stderr  # MMEngine's own error again


def test_mmengine_hub_finds_the_configs_of_a_wheel(wheel, scratch, tmp_path):
    scratch.pip('install', '--no-deps', '--no-index', str(wheel))
    code = (
        'from mmengine.hub import get_config; '
        "print(get_config('mmrest::retinanet/rest_lite_fpn_1x.py').model.type)"
    )
    result = scratch.run('-W', 'ignore', '-c', code, cwd=tmp_path)
    assert result.stdout.split() == ['RetinaNet']


@pytest.mark.parametrize('damage', ['no package', 'broken file', 'no mmengine'])
def test_damaged_install_never_breaks_the_interpreter(damage, wheel, scratch, project):
    scratch.pip('install', '--no-deps', '--no-index', str(wheel))
    package = scratch.site / 'mmrest'
    if damage == 'no package':
        package.rename(scratch.site / 'elsewhere')
    elif damage == 'broken file':
        (package / 'config_scope.py').write_text('this is not Python')
    else:
        scratch.libraries.unlink()
    (project / 'plain.py').write_text('a = 1\n')
    read = "from mmengine.config import Config; print(Config.fromfile('plain.py').a)"
    result = scratch.run('-c', read, cwd=project, check=False)
    if damage == 'no mmengine':
        assert "No module named 'mmengine'" in result.stderr
    else:
        assert result.stdout.split() == ['1']
    result = scratch.run('-c', 'print(2)', cwd=project)
    assert result.stdout.split() == ['2']
    assert result.stderr == ''


def test_pth_imports_nothing_at_interpreter_start(repo):
    line = (repo / 'mmrest-config-scope.pth').read_text()
    assert line.startswith('import ')
    assert line.count('\n') == 1  # Python reads each line on its own
    before, finders = set(sys.modules), list(sys.meta_path)
    try:
        exec(line, {})
        added = sys.meta_path[: -len(finders)]
        assert [finder.__name__ for finder in added] == ['MmrestConfigScope']
        assert added[0].find_spec('json') is None
    finally:
        sys.meta_path[:] = finders
    assert set(sys.modules) == before
