"""Steps of data pipelines, in mmengine's root registry."""

from .image_size import CheckImageSize, ImageSizeError

__all__ = ['CheckImageSize', 'ImageSizeError']
