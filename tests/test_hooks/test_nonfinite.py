"""A NaN or infinite loss ends the run with its reason; checkpoints stay good."""

import functools
import math

import pytest
import torch
from kill_checks import same
from mmengine.registry import OPTIMIZERS
from torch import nn
from toy_runs import (
    Calls,
    Images,
    QuietFlexibleRunner,
    Toy,
    exit_codes,
    in_process,
    kill_self,
    train,
    train_in_two,
)

from mmrest.checkpoint import read_checkpoint
from mmrest.hooks import CheckNonFiniteHook, NonFiniteError
from mmrest.hooks.nonfinite import find_source

HOOK = dict(type='CheckNonFiniteHook')


class Breaks(nn.Module):
    """Gives ``value`` from a call in training on."""

    def __init__(self, value, call=3):
        super().__init__()
        self.value, self.call, self.calls = value, call, 0

    def forward(self, x):
        self.calls += self.training and torch.is_grad_enabled()
        return x * self.value if self.calls >= self.call else x


class Gains(nn.Module):
    """Overflows between its parts."""

    def __init__(self):
        super().__init__()
        self.part = nn.Identity()

    def forward(self, x):
        return self.part(x * 3e38 * 3e38)


def fails(folder, model=None, data=None, hooks=(), **kwargs):
    """The error of a run whose images come in order."""
    checkpoint = kwargs.pop('checkpoint', dict(max_keep_ckpts=-1))
    with pytest.raises(NonFiniteError) as info:
        train(
            folder,
            model,
            data=data or Images(),
            hooks=[HOOK, *hooks],
            checkpoint=checkpoint,
            **kwargs,
        )
    return str(info.value)


def checkpoints(folder):
    for path in folder.glob('*.pth'):
        state = read_checkpoint(path)['state_dict']
        assert all(torch.isfinite(value).all() for value in state.values())
    return {path.name for path in folder.glob('*.pth')}


@pytest.mark.parametrize('kind', ['AtomicCheckpointHook', 'CheckpointHook'])
@pytest.mark.parametrize(
    ('value', 'call'), [(math.nan, 3), (math.inf, 3), (-math.inf, 4)]
)
def test_first_module_is_named(tmp_path, value, call, kind):
    """Also if a checkpoint or a validation is due after that very iteration."""
    model = Toy()
    model.body[1] = Breaks(value, call)
    checkpoint = dict(type=kind, max_keep_ckpts=-1)
    text = fails(tmp_path, model, validate=True, checkpoint=checkpoint)
    names = {3: '104 images/4.jpg, 105 images/5.jpg', 4: '106 images/6.jpg, '}[call]
    assert text.startswith(f'iteration {call}: a loss is NaN or infinite.')
    assert '100 images/0.jpg' not in text
    assert f'process 0, images {names}' in text
    assert ': loss=nan, ' in text or ': loss=inf, ' in text or ': loss=nan;' in text
    assert 'first in body.1 (Breaks), from inputs that are finite' in text
    assert f'(with the weights of {tmp_path / "iter_2.pth"})' in text
    assert f'{tmp_path / "iter_2.pth"}, is from before' in text
    assert checkpoints(tmp_path) == {'iter_2.pth'}
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_2.pth')
    assert text in next(tmp_path.glob('*/*.log')).read_text()


def test_operations_of_a_module_are_told_from_its_parts():
    model = Toy()
    model.body[1] = Gains()
    batch = dict(
        inputs=torch.rand(2, 3, 16, 16), data_samples=[Images()[0]['data_samples']] * 2
    )
    text = find_source(model, batch, [torch.get_rng_state()], {})
    assert text.startswith('first in body.1 (Gains), by its own operations: it hands')
    assert 'body.1.part 0 NaN and 32 infinite values of 32' in text


@pytest.mark.parametrize('iters', [2, 6])
def test_bad_images_are_named(tmp_path, iters):
    """In the last iteration too."""
    text = fails(tmp_path, data=Images(bad=[3]), iters=iters)
    assert 'iteration 2: ' in text
    assert 'images 102 images/2.jpg, 103 images/3.jpg' in text
    assert 'already in the preprocessed inputs: 1 NaN and 0 infinite' in text
    assert 'the step made with this loss has broken the parameters' in text
    assert 'There is no checkpoint yet.' in text


def test_module_is_found_where_the_step_was_skipped(tmp_path):
    """As by dynamic loss scaling: the parameters are those of the iteration."""

    @OPTIMIZERS.register_module(force=True)
    class Skips(torch.optim.SGD):
        def step(self, closure=None):
            return None

    model = Toy()
    model.body[1] = Breaks(math.nan, call=1)
    text = fails(tmp_path, model, optimizer=dict(type='Skips', lr=0.1))
    assert 'first in body.1 (Breaks)' in text and 'weights of' not in text


def test_parameters_that_were_bad_are_named(tmp_path):
    model = Toy()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    text = fails(tmp_path, model)
    assert 'NaN or infinite before the first iteration: head.weight' in text


