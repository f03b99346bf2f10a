_base_ = './retinanet_restv2_tiny_fpn.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='pretrained/restv2_small.pth'),
    ),
)
