_base_ = './rest_small_fpn_1x.py'

# Only for the checkpoints that the authors published. They were
# trained on BGR pixels with this mean and no scaling, the default of their
# framework, and need the same at test time; an author later called it a mistake.
# Resizing by Pillow, the rest of their input, is in the base already.
model = dict(
    data_preprocessor=dict(
        mean=[103.53, 116.28, 123.675],
        std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False,
    ),
)
