"""Convert a published ResT Mask R-CNN or RetinaNet (detectron2) for mmdet."""

import sys

from mmrest.converters import cli, convert_to_mmdet


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        help="class names in the order of the classification layer [COCO's 80]",
    )
    args = parser.parse_args()
    return cli.run(
        args, lambda: convert_to_mmdet(args.src, args.classes), to_mmdet=True
    )


if __name__ == '__main__':
    sys.exit(main())
