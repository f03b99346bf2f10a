_base_ = './restv2_tiny_8xb64_384_in1k.py'

model = dict(
    backbone=dict(arch='large', drop_path_rate=0.5), head=dict(in_channels=1024)
)
load_from = 'pretrained/restv2_large.pth'
