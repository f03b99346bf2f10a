_base_ = './rest_small_8xb128_in1k.py'

# The authors train the large classifier with 0.3, and its detectors with 0.2.
model = dict(
    backbone=dict(arch='large', drop_path_rate=0.3), head=dict(in_channels=768)
)
