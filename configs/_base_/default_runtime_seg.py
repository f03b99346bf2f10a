# default_runtime.py for MMSegmentation: another scope, and what draws and merges.
_base_ = './default_runtime.py'

default_scope = 'mmseg'
# Names the file of a label image with an index that is no class.
custom_hooks = [
    dict(type='CheckNonFiniteHook'),
    dict(type='PreemptionHook'),
    dict(type='LabelRangeHook'),
]
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(interval=8000),
    visualization=dict(type='SegVisualizationHook'),
)
visualizer = dict(type='SegLocalVisualizer')

# For `tools/test.py --tta`: the mean of the class probabilities.
tta_model = dict(_delete_=True, type='SegTTAModel')
