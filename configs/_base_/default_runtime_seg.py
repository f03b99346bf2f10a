# default_runtime.py for MMSegmentation: another scope, and what draws and merges.
_base_ = './default_runtime.py'

default_scope = 'mmseg'
# Reports label images with an index that is no class.
custom_hooks = [
    dict(type='mmrest.hooks.CheckNonFiniteHook'),
    dict(type='mmrest.hooks.PreemptionHook'),
    dict(type='mmrest.hooks.LabelRangeHook'),
]
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(interval=8000),
    visualization=dict(type='SegVisualizationHook'),
)
visualizer = dict(type='SegLocalVisualizer')

# For `tools/test.py --tta`: the mean of the class probabilities.
tta_model = dict(_delete_=True, type='SegTTAModel')
