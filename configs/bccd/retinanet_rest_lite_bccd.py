# Blood cells from scratch, with RetinaNet. Figures: docs/tutorials/own_dataset.md.
_base_ = ['../_base_/models/retinanet_rest_lite_fpn.py', './bccd_minutes.py']

width = 96  # channels of FPN and head
norm_cfg = dict(type='GN', num_groups=16)  # 0.02 AP50 more after 400 iterations
model = dict(
    backbone=dict(drop_path_rate=0.0, init_cfg=None),  # from scratch
    neck=dict(in_channels=[128, 256, 512], out_channels=width, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=3,
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        # Sides of 16 to 406 pixels.
        anchor_generator=dict(octave_base_scale=2),
    ),
)
