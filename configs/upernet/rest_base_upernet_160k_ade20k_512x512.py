_base_ = [
    '../_base_/models/upernet_rest_base.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/upernet_160k.py',
    '../_base_/default_runtime_seg.py',
]