def test_step_that_breaks_parameters_is_not_saved(tmp_path):
    """A finite loss with an infinite gradient."""
    model = Toy()
    calls = iter([1, torch.inf] + [1] * 9)
    model.head.bias.register_hook(lambda grad: grad * next(calls))
    text = fails(tmp_path, model, hooks=[dict(type='EMAHook')])
    assert text.startswith('iteration 2: the step made parameters NaN or infinite')
    assert 'head.bias' in text and '103 images/3.jpg' in text
    assert not checkpoints(tmp_path)


def test_preemption_saves_nothing_broken(tmp_path):
    hooks = [
        dict(type='PreemptionHook'),
        Calls(functools.partial(kill_self, 'SIGTERM'), train=3),
    ]
    text = fails(tmp_path, data=Images(bad=[5]), hooks=hooks)
    assert text.startswith('iteration 3: ') and checkpoints(tmp_path) == {'iter_2.pth'}


def test_values_that_only_look_bad(tmp_path):
    """A metric that is NaN is no loss, and large parameters are finite."""
    model = Toy()
    model.large = nn.Parameter(torch.full((9,), 3e38))
    model.more = nn.Parameter(torch.full((9,), -3e38))
    model.small = nn.Parameter(torch.full((9,), 6e4, dtype=torch.float16))
    model.empty = nn.Parameter(torch.zeros(0))
    model.register_buffer('count', torch.tensor(math.nan))
    train(tmp_path, model, hooks=[HOOK])


@pytest.mark.parametrize('runner_type', [None, QuietFlexibleRunner])
def test_good_run_is_the_same_with_the_hook(tmp_path, runner_type):
    options = {}
    if runner_type:
        strategy = dict(type='SingleDeviceStrategy')
        options = dict(runner_type=runner_type, strategy=strategy)
    for name, hooks in (('with', [HOOK]), ('without', [])):
        model = train(tmp_path / name, hooks=hooks, **options).model
        assert not model._forward_hooks and not model._forward_pre_hooks
    one, other = (
        read_checkpoint(tmp_path / n / 'iter_6.pth') for n in ('with', 'without')
    )
    for key in ('state_dict', 'optimizer', 'resume_state'):
        assert same(one[key], other[key]), key


def test_one_read_an_iteration(tmp_path, monkeypatch):
    """Of the flag of the iteration before."""
    hook, reads, inside = CheckNonFiniteHook(), [], []

    def count(name):
        original = getattr(torch.Tensor, name)

        def counted(self, *args):
            if inside:
                reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)

    for name in ('item', 'tolist', '__bool__', '__float__', '__int__', 'cpu', 'numpy'):
        count(name)

    def count_in(method):
        original = getattr(hook, method)

        def counted(*args, **kwargs):
            inside.append(True)
            original(*args, **kwargs)
            inside.clear()

        monkeypatch.setattr(hook, method, counted)

    for method in ('before_train', 'before_train_iter', 'after_train_iter'):
        count_in(method)
    train(tmp_path, hooks=[hook], checkpoint=dict(interval=100))
    # the parameters of the start, then the flag of the iteration before
    assert reads == ['__bool__'] + ['tolist'] * 5


@pytest.mark.slow
def test_compiled_step_is_the_same_with_the_hook(tmp_path):
    """As many graphs, graph breaks and recompilations with ``compile=``."""

    # in a process of its own: what compiles cannot fork afterwards
    def check():
        counts = []
        for name, hooks in (('with', [HOOK]), ('without', [])):
            torch._dynamo.reset()
            found = torch._dynamo.utils.counters
            found.clear()
            cfg = dict(compile=dict(backend='eager'))
            train(tmp_path / name, hooks=hooks, cfg=cfg, iters=4)
            breaks = sum(found['graph_break'].values())
            counts.append((breaks, dict(found['frames']), dict(found['stats'])))
        assert counts[0] == counts[1] and counts[0][1]['ok'] > 0

    assert in_process(check) == 0


def test_search_repeats_the_random_draws():
    model, seen = Toy(drop=0.5), []

    class Sees(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    model.body.append(Sees())
    samples = [Images()[index]['data_samples'] for index in range(2)]
    batch = dict(inputs=torch.rand(2, 3, 16, 16), data_samples=samples)
    states = [torch.get_rng_state()]
    model(**batch, mode='loss')
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.body[0].weight.fill_(torch.nan)
    text = find_source(model, batch, states, weights)
    assert 'no module gave such a value when the batch was run again' in text
    assert len(seen) == 2 and torch.equal(*seen)
    assert model.body[0].weight.isnan().all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_one_process_ends_all(tmp_path):
    """Both say the same, with the batch of each, and nothing bad is saved."""

    run = tmp_path / 'run'
    # one image each: the fifth image is process 0's third
    options = dict(data=Images(bad=[4]), batch_size=1, iters=4)
    assert exit_codes(train_in_two(run, lambda rank: [HOOK], **options)) == [1, 1]
    assert checkpoints(run) == {'iter_2.pth'}
    log = next(run.glob('*/*.log')).read_text()
    assert 'iteration 3: a loss is NaN' in log
    assert 'process 0, images 104 images/4.jpg: loss=nan' in log
    assert 'process 1, images 105 images/5.jpg: its losses are finite' in log
