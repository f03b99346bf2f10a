"""What MMEngine does with a checkpoint, and the checks before it."""

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule, BaseTTAModel, MMDistributedDataParallel
from mmengine.runner import load_checkpoint
from small_models import TINY
from torch import nn
from toy_run import ToyModel

from mmrest import ResT
from mmrest.checkpoint import CheckpointError, check_load_from


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


class Model(BaseModule):
    """As a detector or segmentor has its backbone, and a head."""

    def __init__(self, checkpoint=None, own=None, depths=(1, 1, 2, 1), **options):
        init_cfg = dict(type='Pretrained', checkpoint=checkpoint, **options)
        super().__init__(init_cfg if checkpoint else None)
        own = dict(type='Pretrained', checkpoint=own) if own else None
        self.backbone = ResT(arch={**TINY, 'depths': depths}, init_cfg=own)
        self.head = nn.Linear(32, 2)


def state_of(part, prefix=''):
    return {prefix + k: v for k, v in part.state_dict().items()}


@pytest.mark.parametrize('wrapper', ['', 'model', 'state_dict'])
@pytest.mark.parametrize('own', [False, True], ids=['drawn', 'with-own-init_cfg'])
def test_backbone_named_at_the_model(save, wrapper, own):
    """MMEngine would only warn, and train whatever the backbone has."""
    state = ResT(arch=TINY, out_indices=(3,)).state_dict()
    path = save({wrapper: state} if wrapper else state)
    model = Model(path, own=path if own else None)
    with pytest.raises(CheckpointError, match=r'no tensor .*model\.backbone\.init_cfg'):
        model.init_weights()


@pytest.mark.parametrize(
    'change, found',
    [
        (dict(depths=(1, 1, 1, 1)), 'Not in the model .*stage3.1'),
        (dict(depths=(1, 1, 3, 1)), 'Missing in the file .*stage3.2'),
        (lambda s: s.pop('backbone.stem.conv1.weight'), 'Missing .*stem.conv1'),
        (
            lambda s: s['backbone.norm.bias'].fill_(float('nan')),
            'NaN or infinite .*norm.bias',
        ),
    ],
)
def test_model_that_does_not_fit(save, change, found):
    state = state_of(Model())
    if callable(change):
        change(state)
    options = {} if callable(change) else change
    with pytest.raises(CheckpointError, match=f'does not fit its ResT.*{found}'):
        Model(save({'state_dict': state}), **options).init_weights()


def test_model_that_fits(save):
    """Its own checkpoint, one of another head, and a part of a larger model."""
    source = Model()
    state = state_of(source)
    for content in (
        {'state_dict': state},
        {'state_dict': {k: v for k, v in state.items() if 'head' not in k}},
        # of a classifier, without the norms of stages 1 to 3
        {k: v for k, v in state.items() if not k.startswith('backbone.norm1')},
    ):
        model = Model(save(content))
        model.init_weights()
        assert torch.equal(
            model.backbone.stem.conv1.weight, source.backbone.stem.conv1.weight
        )
    path = save({'state_dict': state_of(source, 'student.')})
    model = Model(path, prefix='student.')
    model.init_weights()
    assert torch.equal(model.head.weight, source.head.weight)


def test_a_part_may_be_loaded_later(save, warnings_of_mmengine):
    """As adapters and heads are: nothing is random then."""
    model = Model()
    model.init_weights()
    before = model.backbone.stem.conv1.weight.clone()
    model.load_state_dict(state_of(nn.Linear(32, 2), 'head.'), strict=False)
    load_checkpoint(model, save(state_of(nn.Linear(32, 2), 'head.')))
    assert torch.equal(model.backbone.stem.conv1.weight, before)
