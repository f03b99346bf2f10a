"""The command-line tools refuse a payload in one sentence and do not run it."""

import pytest
from dirty_sandbox import Sandbox
from entries import weights_of
from payload_forms import FORMS
from tool_runs import call_tool
from toy_run import ToyModel

from mmrest.checkpoint.safe_globals import FORCE_UNSAFE, mmengine_globals_allowed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not mmengine_globals_allowed(),
        reason='before torch 2.6 only the functions of mmrest.checkpoint are safe',
    ),
]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'detector.py'
    Sandbox(tmp_path).config().dump(path)
    return path


@pytest.fixture
def evil(tmp_path, trace):
    """Write a hostile file of a form."""

    def write(form):
        path = tmp_path / 'evil.pth'
        FORMS[form](path, weights_of(ToyModel()), trace.command)
        return path

    return write


def resume_auto(evil, config, folder):
    work_dir = folder / 'run'
    work_dir.mkdir()
    evil.rename(work_dir / 'iter_3.pth')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_3.pth'))
    return ['train.py', config, '--work-dir', work_dir, '--resume']


def load_from(evil, config, folder):
    return ['train.py', config, '--cfg-options', f'load_from={evil}']


def init_cfg(evil, config, folder):
    init = dict(type='Pretrained', checkpoint=str(evil))
    with config.open('a') as file:
        file.write(f"\nmodel['backbone']['init_cfg'] = {init}\n")
    return ['train.py', config]


COMMANDS = {
    'load_from': ('zip', load_from),
    'init_cfg': ('in-state-dict', init_cfg),
    'resume-auto': ('legacy', resume_auto),
    'test': ('zip-by-hand', lambda e, c, _: ['test.py', c, e]),
    'publish': (
        'message_hub',
        lambda e, _, f: ['model_converters/publish_model.py', e, f / 'o.pth'],
    ),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_tools(name, evil, config, repo, tmp_path, trace, monkeypatch):
    """Also where the user's environment switches safety off."""
    monkeypatch.setenv(FORCE_UNSAFE, '1')
    form, command = COMMANDS[name]
    arguments = command(evil(form), config, tmp_path)
    output = call_tool(repo, *arguments, cwd=tmp_path, fails=True)
    assert not trace.left
    if name == 'resume-auto':  # a damaged newest file may be passed over
        assert 'iter_3.pth' in output
    else:
        assert 'It holds an object that safe loading refuses: ' in output
    assert 'Traceback' not in output
    assert 'weights_only=False' not in output  # torch's own advice
    assert not list(tmp_path.glob('o*.pth'))
