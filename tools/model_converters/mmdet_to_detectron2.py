"""Convert a ResT Mask R-CNN or RetinaNet of mmdet for detectron2.

The pixel statistics are no part of a checkpoint: a model of the 1x configs takes
RGB with ImageNet's mean and standard deviation, so in detectron2 set
INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD accordingly.
"""

import sys

from mmrest.converters import cli, convert_to_detectron2


def main() -> int:
    args = cli.parser(__doc__).parse_args()
    return cli.run(args, lambda: convert_to_detectron2(args.src), to_mmdet=False)


if __name__ == '__main__':
    sys.exit(main())
