"""tools/make_env.sh: what it says on a machine that lacks something, and its order.

Installing for real takes minutes and is what `make test` itself begins with. Here a
script stands in for Python and pip, so that each failure can be had at will.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What the script may use besides Python and a compiler.
COMMANDS = ('bash', 'dirname', 'cat', 'df', 'awk', 'ls', 'grep', 'cksum', 'mkdir', 'rm')
COMMANDS += ('tail', 'cp', 'flock', 'sleep')

# Stands in for python3 and for the environment's python. It notes every call, and
# fails one whose arguments hold the text in the file `fail`, leaving `log` in pip's.
FAKE_PYTHON = r"""#!/usr/bin/env bash
state=STATE
printf '%s\n' "$*" >>"$state/calls"
case "$*" in
  *'%d.%d'*) cat "$state/version" ;;
  --version) echo "Python $(cat "$state/version").0" ;;
  *'import venv'*) [ ! -f "$state/no-venv" ] ;;
  *get_paths*) echo "$state/include" ;;
  *sched_getaffinity*) echo 2 ;;
  '-m venv '*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  *'-m pip'*install*)
    [ ! -f "$state/slow" ] || sleep 0.3
    if [ -f "$state/fail" ] && [[ "$*" == *"$(cat "$state/fail")"* ]]; then
      cat "$state/log" >>"$4"
      exit 1
    fi ;;
  -)
    if [[ $(cat) == *module_from_spec* ]] && [ -f "$state/no-ops" ]; then
      rm "$state/no-ops"
      exit 1
    fi ;;
  *mmrest.doctor*) [ ! -f "$state/unfit" ] ;;
