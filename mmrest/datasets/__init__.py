"""Steps of data pipelines, in mmengine's root registry."""

from .transforms import CheckImageSize, ImageSizeError

__all__ = ['CheckImageSize', 'ImageSizeError']
