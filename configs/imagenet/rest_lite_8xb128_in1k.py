_base_ = './rest_small_8xb128_in1k.py'

model = dict(backbone=dict(arch='lite'))
