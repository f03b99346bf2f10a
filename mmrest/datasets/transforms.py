"""Check that images have the size for which their boxes and masks were drawn."""

from typing import Optional

from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS


class ImageSizeError(ValueError):
    """An image has another size than in its annotation."""


@TRANSFORMS.register_module()
class CheckImageSize(BaseTransform):
    """Compare a loaded image with the size in its annotation.

    Use it after ``LoadImageFromFile``. MMDetection does not compare them. If an image
    was replaced by a smaller copy, or its EXIF orientation was applied, its boxes would
    be at wrong places in training and evaluation.

    Required Keys:

    - img
    - img_path (optional, for the error)
    - height, width (optional; without them, as in inference, nothing is checked)
    """

    def transform(self, results: dict) -> Optional[dict]:
        """Return ``results`` unchanged.

        Raises:
            ImageSizeError: With the file and both sizes.
        """
        stated = results.get('width'), results.get('height')
        if None in stated:
            return results
        height, width = results['img'].shape[:2]
        if (width, height) == stated:
            return results
        cause = ''
        if (height, width) == stated:
            cause = (
                ' If its EXIF orientation was applied, and the boxes are drawn on the '
                'image as it is stored, set '
                "color_type='color_ignore_orientation' in LoadImageFromFile."
            )
        raise ImageSizeError(
            f'{results.get("img_path", "an image")} is loaded with {width}x{height} '
            f'pixels, but its annotation says {stated[0]}x{stated[1]}, so its boxes '
            f'would be misplaced. Restore the file or correct the annotation.{cause}'
        )

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'
