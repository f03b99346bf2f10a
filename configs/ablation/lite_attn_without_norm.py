# EMSA without InstanceNorm.
_base_ = '../imagenet/rest_lite_8xb128_in1k.py'

model = dict(backbone=dict(attn_cfg='emsa_without_norm'))
