"""Loop, sampler, schedule and hooks count in the same unit, or a run is refused."""

import pytest
from mmengine.config import Config, ConfigDict
from torch.utils.data import Sampler

from mmrest.datasets.preflight import check_config

EPOCHS = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1)


def test_an_epoch_that_never_ends(cfg, finding):
    cfg.train_cfg = ConfigDict(EPOCHS)
    text = finding(cfg)
    assert 'train_cfg is EpochBasedTrainLoop, but' in text
    assert 'train_dataloader.sampler is InfiniteSampler' in text
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    check_config(cfg)


def test_other_ways_to_write_it(cfg, finding):
    from mmengine.dataset import InfiniteSampler
    from mmengine.runner import EpochBasedTrainLoop

    cfg.train_cfg.by_epoch = True  # as merged into what is inherited
    assert 'type=IterBasedTrainLoop and by_epoch=True, of which' in finding(cfg)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2)
    assert 'train_cfg is by_epoch=True, but train_dataloader' in finding(cfg)
    cfg.train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=2)
    cfg.train_dataloader.sampler = dict(type=InfiniteSampler)
    assert 'sampler is InfiniteSampler' in finding(cfg)


class Endless(Sampler):
    def __init__(self, dataset):
        self.size = len(dataset)

    def __iter__(self):
        while True:
            yield 0

    def __len__(self):
        return self.size


class Finite(Endless):
    def __iter__(self):
        return iter(range(self.size))


@pytest.mark.parametrize('kind', [Endless, Finite])
def test_a_sampler_of_ones_own(cfg, finding, kind):
    cfg.train_cfg = ConfigDict(EPOCHS)
    cfg.train_dataloader.sampler = dict(type=kind)
    if kind is Finite:
        check_config(cfg)
    else:
        assert 'sampler is Endless' in finding(cfg)


def test_a_validation_that_never_ends(cfg, finding):
    cfg.val_dataloader.sampler = dict(type='InfiniteSampler')
    assert 'val_dataloader.sampler is InfiniteSampler, which never ends' in finding(cfg)


@pytest.mark.parametrize('explicit', [True, False])
def test_a_schedule_that_never_acts(cfg, finding, explicit):
    schedule = dict(type='MultiStepLR', milestones=[8, 11])
    if explicit:
        schedule['by_epoch'] = True
    cfg.param_scheduler = [dict(type='LinearLR', by_epoch=False, end=9), schedule]
    text = finding(cfg)
    assert (
        'train_cfg is IterBasedTrainLoop, but param_scheduler.1 (MultiStepLR)' in text
    )
    assert '1 problem' in text
    schedule.update(by_epoch=True, convert_to_iter_based=True)
    cfg.param_scheduler = schedule
    check_config(cfg)


def test_a_schedule_that_waits_for_validations(cfg):
    cfg.param_scheduler = dict(type='ReduceOnPlateauLR', monitor='coco/bbox_mAP')
    check_config(cfg)


@pytest.mark.parametrize(
    ('hook', 'field'),
    [
        (dict(type='CheckpointHook', interval=1), 'by_epoch=True'),
        (dict(type='CheckpointHook', by_epoch=True, interval=1), 'by_epoch=True'),
        (dict(type='mmdet.YOLOXModeSwitchHook', num_last_epochs=15), 'epochs is 15'),
    ],
)
def test_a_hook_that_acts_at_the_end_alone(cfg, finding, hook, field):
    cfg.custom_hooks = [hook]
    text = finding(cfg)
    assert 'train_cfg is IterBasedTrainLoop' in text
    assert 'custom_hooks.0' in text and field in text


def test_the_shipped_checkpoints_need_their_unit(cfg, finding):
    del cfg.default_hooks.checkpoint['by_epoch']
    assert '--cfg-options default_hooks.checkpoint.by_epoch=False' in finding(cfg)


def test_what_counts_iterations_in_an_epoch_loop_acts_and_is_said(cfg):
    cfg.train_cfg = ConfigDict(EPOCHS)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    notes = [text for level, text in check_config(cfg) if level >= 30]
    assert any(
        'default_hooks.checkpoint' in note and 'by_epoch=False' in note
        for note in notes
    )


def test_limits_in_the_other_unit(cfg, finding):
    cfg.train_cfg.max_epochs = 12
    assert 'train_cfg is IterBasedTrainLoop, but max_epochs' in finding(cfg)


@pytest.mark.parametrize('option', ['persistent_workers', 'prefetch_factor'])
def test_options_of_workers_without_workers(cfg, finding, option):
    cfg.train_dataloader[option] = 2
    text = finding(cfg)
    assert f'train_dataloader: {option}=2 needs worker processes' in text
    assert f'train_dataloader.{option}=' in text
    cfg.train_dataloader.num_workers = 1
    check_config(cfg)


def test_configs_without_a_loop_pass():
    check_config(Config(dict(train_dataloader=dict(batch_size=2))))
