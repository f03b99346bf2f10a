# The demo's detector for the user's own boxes without masks (`make demo DATA=...`).
# projects/demo/run.py sets paths and classes. This one starts from random weights; for
# better results, use configs/retinanet/ and ImageNet weights.
_base_ = ['../_base_/models/retinanet_rest_small_fpn.py', './coco_minutes.py']

width = 96  # channels of FPN and head
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
    neck=dict(in_channels=[64, 128, 256], out_channels=width),
    bbox_head=dict(
        num_classes=1,
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        # Sides of 16 to 406 pixels, after the images are scaled as below.
        anchor_generator=dict(octave_base_scale=2),
    ),
)

scale = (320, 320)  # the longer side
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CheckImageSize'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
val_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CheckImageSize'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
