# The published recipe with a third of its iterations; the authors have no such run.
_base_ = [
    '../_base_/models/mask_rcnn_restv2_small_fpn.py',
    '../_base_/datasets/coco_instance_crop.py',
    '../_base_/schedules/schedule_1x_amp_clip.py',
    '../_base_/default_runtime.py',
]
