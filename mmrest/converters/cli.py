"""Command lines of the converters."""

import argparse
import sys
from pathlib import Path
from typing import Any, Callable

from mmrest.checkpoint import CheckpointError

from .detectron2 import Conversion, ConversionError
from .files import check_destination, save


def parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments of all converters."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument('src', help='checkpoint to convert; it is never changed')
    result.add_argument(
        'dst', nargs='?', help='file to write (not needed with --dry-run)'
    )
    result.add_argument(
        '--dry-run', action='store_true', help='print the mapping and write nothing'
    )
    result.add_argument(
        '--force', action='store_true', help='replace the output if it exists'
    )
    return result


def mapping_lines(conversion: Conversion, to_mmdet: bool) -> list[str]:
    """Return a line for each tensor: names, shape, and how it is changed."""
    lines = []
    for entry in conversion.entries:
        names = (entry.detectron2, entry.mmdet)
        source, target = names if to_mmdet else names[::-1]
        note = '  (anchors reordered)' if entry.anchor_order else ''
        if entry.detectron2 in conversion.added:
            note = '  (not in the source, 0)' if to_mmdet else '  (left out again)'
        lines.append(f'{source} -> {target}  {tuple(entry.shape)}{note}')
    for name in conversion.constants:
        lines.append(f'{name}: no weight, kept in the meta of the mmdet checkpoint')
    return lines


def error_line(source: str, error: Exception) -> str:
    """A message that names the file that is read, once."""
    text = str(error)
    return f'error: {text}' if source in text else f'error: {source}: {text}'


OTHER_FORMATS = ('.pkl', '.safetensors', '.pdparams', '.onnx')


def run(
    args: argparse.Namespace,
    convert: Callable[[], tuple[Conversion, dict[str, Any]]],
    to_mmdet: bool,
) -> int:
    """Convert and write, or print the mapping, and return the exit status.

    ``convert`` returns the conversion and the checkpoint to save. Errors are printed in
    one message.
    """
    try:
        if not args.dry_run:
            if args.dst is None:
                raise ConversionError('name the file to write, or use --dry-run')
            check_destination(args.dst, args.src, args.force)
            if Path(args.dst).suffix in OTHER_FORMATS:  # readers go by the name
                raise ConversionError(
                    f'{args.dst}: the file is written by torch.save; name it .pth'
                )
        conversion, checkpoint = convert()
        if args.dry_run:
            print('\n'.join(mapping_lines(conversion, to_mmdet)))
        else:
            save(checkpoint, args.dst)
    except (CheckpointError, ConversionError, OSError) as error:
        print(error_line(args.src, error), file=sys.stderr)
        return 1
    count = len(conversion.state_dict)
    done = 'would be written' if args.dry_run else f'written to {args.dst}'
    print(f'{conversion.detector}: {count} tensors {done}')
    if to_mmdet:
        print(f'config: configs/{checkpoint["meta"]["config"]}')
    return 0
