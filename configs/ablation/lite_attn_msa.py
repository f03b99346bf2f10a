# Plain self-attention: keys and values from the whole map.
_base_ = '../imagenet/rest_lite_8xb128_in1k.py'

model = dict(backbone=dict(attn_cfg='msa'))
