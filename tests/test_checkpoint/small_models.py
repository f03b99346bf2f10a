"""The smallest ResT, and a classifier around it."""

TINY = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    depths=[1, 1, 2, 1],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratios=2,
)


def classifier(num_classes=5, arch=TINY, **options):
    """The config of MMPretrain's model."""
    return dict(
        type='ImageClassifier',
        backbone=dict(type='mmrest.ResT', arch=arch, out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=32),
        **options,
    )
