# Stem of PVT: patches of 4x4 pixels.
_base_ = '../imagenet/rest_lite_8xb128_in1k.py'

model = dict(backbone=dict(stem_cfg='patch'))
