_base_ = './restv2_tiny_8xb64_384_in1k.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.3))
load_from = 'pretrained/restv2_base.pth'
