_base_ = './upernet_rest_small.py'

model = dict(
    backbone=dict(
        arch='lite',
        init_cfg=dict(checkpoint='pretrained/rest_lite.pth'),
    ),
)
