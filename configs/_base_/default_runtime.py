# What every detector of this repository shares at run time. The hooks of mmrest stand
# with their module, so that MMEngine finds them under any model.
default_scope = 'mmdet'

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmrest.hooks.AtomicCheckpointHook',
        by_epoch=False,
        interval=10000,
        max_keep_ckpts=3,
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)
# A list that replaces this one, in a config of yours, should name the hooks again.
custom_hooks = [
    dict(type='mmrest.hooks.CheckNonFiniteHook'),
    dict(type='mmrest.hooks.PreemptionHook'),
]
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=False)
log_level = 'INFO'

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    # Without CUDA, tools/train.py and tools/test.py use gloo.
    dist_cfg=dict(backend='nccl'),
)

# `tools/train.py --tensorboard` adds dict(type='TensorboardVisBackend').
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(
    type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer'
)

# For `tools/test.py --tta`; mmdet merges boxes only and refuses mask heads.
tta_model = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
)

load_from = None
resume = False
