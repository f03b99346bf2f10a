# Three times schedule_1x.py: 270,000 / 7,330 = 36.83 epochs of COCO at 16 images a
# step, rate x0.1 at 210,000 (28.65 epochs) and 250,000 (34.11), as detectron2's 3x.
_base_ = './schedule_1x.py'

train_cfg = dict(max_iters=270000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(
        type='MultiStepLR',
        by_epoch=False,
        begin=0,
        end=270000,
        milestones=[210000, 250000],
        gamma=0.1,
    ),
]
