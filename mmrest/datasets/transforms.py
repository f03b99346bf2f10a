"""Boxes and masks only fit an image of the size that they were drawn on."""

from typing import Optional

from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS


class ImageSizeError(ValueError):
    """An image has another size than its annotation says."""


@TRANSFORMS.register_module()
class CheckImageSize(BaseTransform):
    """Compare a loaded image with the size in its annotation.

    To be put after ``LoadImageFromFile``. MMDetection does not compare the two: an
    image that was replaced by a smaller copy, or whose EXIF orientation the loader
    applied, would be trained on with boxes that lie elsewhere, and be judged so.

    Required Keys:

    - img
    - img_path (optional, named in the error)
    - height, width (optional; without them, as in inference, nothing is checked)
    """

    def transform(self, results: dict) -> Optional[dict]:
        """Return ``results`` as they are.

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
            f'would lie elsewhere. Restore the file or correct the annotation.{cause}'
        )

    def __repr__(self) -> str:
        return f'{type(self).__name__}()'
