"""What mmengine does with a checkpoint, and the check before it."""

import functools
import http.server
import pickle
import threading

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseTTAModel, MMDistributedDataParallel
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import load_from_http as mmengine_loader
from torch import nn
from toy_run import ToyModel, build

from mmrest.checkpoint import (
    CheckpointError,
    allow_mmengine_checkpoints,
    check_load_from,
    force_safe_loading,
    safe_globals,
)
from mmrest.checkpoint.safe_globals import FORCE_SAFE

# of mmengine's loader, and of the one that mmrest gives to onedl-mmengine
REFUSALS = (pickle.UnpicklingError, CheckpointError)


class Detector(nn.Module):
    """A backbone with an output norm, and a head for some classes."""

    def __init__(self, classes=80, depth=2):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stage = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.backbone.bn = nn.BatchNorm2d(4)
        self.backbone.norm1 = nn.LayerNorm(4)
        self.head = nn.Linear(4, classes)


@pytest.fixture
def warnings_of_mmengine(monkeypatch):
    """Collect what is logged through mmengine."""
    lines = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(
        logger, 'handle', lambda record: lines.append(record.getMessage())
    )
    return lines


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('wrapped', [True, False])
def test_the_same_model(save, prefix, wrapped):
    model = Detector()
    state = {prefix + k: v for k, v in model.state_dict().items()}
    path = save({'state_dict': state, 'meta': {}} if wrapped else state)
    check_load_from(model, path)
    check_load_from(model, path, exact=False)


def test_under_model(save, warnings_of_mmengine):
    """mmengine loads nothing of it and only warns; the check is loud."""
    model = Detector()
    path = save({'model': model.state_dict()})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    nn.init.zeros_(model.head.weight)
    load_checkpoint(model, path)
    assert not torch.equal(model.head.weight, before['head.weight'])
    for exact in (True, False):
        with pytest.raises(CheckpointError, match="under 'model'.*init_cfg"):
            check_load_from(model, path, exact=exact)


def test_backbone_alone(save):
    """A bare backbone is for init_cfg."""
    state = Detector().backbone.state_dict()
    for exact in (True, False):
        with pytest.raises(CheckpointError, match='no name and shape is the same'):
            check_load_from(Detector(), save({'state_dict': state}), exact=exact)


def test_other_classes(save, warnings_of_mmengine):
    path = save({'state_dict': Detector(classes=80).state_dict()})
    with pytest.raises(CheckpointError, match=r'head.weight \(80, 4\) instead of \(3'):
        check_load_from(Detector(classes=3), path)
    check_load_from(Detector(classes=3), path, exact=False)
    assert any('fits in part: 11 tensors of 13' in x for x in warnings_of_mmengine)


@pytest.mark.parametrize('file_depth, depth', [(3, 2), (2, 3)])
@pytest.mark.parametrize('exact', [True, False])
def test_other_depth(save, file_depth, depth, exact):
    """A larger arch has all names of the smaller; it must not pass."""
    path = save({'state_dict': Detector(depth=file_depth).state_dict()})
    with pytest.raises(CheckpointError, match=r'backbone.stage.2.weight'):
        check_load_from(Detector(depth=depth), path, exact=exact)


def test_backbone_of_a_classifier(save):
    state = Detector().state_dict()
    state = {k: v for k, v in state.items() if 'norm1' not in k and 'head' not in k}
    path = save({'state_dict': {**state, 'cls_head.fc.weight': torch.ones(1)}})
    check_load_from(Detector(), path, exact=False)
    with pytest.raises(CheckpointError, match='Missing in the file .*norm1'):
        check_load_from(Detector(), path)


def test_nan(save):
    state = Detector().state_dict()
    state['head.bias'] = state['head.bias'] / 0
    for exact in (True, False):
        with pytest.raises(CheckpointError, match='NaN .*head.bias'):
            check_load_from(Detector(), save({'state_dict': state}), exact=exact)


