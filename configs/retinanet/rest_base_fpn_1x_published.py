# Pixels and box head as in rest_small_fpn_1x_published.py, which says why.
_base_ = './rest_base_fpn_1x.py'

model = dict(
    data_preprocessor=dict(
        mean=[103.53, 116.28, 123.675],
        std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False,
    ),
    bbox_head=dict(
        type='ClipLastRetinaHead',
        bbox_coder=dict(clip_border=False),
    ),
)
custom_imports = dict(
    imports=['mmrest', 'mmrest.models.clip_last_retina_head'],
    allow_failed_imports=False,
)
