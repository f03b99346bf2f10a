# BCCD, blood cells in 364 micrographs of 640x480 pixels: 205 for training, 87 for
# validation, 72 for testing. COCO format, in data/bccd; MIT licence,
# https://github.com/Shenggan/BCCD_Dataset. At half the size, red cells have about 50
# pixels, platelets 17, and a training takes minutes on two CPU cores. Loaders,
# optimizer and schedule are those of the demo.
_base_ = '../demo/coco_minutes.py'

data_root = 'data/bccd/'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))
scale = (320, 240)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    # cells have any orientation
    dict(
        type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']
    ),
    dict(type='PackDetInputs'),
]
val_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
data = dict(data_root=data_root, data_prefix=dict(img='images/'), metainfo=metainfo)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(**data, ann_file='train.json', pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(**data, ann_file='val.json', pipeline=val_pipeline))
test_dataloader = dict(
    dataset=dict(**data, ann_file='test.json', pipeline=val_pipeline)
)
val_evaluator = dict(ann_file=data_root + 'val.json', metric='bbox')
test_evaluator = dict(ann_file=data_root + 'test.json', metric='bbox')

train_cfg = dict(max_iters=600, val_interval=200)
default_hooks = dict(checkpoint=dict(interval=200))
