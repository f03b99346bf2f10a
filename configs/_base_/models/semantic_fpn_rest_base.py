_base_ = './semantic_fpn_rest_small.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='pretrained/rest_base.pth'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
