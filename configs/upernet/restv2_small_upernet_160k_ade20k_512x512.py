_base_ = [
    '../_base_/models/upernet_restv2_small.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/upernet_160k_stage_decay.py',
    '../_base_/default_runtime_seg.py',
]
