"""A checkpoint with a pickled payload does not run it, wherever it is loaded."""

import itertools
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from entries import ENTRIES, FUNNELS, weights_of
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from payload_forms import FORMS, MAIN
from toy_run import ToyModel

from mmrest.checkpoint import CheckpointError, force_safe_loading
from mmrest.checkpoint.safe_globals import FORCE_UNSAFE, mmengine_globals_allowed

pytestmark = pytest.mark.skipif(
    not mmengine_globals_allowed(),
    reason='before torch 2.6 only the functions of mmrest.checkpoint are safe',
)
# what refuses a file; anything else would be an error of another kind
REFUSALS = (CheckpointError, pickle.UnpicklingError)
onedl = hasattr(mmengine_checkpoint, 'get_torch_safe_globals')
# each way in with another form, so that each form has its turn
SAMPLE = list(zip(ENTRIES, itertools.cycle(MAIN)))


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


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('funnel', FUNNELS)
@pytest.mark.usefixtures('safe_loading')
def test_files(funnel, form, tmp_path, content, trace):
    FORMS[form](tmp_path / 'evil.pth', content, trace.command)
    with pytest.raises(REFUSALS):
        FUNNELS[funnel](tmp_path / 'evil.pth', tmp_path)


@pytest.mark.parametrize('form', FORMS)
def test_files_after_the_import_alone(form, tmp_path, content, trace):
    """Ours is safe by itself, MMEngine's by PyTorch's default for files."""
    FORMS[form](tmp_path / 'evil.pth', content, trace.command)
    with pytest.raises(CheckpointError):
        FUNNELS['ours'](tmp_path / 'evil.pth', tmp_path)
    if not onedl:
        with pytest.raises((*REFUSALS, RuntimeError)):  # torch's word for tar files
            FUNNELS['mmengine'](tmp_path / 'evil.pth', tmp_path)


@pytest.mark.parametrize('form', FORMS)
def test_files_named_as_those_of_paddle(form, tmp_path, content, trace):
    FORMS[form](tmp_path / 'evil.pdparams', content, trace.command)
    with pytest.raises(CheckpointError):
        FUNNELS['ours'](tmp_path / 'evil.pdparams', tmp_path)


@pytest.mark.parametrize('form', MAIN)
@pytest.mark.parametrize('funnel', FUNNELS)
@pytest.mark.usefixtures('safe_loading')
def test_addresses(funnel, form, tmp_path, content, trace, server):
    url, root = server
    FORMS[form](root / 'evil.pth', content, trace.command)
    with pytest.raises(REFUSALS):
        FUNNELS[funnel](f'{url}/evil.pth', tmp_path)
    assert (tmp_path / 'hub' / 'checkpoints' / 'evil.pth').exists()  # it was fetched


def test_addresses_after_the_import_alone(tmp_path, content, server):
    """Ours is safe; MMEngine's is as MMEngine made it, until it is asked for."""
    url, root = server
    executed = tmp_path / 'executed'
    FORMS['zip'](root / 'evil.pth', content, f'touch {executed}')
    with pytest.raises(CheckpointError):
        FUNNELS['ours'](f'{url}/evil.pth', tmp_path)
    assert not executed.exists()
    FUNNELS['mmengine'](f'{url}/evil.pth', tmp_path)
    assert executed.exists(), 'mmengine has become safe: change docs/security.md'
    executed.unlink()
    # a program that calls mmengine's function by itself
    force_safe_loading()
    with pytest.raises(REFUSALS):
        mmengine_checkpoint.load_from_http(f'{url}/evil.pth')
    assert not executed.exists()


@pytest.mark.parametrize(
    ('name', 'table'),
    [
        ('torchvision://evil', 'get_torchvision_models'),
        ('mmcls://evil', 'get_mmcls_models'),
        ('open-mmlab://evil', 'get_external_models'),
    ],
)
@pytest.mark.usefixtures('safe_loading')
def test_names_of_zoos(name, table, content, trace, server, monkeypatch):
    url, root = server
    urls = {'evil': f'{url}/evil.pth', 'good': f'{url}/good.pth'}
    monkeypatch.setattr(mmengine_checkpoint, table, lambda: urls)
    FORMS['in-state-dict'](root / 'evil.pth', content, trace.command)
    with pytest.raises(REFUSALS):
        CheckpointLoader.load_checkpoint(name, map_location='cpu')
    torch.save(content, root / 'good.pth')
    good = CheckpointLoader.load_checkpoint(name.replace('evil', 'good'))
    assert 'state_dict' in good  # of which mmcls:// takes a part


@pytest.mark.parametrize(('entry', 'form'), SAMPLE)
@pytest.mark.usefixtures('safe_loading')
def test_ways_in(entry, form, tmp_path, content, trace):
    """They read through the funnels, and as far as that when a file is sound."""
    load, sound = ENTRIES[entry]
    FORMS[form](tmp_path / 'evil.pth', content, trace.command)
    with pytest.raises(REFUSALS):
        load(tmp_path / 'evil.pth', tmp_path)
    if sound is not None:
        torch.save(sound(), tmp_path / 'sound.pth')
        load(tmp_path / 'sound.pth', tmp_path)


@pytest.mark.parametrize('unsafe', [False, True])
@pytest.mark.parametrize('form', MAIN)
def test_programs(form, unsafe, tmp_path, content, trace, monkeypatch):
    """After force_safe_loading, which the tools call, nothing can be asked for."""
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
        ENTRIES['DetInferencer-alone'][0](path, tmp_path)
    assert marker.exists(), 'mmengine has become safe: change docs/security.md'
    marker.unlink()
    # with a config of one's own, that in the file is text
    ENTRIES['DetInferencer'][0](path, tmp_path)
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