esac
"""


class Machine:
    """A copy of the files that matter, and a PATH that is all there is."""

    def __init__(self, folder: Path, repo: Path):
        self.state, self.bin = folder / 'state', folder / 'bin'
        self.repo, self.env = folder / 'repo', folder / 'my env'
        for path in (self.state, self.bin, self.repo / 'mmrest', self.repo / 'tools'):
            path.mkdir(parents=True)
        for name in ('setup.py', 'pyproject.toml'):
            shutil.copy(repo / name, self.repo)
        for name in ('mmrest/version.py', 'tools/make_env.sh'):
            shutil.copy(repo / name, self.repo / name)
        shutil.copytree(repo / 'requirements', self.repo / 'requirements')
        for name in COMMANDS:
            if shutil.which(name):
                (self.bin / name).symlink_to(shutil.which(name))
        self.script('python3', FAKE_PYTHON.replace('STATE', f"'{self.state}'"))
        self.script('g++', '#!/bin/sh\n')
        self.say('version', '3.11')
        self.say('include/Python.h', '')

    def script(self, name: str, text: str):
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def say(self, name: str, text: str):
        path = self.state / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def lose(self, name: str):
        (self.bin / name).unlink()

    def start(self, stack='openmmlab', **variables):
        return subprocess.Popen(
            ['bash', str(self.repo / 'tools/make_env.sh'), stack, str(self.env)],
            env={'PATH': str(self.bin), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, stack='openmmlab', **variables):
        (self.state / 'calls').write_text('')
        process = self.start(stack, **variables)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(
            process.args, process.returncode, stdout, stderr
        )

    @property
    def installs(self) -> list:
        calls = (self.state / 'calls').read_text().splitlines()
        return [call.partition(' install ')[2] for call in calls if ' install ' in call]


@pytest.fixture
def machine(tmp_path, repo) -> Machine:
    return Machine(tmp_path, repo)


def old_python(machine):
    machine.say('version', '3.8')


def no_venv(machine):
    machine.say('no-venv', '')


def no_headers(machine):
    (machine.state / 'include/Python.h').unlink()


def no_space(machine):
    machine.script('df', "#!/bin/sh\necho head; echo 'disk 100 90 2097152 90% /'\n")


def folder_of_somebody(machine):
    machine.env.mkdir()
    (machine.env / 'thesis.txt').write_text('precious')


def file_in_the_way(machine):
    machine.env.write_text('precious')


def other_stack(machine):
    machine.env.mkdir()
    (machine.env / 'mmrest-stack').write_text('onedl\n')


LACKS = {
    'no python': (
        lambda machine: machine.lose('python3'),
        {},
        'no Python 3.9 to 3.12 found (python3: none)',
        'PYTHON=/path/to/python3.11',
    ),
    'old python': (old_python, {}, '(python3: 3.8)', 'python3.11-venv'),
    'wrong PYTHON': (
        old_python,
        {'PYTHON': 'python3'},
        'PYTHON=python3 is Python 3.8; the openmmlab stack needs 3.9 to 3.12',
        'PYTHON=python3.11',
    ),
    'PYTHON that is none': (
        lambda machine: None,
        {'PYTHON': 'no-such-python'},
        'PYTHON=no-such-python is not a Python interpreter',
        '3.9 to 3.12',
    ),
    'no venv': (no_venv, {}, 'ensurepip is missing', 'install python3.11-venv'),
    'no compiler': (
        lambda machine: machine.lose('g++'),
        {},
        'no C++ compiler found',
        'apt-get install g++',
    ),
    'no headers': (no_headers, {}, 'headers of Python 3.11', 'install python3.11-dev'),
    'no space': (no_space, {}, '2 GB free', 'ENV=/path/to/folder'),
    'torch alone': (
        lambda machine: None,
        {'TORCH': '2.8.0'},
        'TORCHVISION is not',
        'Give both',
    ),
    'old torch': (
        lambda machine: None,
        {'TORCH': '2.3.1', 'TORCHVISION': '0.18.1'},
        'TORCH=2.3.1 is too old',
        '2.4 or later',
    ),
    'foreign folder': (folder_of_somebody, {}, 'was not made by make env', 'ENV='),
    'file in the way': (file_in_the_way, {}, 'was not made by make env', 'ENV='),
    'other stack': (other_stack, {}, 'holds the onedl stack', 'a folder of its own'),
}


@pytest.mark.parametrize('case', LACKS)
def test_lack_is_named_before_anything_is_installed(case, machine):
    change, variables, problem, fix = LACKS[case]
    change(machine)
    before = sorted(machine.env.rglob('*')) if machine.env.is_dir() else None
    result = machine.run(**variables)
    assert result.returncode == 1
    assert problem in result.stderr
    assert fix in result.stderr
    assert machine.installs == []
    after = sorted(machine.env.rglob('*')) if machine.env.is_dir() else None
    assert after == before


@pytest.mark.parametrize('stack', ['', 'torch', 'OpenMMLab'])
def test_unknown_stack(stack, machine):
    result = machine.run(stack=stack or 'none')
    assert result.returncode == 1
    assert 'unknown stack' in result.stderr
    assert 'STACK=openmmlab or STACK=onedl' in result.stderr


def test_onedl_wants_a_newer_python(machine):
    machine.say('version', '3.9')
    result = machine.run(stack='onedl')
    assert 'no Python 3.10 to 3.12 found (python3: 3.9)' in result.stderr
    assert machine.run(stack='openmmlab').returncode == 0


def test_an_unsupported_python3_is_passed_over(machine):
    old_python(machine)
    shutil.copy(machine.bin / 'python3', machine.bin / 'python3.12')
    text = (machine.bin / 'python3').read_text()
    machine.script('python3.12', text.replace('cat "$state/version"', 'echo 3.12'))
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert str(machine.bin / 'python3.12') in result.stdout


def test_prebuilt_mmcv_needs_no_compiler(machine):
    machine.lose('g++')
    result = machine.run(MMCV_FIND_LINKS='wheels.html')
    assert result.returncode == 0, result.stderr
    (mmcv,) = [call for call in machine.installs if 'mmcv==' in call]
    assert '--only-binary mmcv -f wheels.html' in mmcv


@pytest.mark.parametrize('stack', ['openmmlab', 'onedl'])
def test_torch_comes_before_mmcv_and_mmcv_before_the_rest(stack, machine):
    result = machine.run(stack)
    assert result.returncode == 0, result.stderr
    build, torch, mmcv, rest, package = machine.installs
    assert 'build.txt' in build
    assert 'torch.txt' in torch
    assert '--no-build-isolation --no-binary' in mmcv
    assert 'rest.txt' in rest
    assert '--no-deps --no-build-isolation -e' in package
    lines = (machine.env / 'torch.txt').read_text().split()
    assert lines[0].startswith('torch===')
    left = (machine.env / 'rest.txt').read_text()
    assert 'torch' not in left
    assert 'mmcv==' not in left


def test_second_call_does_nothing_and_a_change_installs_again(machine):
    assert machine.run().returncode == 0
    again = machine.run()
    assert (again.returncode, again.stdout, again.stderr) == (0, '', '')
    assert (machine.state / 'calls').read_text() == ''

    requirements = machine.repo / 'requirements' / 'dev.txt'
    requirements.write_text(requirements.read_text() + 'another-package\n')
    assert machine.run().returncode == 0
    assert len(machine.installs) == 5
    assert machine.run(TORCH='2.8.0', TORCHVISION='0.23.0').returncode == 0
    assert (machine.env / 'torch.txt').read_text().split()[0] == 'torch===2.8.0'


PIP_FAILURES = {
    'disk': (
        'torch.txt',
        'OSError: [Errno 28] No space left on device',
        'disk is full',
    ),
    'network': ('torch.txt', 'NewConnectionError(...)', 'could not be reached'),
    'index': (
        'torch.txt',
        'ERROR: No matching distribution found for torch===2.13.0',
        'not on the package index',
    ),
    'memory': (
        '--no-binary',
        'g++: fatal error: Killed signal terminated program cc1plus',
        'MAX_JOBS=1',
    ),
    'cuda': (
        '--no-binary',
        'OSError: CUDA_HOME environment variable is not set.',
        'MMCV_CUDA=0',
    ),
    'c++20': (
        '--no-binary',
        'error: #error C++20 or later compatible compiler is required',
        'torch before 2.14',
    ),
    'other': ('rest.txt', 'something new', 'mmrest-install.log'),
}


@pytest.mark.parametrize('case', PIP_FAILURES)
def test_failed_install_is_explained_and_not_taken_for_a_finished_one(case, machine):
    call, log, message = PIP_FAILURES[case]
    machine.say('fail', call)
    machine.say('log', log + '\n')
    result = machine.run()
    assert result.returncode == 1
    assert message in result.stderr
    assert not (machine.env / 'mmrest-installed').exists()

    (machine.state / 'fail').unlink()
    assert machine.run().returncode == 0
    assert (machine.env / 'mmrest-installed').exists()


def test_mmcv_of_another_torch_is_compiled_anew_once(machine):
    machine.say('no-ops', '')
    result = machine.run()
    assert result.returncode == 0, result.stderr
    mmcv = [call for call in machine.installs if 'mmcv==' in call]
    assert len(mmcv) == 2
    assert '--no-cache-dir --force-reinstall --no-deps' in mmcv[1]
    assert 'compiling it anew' in result.stdout


@pytest.mark.skipif(not shutil.which('flock'), reason='flock is Linux only')
def test_two_calls_at_a_time_install_once(machine):
    machine.say('slow', '')
    both = [machine.start(), machine.start()]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(machine.installs) == 5
    assert sum('waiting for it' in output for output in outputs) == 1


def test_unfit_environment_is_not_finished(machine):
    machine.say('unfit', '')
    result = machine.run()
    assert result.returncode == 1
    assert 'does not fit together' in result.stderr
    assert not (machine.env / 'mmrest-installed').exists()


def make(repo, *args, **variables):
    # These tests may run under a make with a STACK of its own, which it hands down.
    ours = ('MAKEFLAGS', 'MAKEOVERRIDES', 'MFLAGS', 'STACK', 'ARGS', 'WORKERS')
    env = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        ['make', '-n', *args],
        cwd=repo,
        env={**env, **variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_make_hands_on_what_it_is_given(repo):
    out = make(repo, 'env', 'STACK=onedl', 'ENV=/some where/else', 'PYTHON=python3.10')
    assert (
        "PYTHON='python3.10' bash tools/make_env.sh 'onedl' '/some where/else'" in out
    )
    test = make(repo, 'test', "ARGS=-k 'a b'", 'WORKERS=4')
    assert "-m pytest -n 4 --dist loadfile --no-loadscope-reorder -k 'a b'" in test
    assert "-m 'not slow'" in make(repo, 'test-fast')
    demo = make(repo, 'demo', 'DATA=/my data', 'WORK_DIR=/out', 'ARCH=restv2')
    expected = "run.py --work-dir '/out' --data '/my data' --arch 'restv2'"
    assert f'projects/demo/{expected}' in demo
    assert '--data' not in make(repo, 'demo')


def test_make_ignores_the_shells_own_ENV(repo):
    out = make(repo, 'test', ENV='/etc/shrc')
    assert '/etc/shrc' not in out
    assert "'.venv-openmmlab/bin/python' -m pytest" in out


# Stands in for make: `test` and `test-fast` end as pytest does.
FAKE_MAKE = """#!/usr/bin/env bash
echo "$*" >>calls
case "$*" in test*) echo '===== 3 passed, 1 skipped in 1.50s =====' ;; esac
[ "$*" != "$(cat fail)" ]
"""


@pytest.mark.parametrize(
    'fail',
    [
        '',
        'env',
        'lint',
        'test-fast STACK=onedl',
        # reported, not judged
        'test-fast ARGS=--cov --cov-report=term tests/test_checkpoint tests/test_hooks',
    ],
)
def test_ci_runs_every_part_and_fails_if_one_does(fail, repo, tmp_path):
    (tmp_path / '.ci').mkdir()
    shutil.copy(repo / '.ci' / 'run', tmp_path / '.ci' / 'run')
    for name, text in (('make', FAKE_MAKE), ('fail', fail)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [tmp_path / '.ci' / 'run'],
        env=dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}'),
        capture_output=True,
        text=True,
    )
    calls = (tmp_path / 'calls').read_text().splitlines()
    parts = ['env', 'test', 'lint', 'docs']
    onedl = ['env STACK=onedl', 'test-fast STACK=onedl']
    coverage = 'test-fast ARGS=--cov --cov-report=term '
    coverage += 'tests/test_checkpoint tests/test_hooks'
    assert calls == (['env'] if fail == 'env' else parts) + onedl + [coverage]
    assert done.returncode == (bool(fail) and fail != coverage)
    report = done.stdout[done.stdout.rindex('=== after') :]
    assert report.count('3 passed, 1 skipped') == (2 if fail == 'env' else 3)
    assert report.count('FAILED: make') == bool(fail)


def test_real_interpreter_passes_the_checks(machine):
    """The checks of Python, venv and headers hold for the one that runs this."""
    machine.script('python3', f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    no_space(machine)  # the last check, so that nothing is installed
    result = machine.run()
    assert '2 GB free' in result.stderr
