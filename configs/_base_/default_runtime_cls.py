# default_runtime.py for MMPretrain: another scope, epochs, and what draws and merges.
_base_ = './default_runtime.py'

default_scope = 'mmpretrain'
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(
        by_epoch=True, interval=1, max_keep_ckpts=3, save_best='accuracy/top1'
    ),
    visualization=dict(type='VisualizationHook'),
    # A published ImageNet checkpoint is read as it is.
    published=dict(type='mmrest.checkpoint.PublishedClassifierHook'),
)
log_processor = dict(by_epoch=True)
visualizer = dict(type='UniversalVisualizer')

# For `tools/test.py --tta`: the mean of the scores.
tta_model = dict(_delete_=True, type='AverageClsScoreTTA')
