# imagenet_224.py at 384x384, 64 images a GPU.
_base_ = './imagenet_224.py'

train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 384  # RandomResizedCrop
resize = _base_.resize
resize.scale = 384
test_pipeline = _base_.test_pipeline
test_pipeline[1:3] = [resize, dict(type='CenterCrop', crop_size=384)]
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1:3] = test_pipeline[1:3]

train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
