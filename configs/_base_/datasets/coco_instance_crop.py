# coco_instance.py with the training images of ResTv2: a crop of 0.9 of each side, then
# one of ten sizes.
_base_ = './coco_instance.py'

train_pipeline = _base_.train_pipeline
train_pipeline[3].scales = [
    (1333, side) for side in (480, 512, 534, 576, 640, 672, 704, 736, 768, 800)
]
train_pipeline[3:3] = [
    dict(
        type='RandomCrop',
        crop_type='relative',
        crop_size=(0.9, 0.9),
        allow_negative_crop=True,
        recompute_bbox=True,  # boxes fit what is left of the masks
    )
]
# Only what a crop has emptied goes; an image without objects stays.
train_pipeline[-1:-1] = [
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-5, 1e-5), keep_empty=False)
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
