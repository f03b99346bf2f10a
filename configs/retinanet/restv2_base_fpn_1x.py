# Not published: RetinaNet and the schedule of ResT, on the training images of ResTv2.
_base_ = [
    '../_base_/models/retinanet_restv2_base_fpn.py',
    '../_base_/datasets/coco_detection_crop.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
