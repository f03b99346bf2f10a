# No positional encoding.
_base_ = '../imagenet/rest_lite_8xb128_in1k.py'

model = dict(backbone=dict(pos_cfg='none'))
