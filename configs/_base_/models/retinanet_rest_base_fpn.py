_base_ = './retinanet_rest_small_fpn.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='pretrained/rest_base.pth'),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
