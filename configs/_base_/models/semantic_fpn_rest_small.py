# Semantic FPN on ResT-Small, head as in the published PVT and PoolFormer models. The
# other sizes override a few fields of this file.

# Importing mmrest registers ResT in MMEngine's root registry.
custom_imports = dict(imports=['mmrest'], allow_failed_imports=False)

norm_cfg = dict(type='SyncBN', requires_grad=True)  # BN in a single process
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        # RGB with ImageNet's statistics, as the backbone was pretrained.
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),  # of a training crop; test images are not padded
    ),
    backbone=dict(
        type='ResT',
        arch='small',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        out_norm='chain',
        # The file: `python -m mmrest.weights rest_small`.
        # Without: model.backbone.init_cfg=None
        init_cfg=dict(type='Pretrained', checkpoint='pretrained/rest_small.pth'),
    ),
    neck=dict(
        type='FPN',
        in_channels=[64, 128, 256, 512],
        out_channels=256,
        num_outs=4,
    ),
    decode_head=dict(
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    # Or in windows: dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    test_cfg=dict(mode='whole'),
)
