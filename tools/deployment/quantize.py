"""Quantise an exported .onnx file to 8 bits, with pictures for calibration."""

import argparse
import sys
from pathlib import Path

from PIL import Image

from mmrest import launch
from mmrest.deployment.preprocessing import ExportError

sys.path.insert(0, str(Path(__file__).parent))
from run_exported import ExportedModel, read_picture  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', help='NAME.onnx from tools/deployment/export.py')
    parser.add_argument(
        'out', help='file to write: NAME.onnx, or NAME.xml for OpenVINO'
    )
    parser.add_argument(
        '--images',
        required=True,
        metavar='FOLDER',
        help='pictures of the task, such as training data',
    )
    parser.add_argument(
        '--limit',
        type=int,
        default=100,
        metavar='N',
        help='largest number of pictures [100]',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace the file if it exists'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.short_errors('tools/deployment/quantize.py'):
        try:
            quantize(args)
        except (ValueError, OSError) as error:  # of a picture or of the file
            raise ExportError(str(error)) from error


def quantize(args: argparse.Namespace) -> None:
    from mmrest.deployment.export import check_packages, staged

    source, target = Path(args.file), Path(args.out)
    if source.suffix != '.onnx' or target.suffix not in ('.onnx', '.xml'):
        raise ExportError(
            'the file must end in .onnx, and the new one in .onnx or .xml; found '
            f'{source.name!r} and {target.name!r}'
        )
    needed = ('onnx', 'onnxruntime', *['openvino'] * (target.suffix == '.xml'))
    check_packages(needed, 'a file of 8 bits')
    if target.exists() and not args.force:
        raise ExportError(f'{target} exists; give --force to replace it')
    from mmrest.deployment.quantization import describe_differences
    from mmrest.deployment.quantization import quantize as to_8_bits

    model = ExportedModel(source)
    pictures = find_pictures(Path(args.images), args.limit)
    with staged(target) as temporary:
        names = model.metadata['inputs']
        prepared = (model.prepare(read_picture(path)) for path in pictures)
        inputs = ({name: given[name] for name in names} for given in prepared)
        to_8_bits(source, temporary, inputs)
        new = ExportedModel(temporary)
        results = []
        for path in pictures:
            picture = read_picture(path)
            results.append((new(picture), model(picture)))
    weights = target.with_suffix('.bin' if target.suffix == '.xml' else '.onnx')
    sizes = [path.stat().st_size / 1e6 for path in (source, weights)]
    print(f'{sizes[0]:.1f} MB reduced to {sizes[1]:.1f} MB')
    differences = describe_differences(model.metadata['task'], results)
    print(f'on the {len(pictures)} pictures for calibration: {differences}')
    print(f'written to {target}')


def find_pictures(folder: Path, limit: int) -> list[Path]:
    """Return the first pictures of a folder, by name."""
    if limit < 1:
        raise ExportError(f'--limit must be 1 or more, found {limit}')
    endings = Image.registered_extensions()
    found = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in endings]
    if not found:
        raise ExportError(f'{folder} holds no pictures')
    return found[:limit]


if __name__ == '__main__':
    main()
