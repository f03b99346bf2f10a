_base_ = './retinanet_rest_small_fpn.py'

model = dict(
    backbone=dict(
        arch='lite',
        init_cfg=dict(checkpoint='pretrained/rest_lite.pth'),
    ),
)
