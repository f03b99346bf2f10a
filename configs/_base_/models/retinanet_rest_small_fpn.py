# RetinaNet on ResT-Small. The other sizes override a few fields of this file.

# Importing mmrest registers ResT in MMEngine's root registry.
custom_imports = dict(imports=['mmrest'], allow_failed_imports=False)

model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        # RGB with ImageNet's statistics, as the backbone was pretrained.
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='ResT',
        arch='small',
        # Stage 1 is not requested, so stage 2 receives its map without a norm.
        out_indices=(1, 2, 3),
        drop_path_rate=0.1,
        # The next stage receives the normalised map of a requested stage.
        out_norm='chain',
        # Nothing is frozen: whether the published runs froze the stem and stage 1
        # (frozen_stages=1, the default of their framework) is not known, and the
        # code released with them cannot freeze.
        frozen_stages=-1,
        # The file: `python -m mmrest.weights rest_small`.
        # Without: model.backbone.init_cfg=None
        init_cfg=dict(type='Pretrained', checkpoint='pretrained/rest_small.pth'),
    ),
    neck=dict(
        type='FPN',
        in_channels=[128, 256, 512],
        out_channels=256,
        # P6 from the stage-4 output, P7 from relu(P6).
        add_extra_convs='on_input',
        relu_before_extra_convs=True,
        num_outs=5,
    ),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=80,
        in_channels=256,
        stacked_convs=4,
        feat_channels=256,
        # Sides of 32, 64, 128, 256 and 512 pixels x 2^(0, 1/3, 2/3).
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0],
        ),
        loss_cls=dict(
            type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0
        ),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0.0,  # every object gets its best anchor
            ignore_iof_thr=-1,
        ),
        sampler=dict(type='PseudoSampler'),  # focal loss takes every anchor
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=100,
    ),
)
