_base_ = [
    '../_base_/models/classifier_restv2_tiny.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/imagenet_300e_restv2.py',
    '../_base_/default_runtime_cls.py',
]

train_dataloader = dict(batch_size=256)
# The averaged weights are evaluated and saved.
custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL'),
    dict(type='mmrest.hooks.CheckNonFiniteHook'),
    dict(type='mmrest.hooks.PreemptionHook'),
]
