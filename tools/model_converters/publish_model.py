"""Strip a checkpoint to weights and meta, and append its hash to its name."""

import argparse
import sys

from mmrest.checkpoint import CheckpointError
from mmrest.converters import ConversionError, publish
from mmrest.converters.cli import error_line
from mmrest.converters.files import FORMATS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('in_file', help='checkpoint of a training run')
    parser.add_argument(
        'out_file', help='x.pth is written as x-<8 digits of the SHA-256>.pth'
    )
    parser.add_argument(
        '--format',
        choices=FORMATS,
        help='format of the file [as OUT_FILE ends, else pth]',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace the output if it exists'
    )
    args = parser.parse_args()
    try:
        path = publish(args.in_file, args.out_file, args.force, args.format)
    except (CheckpointError, ConversionError, OSError) as error:
        print(error_line(args.in_file, error), file=sys.stderr)
        return 1
    print(f'written to {path}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