@pytest.mark.parametrize('content', [[1], {'state_dict': 3}, {'state_dict': {}}])
def test_no_state_dict(save, content):
    with pytest.raises(CheckpointError):
        check_load_from(Detector(), save(content))


def test_wrapped_models(save):
    """DistributedDataParallel and test-time augmentation are looked through."""
    model = ToyModel()
    path = save({'state_dict': model.state_dict()})

    class TTA(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            """Not needed here."""

    check_load_from(TTA(module=model), path)
    wrapper = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    check_load_from(wrapper, path)


def test_before_torch_2_6(save, monkeypatch, warnings_of_mmengine, payload):
    """There mmengine's own checkpoints cannot be read safely: say so, go on."""
    from mmengine.logging import HistoryBuffer

    monkeypatch.setattr(torch, '__version__', '2.1.2')
    present = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        hub = {'loss': HistoryBuffer([1.0], [1])}
        check_load_from(Detector(), save({'message_hub': hub, 'state_dict': {}}))
        assert any('Not checked' in line for line in warnings_of_mmengine)
        with pytest.raises(CheckpointError, match='refuses'):
            check_load_from(Detector(), save({'state_dict': payload}))
    finally:
        torch.serialization.add_safe_globals(present)


@pytest.fixture
def evil(payload, tmp_path):
    """A checkpoint of the toy model with a payload in it."""
    path = tmp_path / 'evil.pth'
    content = {'state_dict': ToyModel().state_dict(), 'meta': {}, 'extra': payload}
    torch.save(content, path)
    return path


@pytest.mark.parametrize('resume', [False, True])
def test_load_from_and_resume_refuse_payloads(evil, tmp_path, resume, monkeypatch):
    """mmengine's own path to a local file is safe, and ours does not open it."""
    allow_mmengine_checkpoints()
    # onedl-mmengine loads without safety what safe loading refused
    monkeypatch.setenv(FORCE_SAFE, '')
    force_safe_loading()
    runner = build(tmp_path / 'run', load_from=str(evil), resume=resume)
    with pytest.raises(REFUSALS):
        runner.train()
    with pytest.raises(CheckpointError, match='refuses'):
        check_load_from(runner.model, evil)


@pytest.mark.skipif(
    hasattr(safe_globals.mmengine_checkpoint, 'get_torch_safe_globals'),
    reason='onedl-mmengine falls back to unsafe loading',
)
def test_mmengine_itself_is_safe_for_files(evil, tmp_path):
    runner = build(tmp_path / 'run', load_from=str(evil))
    with pytest.raises(pickle.UnpicklingError):
        runner.train()


def test_init_cfg_of_mmengine_refuses_payloads(evil, monkeypatch):
    monkeypatch.setenv(FORCE_SAFE, '')
    force_safe_loading()
    model = ToyModel()
    model.init_cfg = {'type': 'Pretrained', 'checkpoint': str(evil)}
    with pytest.raises(REFUSALS):
        model.init_weights()


def test_load_from_a_url(evil, payload, tmp_path, monkeypatch):
    """mmengine reads URLs without safety; importing mmrest closes that door."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.delenv('http_proxy', raising=False)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Keep quiet."""

    handler = functools.partial(Handler, directory=str(evil.parent))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/evil.pth'
        mmengine_loader(url)  # the reason for all this
        assert payload.marker.exists(), 'mmengine has become safe: simplify'
        payload.marker.unlink()
        with pytest.raises(CheckpointError, match='refuses'):
            check_load_from(ToyModel(), url)
        with pytest.raises(CheckpointError, match='refuses'):
            load_checkpoint(ToyModel(), url)
        # a program that calls mmengine's function by itself
        monkeypatch.setenv(FORCE_SAFE, '')
        force_safe_loading()
        with pytest.raises(pickle.UnpicklingError):
            mmengine_loader(url)
        server.shutdown()
