"""The smallest ResT, and a classifier around it."""

import rest_variants

TINY = dict(rest_variants.TINY, depths=[1, 1, 2, 1])


def classifier(num_classes=5, arch=TINY, **options):
    """The config of MMPretrain's model."""
    return dict(
        type='ImageClassifier',
        backbone=dict(type='mmrest.ResT', arch=arch, out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=32),
        **options,
    )
