"""MMEngine's clipping, accumulation, EMA and rate scaling, with ResT."""

import pytest
import torch
from mmengine.hooks import Hook
from rest_runs import Images, Regressor, build

SEED = dict(seed=0)


def model(**kwargs):
    torch.manual_seed(0)
    return Regressor(**kwargs)


def train(folder, net, **kwargs):
    runner = build(folder, net, randomness=SEED, **kwargs)
    runner.train()
    return runner


class Start(Hook):
    """Keeps the weights of the start and says how far each has moved since."""

    def before_train(self, runner):
        self.net = runner.model
        self.weights = [p.detach().clone() for p in self.net.parameters()]

    def moved(self):
        named = self.net.named_parameters()
        return {n: (w - p).detach() for (n, p), w in zip(named, self.weights)}


def move(folder, net, **kwargs):
    start = Start()
    train(folder, net, custom_hooks=[start], **kwargs)
    return start.moved()


@pytest.mark.parametrize('limit', [None, 0.01])
def test_clip_grad(tmp_path, limit):
    """With SGD and a rate of 1 the step is the gradient, of the length asked for."""
    clip = dict(clip_grad=dict(max_norm=limit)) if limit else {}
    optimizer = dict(type='SGD', lr=1.0)
    moved = move(tmp_path, model(), iters=1, optimizer=optimizer, optim_wrapper=clip)
    length = float(torch.cat([m.flatten() for m in moved.values()]).norm())
    assert length == pytest.approx(limit, rel=1e-3) if limit else length > 0.02


@pytest.mark.parametrize(
    'norm', [dict(norm_eval=True), dict(norm_cfg=dict(type='GN', num_groups=2))]
)
@pytest.mark.parametrize('with_cp', [False, True])
def test_accumulation_equals_the_whole_batch(tmp_path, norm, with_cp):
    """Four batches of one image make the step of one batch of four."""
    optimizer = dict(type='SGD', lr=1.0)
    whole = move(
        tmp_path / 'whole', model(**norm), iters=1, batch_size=4, optimizer=optimizer
    )
    parts = move(
        tmp_path / 'parts',
        model(with_cp=with_cp, **norm),
        iters=4,
        batch_size=1,
        optimizer=optimizer,
        optim_wrapper=dict(accumulative_counts=4),
    )
    assert any(step.abs().max() > 1e-2 for step in whole.values())
    for name, step in whole.items():
        error = (parts[name] - step).abs().max()
        assert error <= 1e-4 * step.abs().max() + 1e-6, name


def test_ema_follows_its_formula_and_resumes(tmp_path):
    """``begin_iter`` 0: the copy of the first iteration, then the moving average."""
    hook = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.25)
    options = dict(custom_hooks=[hook], optimizer=dict(type='SGD', lr=0.05))

    def saved(folder, iteration):
        return torch.load(folder / f'iter_{iteration}.pth', weights_only=False)

    whole, half = tmp_path / 'whole', tmp_path / 'half'
    train(whole, model(), iters=4, **options)
    first, second = saved(whole, 2), saved(whole, 4)
    # what is evaluated is saved as state_dict, what is trained beside it
    for name in ('backbone.stage3.0.attn.kv.weight', 'head.weight'):
        averaged = second['state_dict'][name]
        trained = second['ema_state_dict'][f'module.{name}']
        assert not torch.equal(averaged, trained)
        assert not torch.equal(averaged, first['state_dict'][name])

    train(half, model(), iters=2, **options)
    runner = build(half, model(), randomness=SEED, iters=4, resume=True, **options)
    runner.train()
    resumed = saved(half, 4)
    for key in ('state_dict', 'ema_state_dict'):
        for name, value in second[key].items():
            assert torch.equal(resumed[key][name], value), (key, name)


@pytest.mark.parametrize('constructor', [None, 'LayerDecayOptimWrapperConstructor'])
def test_rates_are_scaled_with_the_batch(tmp_path, constructor):
    """Batch 4 for a rate that was chosen for 16: a quarter, in every group."""
    optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
    if constructor is not None:
        optim_wrapper['constructor'] = constructor
        optim_wrapper['paramwise_cfg'].update(layer_decay_rate=0.5)
    rates = []
    for scale in (False, True):
        net = model()
        runner = train(
            tmp_path / str(scale),
            net,
            iters=1,
            batch_size=4,
            data=Images(4),
            optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05),
            optim_wrapper=dict(optim_wrapper),
            auto_scale_lr=dict(enable=scale, base_batch_size=16),
        )
        groups = runner.optim_wrapper.optimizer.param_groups
        rates.append([group['lr'] for group in groups])
    assert rates[1] == pytest.approx([lr / 4 for lr in rates[0]])
    assert len(set(rates[0])) == (1 if constructor is None else 6)


def test_schedule_keeps_the_ratio_of_the_layers(tmp_path):
    """Warm-up and steps multiply every group; a resumed run goes on alike."""
    step = dict(type='MultiStepLR', milestones=[3], end=4, by_epoch=False, gamma=0.1)
    options = dict(
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=2),
            step,
        ],
        optimizer=dict(type='AdamW', lr=0.01),
        optim_wrapper=dict(
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    whole = train(tmp_path / 'whole', model(), iters=4, **options)
    half = tmp_path / 'half'
    train(half, model(), iters=2, **options)
    resumed = build(half, model(), randomness=SEED, iters=4, resume=True, **options)
    resumed.train()
    for runner in (whole, resumed):
        for group in runner.optim_wrapper.optimizer.param_groups:
            assert group['lr'] == pytest.approx(0.01 * 0.1 * group['lr_scale'])
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
