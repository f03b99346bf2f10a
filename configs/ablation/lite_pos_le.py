# Position: a learnable map for 224x224 pixels, interpolated for other sizes.
_base_ = '../imagenet/rest_lite_8xb128_in1k.py'

model = dict(backbone=dict(pos_cfg=dict(type='le', image_size=224)))
# No decay on embeddings of positions, as in MMPretrain's Swin.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0))))
