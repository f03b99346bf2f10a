_base_ = './retinanet_rest_lite_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        out_indices=(1, 2, 3),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
