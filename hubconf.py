"""The models of ``torch.hub``, by their names in timm."""

from mmrest.timm import *  # noqa: F403

dependencies = ['torch', 'mmengine', 'mmcv', 'timm']
