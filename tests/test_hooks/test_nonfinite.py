"""A NaN or infinite loss ends the run with its reason; checkpoints stay good."""

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rest_runs import Images, Regressor, build
from torch import nn


from mmrest.hooks.nonfinite import find_source

HOOK = [dict(type='CheckNonFiniteHook')]


class Breaks(nn.Module):
    """Gives ``value`` from its third call on."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, x):
        self.calls += self.training and torch.is_grad_enabled()
        return x * self.value if self.calls >= 3 else x


def fails(runner):
    with pytest.raises(NonFiniteError) as info:
        runner.train()
    return str(info.value)


def finite(path):
    saved = torch.load(path, weights_only=False)['state_dict']
    return all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_first_module_is_named(tmp_path, value):
    model = Regressor()
    block = model.backbone.stage3[0]
    block.attn.proj_drop = Breaks(value)
    runner = build(tmp_path, model, iters=6, custom_hooks=HOOK)
    text = fails(runner)
    assert text.startswith('iteration 3: a loss is NaN or infinite.')
    assert '100 images/0.jpg' not in text
    assert 'process 0, images 104 images/4.jpg, 105 images/5.jpg: loss=nan' in text
    assert 'first in backbone.stage3.0.attn.proj_drop (Breaks), from inputs' in text
    assert f'{tmp_path / "iter_2.pth"}, is from before' in text
    # neither a step nor a file with it
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {p.name for p in tmp_path.glob('*.pth')} == {'iter_2.pth'}
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_2.pth')
    assert finite(tmp_path / 'iter_2.pth')
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert text in log


def test_operations_of_a_module_are_told_from_its_parts(tmp_path):
    """An infinite sum inside a block reaches the block's norm2."""
    model = Regressor()
    model.backbone.stage2[0].drop_path = nn.Identity()
    model.backbone.stage2[0].register_parameter(
        'gain', nn.Parameter(torch.tensor(3e38))
    )
    block = model.backbone.stage2[0]
    forward = block.forward
    block.forward = lambda x, size: forward(x * block.gain * block.gain, size)
    text = fails(build(tmp_path, model, custom_hooks=HOOK))
    assert 'first in backbone.stage2.0 (Block), by its own operations' in text
    assert 'it hands backbone.stage2.0.norm1 ' in text
    assert 'There is no checkpoint yet.' in text


def test_bad_images_are_named(tmp_path):
    text = fails(build(tmp_path, data=Images(bad=[3]), custom_hooks=HOOK))
    assert 'iteration 2: ' in text
    assert 'images 102 images/2.jpg, 103 images/3.jpg' in text
    assert 'the preprocessed inputs are so already: 1 NaN and 0 infinite' in text


def test_parameters_that_were_bad_are_named(tmp_path):
    model = Regressor()
    runner = build(tmp_path, model, custom_hooks=HOOK)
    model.init_weights = lambda: None  # the Runner would draw them again
    with torch.no_grad():
        model.backbone.stage4[0].mlp.fc1.weight[0, 0] = torch.inf
    text = fails(runner)
    assert 'parameters were so before this iteration: ' in text
    assert 'backbone.stage4.0.mlp.fc1.weight' in text


def test_step_that_breaks_parameters_is_not_saved(tmp_path):
    """A finite loss with an infinite gradient: found after the step, before a save."""
    model = Regressor()

    def overflow(grad):
        overflow.calls += 1
        return grad * torch.inf if overflow.calls == 2 else grad

    overflow.calls = 0
    model.head.bias.register_hook(overflow)
    hooks = [*HOOK, dict(type='EMAHook')]
    text = fails(build(tmp_path, model, custom_hooks=hooks))
    assert text.startswith('iteration 2: the step made parameters NaN or infinite')
    assert 'head.bias' in text and '103 images/3.jpg' in text
    assert not list(tmp_path.glob('*.pth'))


def test_good_run_is_the_same_with_the_hook(tmp_path):
    """Bit for bit, with dropout; a metric that is NaN is no loss."""
    runs = []
    for name, hooks in (('with', HOOK), ('without', [])):
        torch.manual_seed(0)
        model = Regressor(drop_rate=0.2, drop_path_rate=0.2, norm_eval=False)
        seed = dict(seed=0)
        build(tmp_path / name, model, custom_hooks=hooks, randomness=seed).train()
        runs.append(model)
    for a, b in zip(runs[0].state_dict().values(), runs[1].state_dict().values()):
        assert torch.equal(a, b)
    assert not runs[0]._forward_hooks and not runs[0]._forward_pre_hooks


def test_search_repeats_the_random_draws_and_changes_nothing():
    model = Regressor(drop_rate=0.5, norm_eval=False).train()
    batch = dict(inputs=torch.rand(2, 3, 32, 32), data_samples=None, mode='tensor')
    states, seen = rng_states(), []

    class Sees(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    model.backbone.stage4[0].drop_path = Sees()
    model.forward = lambda inputs, **_: model.backbone(inputs)
    model(**batch)
    buffers = [buffer.clone() for buffer in model.buffers()]
    before, draws = torch.get_rng_state(), random.getstate()
    text = find_source(model, (), batch, states)
    assert 'no module gave such a value when the batch was run again' in text
    assert len(seen) == 4 and torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == draws
    assert all(map(torch.equal, buffers, model.buffers()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_process_ends_all(repo, tmp_path):
    worker = Path(__file__).with_name('rest_runs.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc_per_node', '2', str(worker), str(tmp_path)]
    result = subprocess.run(
        command, cwd=repo, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    # both processes say the same, with the batch of each
    assert result.stderr.count('NonFiniteError: iteration 3: a loss is NaN') == 2
    assert 'process 0, images 104 images/4.jpg: loss=nan' in result.stderr
    assert 'process 1, images 105 images/5.jpg: its losses are finite' in result.stderr
    assert finite(tmp_path / 'iter_2.pth')
    assert {p.name for p in tmp_path.glob('*.pth')} == {'iter_2.pth'}
