_base_ = [
    '../_base_/models/classifier_restv2_tiny.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/imagenet_30e_384.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(train_cfg=None)  # neither Mixup nor CutMix
# Trained at 224x224: the published file, or a checkpoint of restv2_tiny_8xb256_in1k.py.
load_from = 'pretrained/restv2_tiny.pth'
custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL'),
    dict(type='mmrest.hooks.CheckNonFiniteHook'),
    dict(type='mmrest.hooks.PreemptionHook'),
]
