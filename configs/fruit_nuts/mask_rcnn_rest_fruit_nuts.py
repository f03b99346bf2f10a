# An example of a data set of one's own: 18 photographs of 800x600 pixels with dates,
# figs and hazelnuts, https://github.com/Tony607/mmdetection_instance_segmentation_demo
# in data/fruit_nuts. It has no validation part: the run shows that the chain from
# pixels to masks can learn these photographs by heart, no more. Measured on two busy
# CPU cores, 23 minutes in all: box / mask AP50 0.79 / 0.82 after 200 iterations, 0.93 /
# 0.91 after 400, 0.99 / 0.99 after 600. Other paths: --cfg-options on data_root of the
# three datasets and ann_file of the evaluators.
_base_ = [
    '../_base_/models/mask_rcnn_rest_small_fpn.py',
    '../_base_/default_runtime.py',
]

data_root = 'data/fruit_nuts/'
metainfo = dict(classes=('date', 'fig', 'hazelnut'))

width = 64  # channels of FPN, RPN and mask head
strides = [4, 8, 16, 32]
roi_strides = strides[:3]
# Small enough to learn from scratch on two CPU cores within the hour. With ImageNet
# weights keep the model as it is and change num_classes alone.
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
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width, num_outs=4),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        # Sides of 16, 32, 64 and 128 pixels where the fruit measures 26 to 86.
        anchor_generator=dict(scales=[4], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=2),
            out_channels=width,
            featmap_strides=roi_strides,
            finest_scale=28,
        ),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=3),
        mask_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=2),
            out_channels=width,
            featmap_strides=roi_strides,
            finest_scale=28,
        ),
        mask_head=dict(
            num_convs=2, in_channels=width, conv_out_channels=width, num_classes=3
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=60),
        rcnn=dict(sampler=dict(num=48)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=60)),
)

scale = (320, 240)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='Resize', scale=scale, keep_ratio=True, backend='pillow'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True, backend='pillow'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='trainval.json',
        data_prefix=dict(img='images/'),
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='trainval.json',
        data_prefix=dict(img='images/'),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'trainval.json', metric=['bbox', 'segm']
)
test_evaluator = val_evaluator

max_iters = 600
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=200)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=30,
        T_max=max_iters - 30,
        eta_min_ratio=0.02,
    ),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=500, max_keep_ckpts=1)
)
