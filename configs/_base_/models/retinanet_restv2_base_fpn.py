_base_ = './retinanet_restv2_tiny_fpn.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint='pretrained/restv2_base.pth'),
    ),
)
