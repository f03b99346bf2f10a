_base_ = [
    '../_base_/models/mask_rcnn_restv2_tiny_fpn.py',
    '../_base_/datasets/coco_instance_crop.py',
    '../_base_/schedules/schedule_3x_amp_clip.py',
    '../_base_/default_runtime.py',
]
