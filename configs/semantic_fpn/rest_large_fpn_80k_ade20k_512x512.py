_base_ = [
    '../_base_/models/semantic_fpn_rest_large.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/semantic_fpn_80k.py',
    '../_base_/default_runtime_seg.py',
]
