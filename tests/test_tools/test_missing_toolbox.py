"""A config whose toolbox is not installed: which extra to install."""

import pytest
from mmengine.config import Config

from mmrest import launch


@pytest.mark.parametrize('toolbox, extra', list(launch.EXTRAS.items()))
def test_the_extra_is_named(monkeypatch, repo, toolbox, extra):
    cfg = Config(dict(default_scope=toolbox))
    launch.check_toolbox(cfg, 'my_config.py')
    find_spec = launch.find_spec
    monkeypatch.setattr(
        launch, 'find_spec', lambda name: None if name == toolbox else find_spec(name)
    )
    with pytest.raises(launch.LaunchError) as error:
        launch.check_toolbox(cfg, 'my_config.py')
    message = str(error.value)
    assert f'my_config.py needs {toolbox}' in message
    assert f"pip install 'mmrest[{extra}]'" in message
    assert f"'{extra}':" in (repo / 'setup.py').read_text()


def test_configs_without_a_toolbox_pass():
    launch.check_toolbox(Config(dict()), 'my_config.py')
