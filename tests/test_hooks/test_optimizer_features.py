"""MMEngine's clipping, accumulation, EMA and rate scaling, with ResT."""

import pytest
import torch
from kill_checks import same
from mmengine.hooks import Hook
from toy_runs import Images, Regressor, train

from mmrest.checkpoint import read_checkpoint

SGD = dict(type='SGD', lr=1.0)


def run(folder, data=None, **kwargs):
    """Batches in order, a constant rate."""
    torch.manual_seed(0)
    options = dict(param_scheduler=None, checkpoint=dict(max_keep_ckpts=-1))
    model = Regressor(**kwargs.pop('model', {}))
    return train(folder, model, data=data or Images(size=64), **{**options, **kwargs})


class Start(Hook):
    """Keeps the weights of the start and says how far each has moved since."""

    def before_train(self, runner):
        self.net = runner.model
        self.weights = [p.detach().clone() for p in self.net.parameters()]

    def moved(self):
        named = self.net.named_parameters()
        return {n: (w - p).detach() for (n, p), w in zip(named, self.weights)}


def move(folder, **kwargs):
    start = Start()
    run(folder, hooks=[start], optimizer=SGD, **kwargs)
    return start.moved()


@pytest.mark.parametrize('limit', [None, 0.01])
def test_clip_grad(tmp_path, limit):
    """With SGD and a rate of 1 the step is the gradient, of the length asked for."""
    clip = dict(clip_grad=dict(max_norm=limit)) if limit else {}
    moved = move(tmp_path, iters=1, optim_wrapper=clip)
    length = float(torch.cat([m.flatten() for m in moved.values()]).norm())
    assert length == pytest.approx(limit, rel=1e-3) if limit else length > 0.02


@pytest.mark.parametrize(
    'options',
    [
        dict(norm_eval=True, with_cp=True),
        dict(norm_cfg=dict(type='GN', num_groups=2)),
    ],
)
def test_accumulation_equals_the_whole_batch(tmp_path, options):
    """Four batches of one image make the step of one batch of four."""
    whole = move(tmp_path / 'whole', model=options, iters=1, batch_size=4)
    parts = move(
        tmp_path / 'parts',
        model=options,
        iters=4,
        batch_size=1,
        optim_wrapper=dict(accumulative_counts=4),
    )
    assert any(step.abs().max() > 1e-2 for step in whole.values())
    for name, step in whole.items():
        error = (parts[name] - step).abs().max()
        assert error <= 1e-4 * step.abs().max() + 1e-5, name


def test_ema_resumes(tmp_path):
    """What is evaluated is saved as state_dict, what is trained beside it."""
    hook = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.25)
    options = dict(hooks=[hook], optimizer=dict(SGD, lr=0.05))
    run(tmp_path / 'whole', iters=4, **options)
    run(tmp_path / 'half', iters=2, **options)
    run(tmp_path / 'half', iters=4, resume=True, **options)
    whole, half = (
        read_checkpoint(tmp_path / name / 'iter_4.pth') for name in ('whole', 'half')
    )
    first = read_checkpoint(tmp_path / 'whole' / 'iter_2.pth')
    for name in ('backbone.stage3.0.attn.kv.weight', 'head.weight'):
        averaged = whole['state_dict'][name]
        assert not torch.equal(averaged, whole['ema_state_dict'][f'module.{name}'])
        assert not torch.equal(averaged, first['state_dict'][name])
    for key in ('state_dict', 'ema_state_dict'):
        assert same(whole[key], half[key])


LAYER_DECAY = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.0, layer_decay_rate=0.5),
)


@pytest.mark.parametrize('wrapper', [dict(paramwise_cfg={}), LAYER_DECAY])
def test_rates_are_scaled_with_the_batch(tmp_path, wrapper):
    """Batch 4 for a rate that was chosen for 16: a quarter, in every group."""
    rates = []
    for scale in (False, True):
        runner = run(
            tmp_path / str(scale),
            iters=1,
            batch_size=4,
            optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05),
            optim_wrapper=dict(wrapper),
            auto_scale_lr=dict(enable=scale, base_batch_size=16),
        )
        groups = runner.optim_wrapper.optimizer.param_groups
        rates.append([group['lr'] for group in groups])
    assert rates[1] == pytest.approx([lr / 4 for lr in rates[0]])
    assert len(set(rates[0])) == (6 if wrapper is LAYER_DECAY else 1)


def test_schedule_keeps_the_ratio_of_the_layers(tmp_path):
    """Warm-up and steps multiply every group; a resumed run goes on alike."""
    options = dict(
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=2),
            dict(type='MultiStepLR', milestones=[3], end=4, by_epoch=False, gamma=0.1),
        ],
        optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05),
        optim_wrapper=LAYER_DECAY,
    )
    whole = run(tmp_path / 'whole', iters=4, **options)
    run(tmp_path / 'half', iters=2, **options)
    resumed = run(tmp_path / 'half', iters=4, resume=True, **options)
    for runner in (whole, resumed):
        for group in runner.optim_wrapper.optimizer.param_groups:
            assert group['lr'] == pytest.approx(0.01 * 0.1 * group['lr_scale'])
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
