"""A checkpoint with a pickled payload does not run it, wherever it is loaded."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from entries import BY_ADDRESS, ENTRIES, SOUND, weights_of
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from payload_forms import FORMS, MAIN
from toy_run import ToyModel

from mmrest.checkpoint import CheckpointError, force_safe_loading
from mmrest.checkpoint.safe_globals import (
    FORCE_SAFE,
    FORCE_UNSAFE,
    mmengine_globals_allowed,
)

pytestmark = pytest.mark.skipif(
    not mmengine_globals_allowed(),
    reason='before torch 2.6 only the functions of mmrest.checkpoint are safe',
)
# what refuses a file; anything else would be an error of another kind
REFUSALS = (CheckpointError, pickle.UnpicklingError)


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    for name in (FORCE_SAFE, FORCE_UNSAFE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope='module')
def content():
    return weights_of(ToyModel())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form', FORMS)
def test_the_payloads_are_live(form, tmp_path, content):
    """Without safety each of them is run; else these tests would show nothing."""
    trace, path = tmp_path / 'executed', tmp_path / 'evil.pth'
    FORMS[form](path, content, f'touch {trace}')
    try:
        torch.load(path, weights_only=False)
    except Exception as error:  # the rest of the file is nonsense
        print(error)
    if form == 'bare-pickle' or form.startswith('pickle-'):
        trace.unlink(missing_ok=True)  # torch may want its magic number first
        pickle.loads(path.read_bytes())
    assert trace.exists()


@pytest.mark.parametrize('entry', SOUND)
def test_the_entries_load_sound_files(entry, tmp_path):
    """They come as far as reading the file, and to their end."""
    path = tmp_path / 'sound.pth'
    torch.save(SOUND[entry](), path)
    ENTRIES[entry](path, tmp_path)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('entry', ENTRIES)
def test_files(entry, form, tmp_path, content, trace):
    path = tmp_path / 'evil.pth'
    FORMS[form](path, content, trace.command)
    refusals = REFUSALS
    if form.startswith('tar-'):
        refusals = (CheckpointError, RuntimeError)  # torch's word for that format
    with pytest.raises(refusals):
        ENTRIES[entry](path, tmp_path)


@pytest.mark.parametrize('form', MAIN)
@pytest.mark.parametrize('entry', BY_ADDRESS)
def test_addresses(entry, form, tmp_path, content, trace, server):
    url, root = server
    FORMS[form](root / 'evil.pth', content, trace.command)
    with pytest.raises(REFUSALS):
        ENTRIES[entry](f'{url}/evil.pth', tmp_path)
    assert (tmp_path / 'hub' / 'checkpoints' / 'evil.pth').exists()  # it was fetched


@pytest.mark.parametrize('form', MAIN)
@pytest.mark.parametrize(
    ('name', 'table'),
    [
        ('torchvision://evil', 'get_torchvision_models'),
        ('modelzoo://evil', 'get_torchvision_models'),
        ('mmcls://evil', 'get_mmcls_models'),
        ('open-mmlab://evil', 'get_external_models'),
        ('openmmlab://evil', 'get_external_models'),
    ],
)
def test_names_of_zoos(name, table, form, content, trace, server, monkeypatch):
    url, root = server
    urls = {'evil': f'{url}/evil.pth', 'good': f'{url}/good.pth'}
    monkeypatch.setattr(mmengine_checkpoint, table, lambda: urls)
    FORMS[form](root / 'evil.pth', content, trace.command)
    with pytest.raises(REFUSALS):
        CheckpointLoader.load_checkpoint(name, map_location='cpu')
    torch.save(content, root / 'good.pth')
    good = CheckpointLoader.load_checkpoint(name.replace('evil', 'good'))
    assert 'state_dict' in good  # of which mmcls:// takes a part


@pytest.mark.parametrize('unsafe', [False, True])
@pytest.mark.parametrize('form', MAIN)
def test_programs(form, unsafe, tmp_path, content, trace, monkeypatch):
    """After force_safe_loading, which the tools call, nothing can be asked for."""
    monkeypatch.setenv(FORCE_SAFE, '')  # so that it is undone
    if unsafe:
        monkeypatch.setenv(FORCE_UNSAFE, '1')
        with pytest.warns(UserWarning, match='is ignored'):
            force_safe_loading()
    else:
        force_safe_loading()
    path = tmp_path / 'evil.pth'
    FORMS[form](path, content, trace.command)
    for options in ({}, {'weights_only': False}):
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, **options)


def test_config_in_a_checkpoint_is_code(tmp_path, trace):
    """As the documentation says: a config is a program, and this one is run.

    mmengine's inferencers take it from the checkpoint if they are given no other.
    """
    marker = tmp_path / 'config was run'
    text = f'open({str(marker)!r}, "w").close()\nmodel = dict(type="Nothing")\n'
    path = tmp_path / 'config.pth'
    hub = dict(runtime_info=dict(cfg=text))
    torch.save(dict(state_dict={}, meta={}, message_hub=hub), path)
    with pytest.raises(Exception, match='Nothing|test_dataloader|test_pipeline'):
        ENTRIES['DetInferencer-alone'](path, tmp_path)
    assert marker.exists(), 'mmengine has become safe: change docs/security.md'
    marker.unlink()
    # with a config of one's own, that in the file is text
    ENTRIES['DetInferencer'](path, tmp_path)
    assert not marker.exists()


def test_annotation_files_are_no_pickles(tmp_path, trace):
    """The data sets of the configs are read as JSON, whatever their name."""
    from mmrest.datasets.preflight.coco import check_annotations

    path = tmp_path / 'train.pkl'
    FORMS['pickle-4'](path, {}, trace.command)
    dataset = SimpleNamespace(where='train', ann_file=str(path), data_root='')
    _, found = check_annotations(dataset)
    assert 'not valid JSON' in found[0]
    assert json  # the module that reads it
