# COCO 2017, boxes and masks: coco_detection.py with masks loaded and evaluated.
_base_ = './coco_detection.py'

train_pipeline = _base_.train_pipeline
# Polygons are only rasterised for each proposal, as in the published
# recipe. RLE masks are only possible with poly2mask=True.
train_pipeline[2] = dict(
    type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False
)
test_pipeline = _base_.test_pipeline
test_pipeline[3] = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = dict(metric=['bbox', 'segm'])
