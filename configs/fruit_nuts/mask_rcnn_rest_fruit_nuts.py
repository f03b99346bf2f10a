# An example of a custom data set: 18 photographs of 800x600 pixels with dates, figs and
# hazelnuts, https://github.com/Tony607/mmdetection_instance_segmentation_demo, in
# data/fruit_nuts. There is no validation set, so the run only shows that the model can
# fit these photographs. Measured in 18 minutes on two busy CPU cores: box / mask AP50
# 0.81 / 0.86 after 200 iterations, 0.97 / 0.96 after 400, 0.99 / 0.98 after 600. For
# other paths, set data_root of the three datasets and ann_file of the evaluators by
# --cfg-options. Loaders and optimizer are those of the demo.
_base_ = [
    '../_base_/models/mask_rcnn_rest_tiny_fpn.py',
    '../demo/coco_minutes.py',
]

# Small enough to train from scratch on two CPU cores within an hour. To use ImageNet
# weights, inherit mask_rcnn_rest_small_fpn.py instead and only change num_classes.
# Anchors have sides of 16 to 128 pixels, and the fruit 26 to 86.
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rcnn=dict(sampler=dict(num=48)),
    ),
)

scale = (320, 240)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='Resize', scale=scale, keep_ratio=True, backend='pillow'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
val_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True, backend='pillow'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
data_root = 'data/fruit_nuts/'
ann_file = 'trainval.json'
data = dict(
    data_root=data_root,
    ann_file=ann_file,
    data_prefix=dict(img='images/'),
    metainfo=dict(classes=('date', 'fig', 'hazelnut')),
)
train_dataloader = dict(batch_size=2, dataset=dict(**data, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**data, pipeline=val_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + ann_file)
test_evaluator = val_evaluator

max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=200)
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
default_hooks = dict(checkpoint=dict(interval=500))
