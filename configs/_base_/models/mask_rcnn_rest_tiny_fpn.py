# Mask R-CNN on a ResT small enough to learn a few small objects from scratch on two CPU
# cores. The configs that inherit it give num_classes, schedules and samplers.
_base_ = './mask_rcnn_rest_small_fpn.py'

width = 64  # channels of FPN, RPN and mask head
strides = [4, 8, 16, 32]
roi_strides = strides[:3]
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[32, 64, 128, 256],
            num_heads=[1, 2, 4, 8],
            depths=[1, 1, 2, 1],
            sr_ratios=[8, 4, 2, 1],
            mlp_ratios=4,
        ),
        drop_path_rate=0.0,
        init_cfg=None,  # from scratch
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width, num_outs=4),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        # Sides of 16, 32, 64 and 128 pixels.
        anchor_generator=dict(scales=[4], strides=strides),
    ),
    roi_head=dict(
        # finest_scale: RoIs up to 56 pixels are read at stride 4, up to 112 at 8.
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=2),
            out_channels=width,
            featmap_strides=roi_strides,
            finest_scale=28,
        ),
        bbox_head=dict(in_channels=width, fc_out_channels=256),
        mask_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=2),
            out_channels=width,
            featmap_strides=roi_strides,
            finest_scale=28,
        ),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=width),
    ),
    # Few proposals, since there are few objects in an image.
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=60)),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=60)),
)
