# Keys and values from a map that max-pooling has reduced.
_base_ = '../imagenet/rest_lite_8xb128_in1k.py'

model = dict(backbone=dict(attn_cfg=dict(type='emsa', reduction='max')))
