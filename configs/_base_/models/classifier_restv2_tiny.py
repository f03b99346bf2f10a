# ImageNet classifier on ResTv2-Tiny: stage 4, the final norm, the mean, and a linear
# layer. The other sizes override a few fields of this file.
_base_ = './classifier_rest_small.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResTV2',
        arch='tiny',
        out_indices=(3,),
        out_norm='final',
        drop_path_rate=0.1,
    ),
    head=dict(in_channels=768),
)
