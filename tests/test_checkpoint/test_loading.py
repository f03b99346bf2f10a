"""All that has to fit is loaded, or nothing is."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.model import PretrainedInit
from torch import nn

from mmrest.checkpoint import CheckpointError, load_pretrained, pretrained_options
from mmrest.checkpoint.comparison import matches
from mmrest.checkpoint.loading import adapt_input_channels


class Net(nn.Module):
    """Stands for a backbone."""

    def __init__(self, width=4, depth=2, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.norm1 = nn.LayerNorm(width)


def published(width=4, depth=2, prefix=''):
    """A checkpoint of ``Net``: without norm1, with a head."""
    state = Net(width, depth).state_dict()
    state = {k: torch.rand(v.shape).to(v.dtype) for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith('norm1.')}
    return {prefix + k: v for k, v in {**state, 'head.weight': torch.ones(2)}.items()}


RULES = {'allow_missing': ('norm1',), 'allow_unexpected': ('head',)}


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_report(save):
    net = Net()
    before = snapshot(net)
    state = published()
    path = save({'model': state})
    report = load_pretrained(net, path, **RULES)
    assert report.source == path and report.wrapper == 'model' and report.prefix == ''
    assert report.missing_keys == ('norm1.weight', 'norm1.bias')
    assert report.unexpected_keys == ('head.weight',)
    assert report.other_parts == report.counters == () and report.cast == {}
    assert set(report.loaded) == set(state) - {'head.weight'}
    for name, value in net.state_dict().items():
        assert torch.equal(value, state.get(name, before[name])), name


def test_one_line_is_logged(save):
    lines = []
    logger = logging.Logger('test')
    handler = logging.Handler()
    handler.emit = lines.append
    logger.addHandler(handler)
    state = {**published(prefix='module.backbone.'), 'module.neck.w': torch.ones(1)}
    path = save({'state_dict': state})
    report = load_pretrained(Net(), path, **RULES, logger=logger)
    (line,) = lines
    assert line.levelno == logging.INFO
    assert line.getMessage() == str(report)
    for part in (
        f'Loaded 13 tensors from {path} (under state_dict, names without module.back',
        'Not in the file, initialised instead: 2 (norm1)',
        'In the file and not used: 1 (head)',
        'Of other parts of the model in the file: 1 (module)',
    ):
        assert part in line.getMessage()


def test_former_names(save):
    """Of the keywords, and of the report."""
    path = save(published())
    with pytest.warns(DeprecationWarning, match='allow_missing'):
        report = load_pretrained(
            Net(), path, may_be_new=['norm1'], may_be_unused=['head']
        )
    with pytest.warns(DeprecationWarning, match='missing_keys'):
        assert report.new == report.missing_keys
    with pytest.warns(DeprecationWarning, match='unexpected_keys'):
        assert report.unused == report.unexpected_keys


@pytest.mark.parametrize(
    'prefix',
    ['module.', 'backbone.', 'backbone.bottom_up.', 'module.backbone.bottom_up.'],
)
def test_backbone_of_a_detector(save, prefix):
    state = {**published(prefix=prefix), 'roi_heads.fc.weight': torch.ones(3)}
    if prefix != 'backbone.':
        state['backbone.fpn_lateral2.weight'] = torch.ones(3)
    net = Net()
    report = load_pretrained(net, save(state), **RULES)
    assert report.prefix == prefix
    assert 'roi_heads.fc.weight' in report.other_parts
    assert torch.equal(net.stem.weight, state[f'{prefix}stem.weight'])


def test_prefix_of_the_user(save):
    state = {**published(prefix='encoder.'), 'decoder.weight': torch.ones(1)}
    path = save(state)
    advice = "no tensor .* has a name that the model .*prefix='encoder.'"
    with pytest.raises(CheckpointError, match=advice):
        load_pretrained(Net(), path, **RULES)
    for prefix in ('encoder', 'encoder.'):
        assert load_pretrained(Net(), path, **RULES, prefix=prefix).prefix == 'encoder.'
    with pytest.raises(CheckpointError, match="'student.' was asked for"):
        load_pretrained(Net(), path, **RULES, prefix='student')


@pytest.mark.parametrize(
    'change, found',
    [
        (lambda s: s.pop('stem.weight'), r'Missing in the file \(1\): stem.weight \(4'),
        (lambda s: s.pop('bn.running_var'), 'Missing in the file .*bn.running_var'),
        (
            lambda s: s.update({'blocks.2.weight': torch.ones(4, 4)}),
            r'Not in the model \(1\): blocks.2.weight \(4, 4\)',
        ),
        (
            lambda s: s.update({'stem.weight': torch.ones(8, 3, 3, 3)}),
            r'stem.weight \(8, 3, 3, 3\) instead of \(4, 3, 3, 3\)',
        ),
        (lambda s: s.update({'norm.bias': torch.ones(4, 1)}), r'\(4, 1\) instead of'),
        (lambda s: s.update({'norm1.weight': torch.ones(4)}), 'Missing .*norm1.bias'),
        (lambda s: s['norm.weight'].fill_(float('nan')), 'NaN .*norm.weight'),
        (lambda s: s['bn.running_mean'].fill_(float('inf')), 'infinite .*running_mean'),
        (  # as float32
            lambda s: s.update(
                {'norm.bias': torch.full((4,), 1e300, dtype=torch.double)}
            ),
            'infinite .*norm.bias',
        ),
        (
            lambda s: s.update({'norm.bias': torch.ones(4, dtype=torch.int8)}),
            r'another kind \(1\): norm.bias \(integer for floating-point\)',
        ),
        (lambda s: s.update({'norm.bias': torch.ones(4).to_sparse()}), 'sparse'),
        (lambda s: s.update({'norm.bias': torch.ones(4).to(torch.cfloat)}), 'complex'),
        (lambda s: s.update({'norm.bias': 'text'}), 'norm.bias is a str'),
    ],
)
def test_all_or_nothing(save, change, found):
    state = published()
    change(state)
    path = save(state)
    net = Net()
    before = snapshot(net)
    with pytest.raises(CheckpointError, match=found) as error:
        load_pretrained(net, path, **RULES)
    assert path in str(error.value) and 'nothing was loaded' in str(error.value)
    assert unchanged(net, before)


def test_nothing_may_differ_unless_allowed(save):
    with pytest.raises(CheckpointError, match=r'(?s)norm1.weight.*head.weight'):
        load_pretrained(Net(), save(published()))


def test_first_differences_and_a_count(save):
    with pytest.raises(CheckpointError, match=r'and \d+ more.*`arch`') as error:
        load_pretrained(Net(width=4), save(published(width=6, depth=9)), **RULES)
    assert 'stem.weight (6, 3, 3, 3) instead of (4, 3, 3, 3)' in str(error.value)
    assert str(error.value).count('blocks.') < 17


def test_nothing_in_common(save, weights):
    with pytest.raises(CheckpointError, match=r'(?s)weight.*In the model.*stem.weight'):
        load_pretrained(Net(), save({'model': weights}), **RULES)


@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16, torch.double])
def test_other_precision(save, dtype):
    state = published()
    state.update({k: v.to(dtype) for k, v in state.items() if v.dtype == torch.float})
    net = Net()
    report = load_pretrained(net, save(state), **RULES)
    assert net.stem.weight.dtype == torch.float32
    assert torch.equal(net.stem.weight, state['stem.weight'].float())
    assert report.cast == {str(dtype): 12}
    assert f'Converted from {dtype}: 12' in str(report)


def test_counters_of_old_files(save):
    state = published()
    del state['bn.num_batches_tracked']
    report = load_pretrained(Net(), save(state), **RULES)
    assert report.counters == ('bn.num_batches_tracked',)
    assert 'num_batches_tracked' in str(report)


def test_parameters_and_shared_storage(save):
    """nn.Parameter values and views are plain tensors to us; grad flags stay."""
    state = {
        k: nn.Parameter(v, v.is_floating_point()) if v.dim() else v
        for k, v in published().items()
    }
    state['norm.weight'] = nn.Parameter(torch.arange(8.0))[::2]
    net = Net()
    net.stem.weight.requires_grad_(False)
    load_pretrained(net, save(state), **RULES)
    assert net.norm.weight.tolist() == [0, 2, 4, 6]
    assert not net.stem.weight.requires_grad and net.norm.weight.requires_grad


def test_matches():
    assert matches('norm1.weight', ['norm1'])
    assert matches('norm1.weight', ['norm1.'])
    assert matches('norm1.weight', ['norm1.*'])
    assert matches('norm1.weight', ['norm[123]'])
    assert not matches('norm1.weight', ['norm'])
    assert not matches('norm.weight', ['norm1', 'head', 'ight'])
    assert matches('a.b.c', ['a']) and not matches('x.a.b', ['a'])


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_change_of_names_is_found(save, data):
    """Rename, drop or add any tensors: an error, and nothing loaded."""
    state = published()
    name = data.draw(st.sampled_from([k for k in state if 'tracked' not in k]))
    change = data.draw(st.sampled_from(['drop', 'rename', 'add', 'reshape']))
    needed = not name.startswith('head')
    if change in ('drop', 'rename'):
        value = state.pop(name)
    if change == 'rename':
        state[f'{name}_'] = value
    if change == 'add':
        state[f'stem.{data.draw(st.text("abc", min_size=1))}'] = torch.ones(1)
    if change == 'reshape':
        state[name] = torch.cat([state[name], state[name]])
    net = Net()
    before = snapshot(net)
    if change == 'add' or needed:
        with pytest.raises(CheckpointError):
            load_pretrained(net, save(state), **RULES)
        assert unchanged(net, before)
    else:
        load_pretrained(net, save(state), **RULES)


@pytest.mark.parametrize('dtype', [torch.float, torch.half])
@pytest.mark.parametrize('channels', [1, 2, 4, 6, 7])
def test_other_input_channels(save, channels, dtype):
    """Grey, RGB and depth, ...: equal channels give what RGB gave."""
    state = {k: v.to(dtype) if v.dim() else v for k, v in published().items()}
    net = Net(channels=channels)
    before = snapshot(net)
    with pytest.raises(CheckpointError, match=r'instead of .*adapt_input=True'):
        load_pretrained(net, save(state), **RULES)
    assert unchanged(net, before)
    report = load_pretrained(net, save(state), **RULES, adapt_input=True)
    said = f'Adapted stem.weight from 3 to {channels} input channels'
    assert report.adapted == said and said in str(report)
    grey = torch.rand(2, 1, 8, 8)
    rgb = nn.Conv2d(3, 4, 3)
    load_pretrained(rgb, save(state), prefix='stem')
    expected = rgb(grey.expand(-1, 3, -1, -1))
    error = 1e-5 if dtype == torch.float else 1e-2
    # two channels are RGB's first two, rescaled: another sum
    if channels % 3 == 0 or channels == 1:
        found = net.stem(grey.expand(-1, channels, -1, -1))
        torch.testing.assert_close(found, expected, rtol=0, atol=error)
    weight = state['stem.weight'].float()
    wanted = {i: weight[:, i % 3] * 3 / channels for i in range(channels)}
    wanted = {0: weight.sum(1)} if channels == 1 else wanted
    for i, value in wanted.items():
        torch.testing.assert_close(
            net.stem.weight[:, i].detach(), value, rtol=0, atol=error
        )


def test_adapt_input_changes_no_other_weights(save):
    net = Net()
    state = published()
    report = load_pretrained(net, save(state), **RULES, adapt_input=True)
    assert report.adapted == '' and torch.equal(net.stem.weight, state['stem.weight'])
    state['stem.weight'] = torch.ones(4, 1, 5, 5)
    with pytest.raises(CheckpointError, match=r'\(4, 1, 5, 5\)') as error:
        load_pretrained(net, save(state), **RULES, adapt_input=True)
    assert 'adapt_input=True' not in str(error.value)


def test_adapted_weights_keep_their_kind():
    weight = torch.rand(4, 3, 3, 3, dtype=torch.double)
    assert adapt_input_channels(weight, 1).dtype == torch.double
    assert torch.equal(adapt_input_channels(weight, 3), weight)


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_options_of_init_cfg(kind):
    cfg = dict(type=kind, checkpoint='a.pth')
    expected = dict(source='a.pth', prefix=None, adapt_input=False)
    assert pretrained_options(cfg) == pretrained_options([cfg]) == expected
    more = dict(cfg, prefix='backbone', adapt_input=True, map_location='cpu')
    expected = dict(source='a.pth', prefix='backbone', adapt_input=True)
    assert pretrained_options(more) == expected


@pytest.mark.parametrize(
    'cfg', [None, {}, [], dict(type='Normal', std=0.1), [dict(type='Normal')] * 2]
)
def test_init_cfg_for_mmengine(cfg):
    assert pretrained_options(cfg) is None


@pytest.mark.parametrize(
    'cfg, found',
    [
        (123, 'found 123'),
        ('a.pth', "found 'a.pth'"),
        ([dict(type='Pretrained', checkpoint='a.pth'), 1], 'found 1'),
        (dict(checkpoint='a.pth'), 'dict with a type'),
        (dict(type='Pretrained'), 'needs checkpoint'),
        (dict(type='Pretrained', checkpoint='a', file='b'), 'found checkpoint, file'),
    ],
)
def test_init_cfg_of_another_kind(cfg, found):
    with pytest.raises(TypeError, match=found):
        pretrained_options(cfg)
