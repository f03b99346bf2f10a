"""Pipeline steps, in MMEngine's root registry, and the check before a run."""

from .coco_fields import fill_coco_fields
from .transforms import CheckImageSize, ImageSizeError

__all__ = ['CheckImageSize', 'ImageSizeError', 'fill_coco_fields']
