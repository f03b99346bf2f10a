# UPerNet on ResTv2-Tiny, with the heads that ResT has. The other sizes override a few
# fields of this file.
_base_ = './upernet_rest_small.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResTV2',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        # The file: `python -m mmrest.weights restv2_tiny`.
        # Without: model.backbone.init_cfg=None
        init_cfg=dict(type='Pretrained', checkpoint='pretrained/restv2_tiny.pth'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
