# Blood cells from scratch, with Faster R-CNN. Figures: docs/tutorials/own_dataset.md.
_base_ = ['../_base_/models/mask_rcnn_rest_lite_fpn.py', './bccd_minutes.py']

width = 96  # channels of FPN and RPN
strides = [8, 16, 32, 64]
norm_cfg = dict(type='GN', num_groups=16)
model = dict(
    type='FasterRCNN',
    backbone=dict(out_indices=(1, 2, 3), drop_path_rate=0.0, init_cfg=None),
    neck=dict(
        in_channels=[128, 256, 512], out_channels=width, num_outs=4, norm_cfg=norm_cfg
    ),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        # Sides of 16, 32, 64 and 128 pixels, and 1.4 times that.
        anchor_generator=dict(scales=[2, 2.8], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, featmap_strides=strides),
        bbox_head=dict(
            in_channels=width,
            fc_out_channels=512,
            num_classes=3,
            reg_class_agnostic=True,
        ),
        mask_roi_extractor=None,
        mask_head=None,
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
