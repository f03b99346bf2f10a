# Stem of ResNet: a 7x7 convolution and a max-pooling.
_base_ = '../imagenet/rest_lite_8xb128_in1k.py'

model = dict(backbone=dict(stem_cfg='resnet'))
