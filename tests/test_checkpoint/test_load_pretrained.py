"""All that has to fit is loaded, or nothing is."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from weights_rule import fill

from mmrest import ResT
from mmrest.checkpoint import CheckpointError, load_pretrained
from mmrest.checkpoint.loading import matches

V1 = ('lite', 'small', 'base', 'large')


class Net(nn.Module):
    """Stands for a backbone."""

    def __init__(self, width=4, depth=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
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
    path = save(
        {
            'state_dict': {
                **published(prefix='module.backbone.'),
                'module.neck.w': torch.ones(1),
            }
        }
    )
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


@pytest.mark.parametrize(
    'prefix',
    ['module.', 'backbone.', 'backbone.bottom_up.', 'module.backbone.bottom_up.'],
)
def test_backbone_of_a_detector(save, prefix):
    state = {**published(prefix=prefix), 'roi_heads.fc.weight': torch.ones(3)}
    state['backbone.fpn_lateral2.weight'] = torch.ones(3)
    if prefix == 'backbone.':
        del state['backbone.fpn_lateral2.weight']
    net = Net()
    report = load_pretrained(net, save(state), **RULES)
    assert report.prefix == prefix
    assert 'roi_heads.fc.weight' in report.other_parts
    assert torch.equal(net.stem.weight, state[f'{prefix}stem.weight'])


def test_prefix_of_the_user(save):
    state = {**published(prefix='encoder.'), 'decoder.weight': torch.ones(1)}
    path = save(state)
    with pytest.raises(CheckpointError, match='no tensor .* has a name that the model'):
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
        (
            lambda s: s.update({'norm.bias': torch.ones(4, dtype=torch.int8)}),
            r'another nature \(1\): norm.bias \(integer for floating-point\)',
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


def test_double_that_overflows(save):
    state = published()
    state['norm.bias'] = torch.full((4,), 1e300, dtype=torch.double)
    with pytest.raises(CheckpointError, match='norm.bias'):
        load_pretrained(Net(), save(state), **RULES)


def test_without_permission_nothing_may_differ(save):
    path = save(published())
    with pytest.raises(CheckpointError, match=r'(?s)norm1.weight.*head.weight'):
        load_pretrained(Net(), path)


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


@pytest.fixture(scope='module')
def published_file(published_shapes, tmp_path_factory):
    """Write a checkpoint of published form, and return path and tensors."""

    filled = {}

    def write(arch, wrapper='model', prefix='', **others):
        if arch not in filled:
            filled[arch] = fill(
                {
                    k: torch.zeros(s, dtype=torch.long if 'tracked' in k else None)
                    for k, s in published_shapes[arch].items()
                }
            )
        state = filled[arch]
        path = tmp_path_factory.mktemp('published') / f'{arch}.pth'
        content = {prefix + k: v for k, v in state.items()}
        content.update(others)
        torch.save({wrapper: content} if wrapper else content, path)
        return str(path), state

    return write


def build(arch, path, **kwargs):
    init_cfg = {'type': 'Pretrained', 'checkpoint': path}
    model = ResT(arch=arch, init_cfg=init_cfg, **kwargs)
    model.init_weights()
    return model


@pytest.mark.parametrize('arch', V1)
def test_rest_reads_published_checkpoints(published_file, arch):
    path, state = published_file(f'rest_{arch}')
    model = build(arch, path)
    new = [k for k in model.state_dict() if k not in state]
    assert sorted(new) == sorted(
        f'norm{i}.{k}' for i in (1, 2, 3) for k in ('weight', 'bias')
    )
    for name, value in model.state_dict().items():
        if name in state:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict', 'state_dict_ema'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'backbone.bottom_up.'])
def test_rest_in_every_form(published_file, wrapper, prefix):
    others = {'roi_heads.box.weight': torch.ones(2)} if 'backbone' in prefix else {}
    path, state = published_file('rest_lite', wrapper, prefix, **others)
    model = build('lite', path)
    assert torch.equal(model.stem.conv1.weight, state['stem.conv1.weight'])
    assert torch.equal(model.norm.bias, state['norm.bias'])


@pytest.mark.parametrize('out_indices', [(0,), (1, 2), (3,), (1, 2, 3), (0, 1, 2, 3)])
def test_rest_with_fewer_outputs(published_file, out_indices):
    path, state = published_file('rest_lite')
    model = build('lite', path, out_indices=out_indices)
    for name, value in model.state_dict().items():
        if name in state:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize('arch, other', [(a, b) for a in V1 for b in V1 if a != b])
def test_rest_refuses_another_arch(published_file, arch, other):
    path, _ = published_file(f'rest_{other}')
    with pytest.raises(CheckpointError, match='arch') as error:
        build(arch, path)
    # small and lite, base and large differ in the depth of stage 3 alone
    if {arch, other} in ({'lite', 'small'}, {'base', 'large'}):
        assert 'stage3.' in str(error.value)
    else:
        assert 'stem.conv1.weight' in str(error.value)


def test_rest_refuses_v2(published_file):
    path, _ = published_file('restv2_tiny')
    with pytest.raises(CheckpointError):
        build('base', path)


def test_rest_reads_its_own_detector(tmp_path):
    """From a trained detector: norm1..3 are there too, and are loaded."""
    source = ResT(arch='lite')
    nn.init.constant_(source.norm2.weight, 0.25)
    state = {f'backbone.{k}': v for k, v in source.state_dict().items()}
    state['neck.fpn_convs.0.conv.weight'] = torch.ones(1)
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'epoch_12.pth')
    model = build('lite', str(tmp_path / 'epoch_12.pth'))
    assert all(
        torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items()
    )
