"""Export a trained model to a file of ONNX, OpenVINO or PyTorch's export."""

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from mmrest import launch
from mmrest.checkpoint import (
    PublishedClassifierHook,
    check_content,
    read_checkpoint,
)
from mmrest.deployment.preprocessing import ExportError
from mmrest.utils.config_types import find_toolbox

sys.path.insert(0, str(Path(__file__).parent))
from run_exported import ExportedModel, read_picture, resize  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    launch.add_config_arguments(parser)
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    parser.add_argument('out', help='file to write: NAME.onnx, NAME.xml or NAME.pt2')
    parser.add_argument(
        '--verify',
        nargs='+',
        metavar='IMAGE',
        help='pictures for comparing the file with PyTorch, in three sizes each '
        '[a drawn one]',
    )
    parser.add_argument(
        '--no-verify', action='store_true', help='write the file without comparing'
    )
    parser.add_argument(
        '--masks',
        choices=('image', 'box'),
        default='image',
        help="masks of a Mask R-CNN: 'image', in the size of the picture, or 'box', "
        'probabilities within each box (28x28) [image]',
    )
    parser.add_argument('--opset', type=int, help="version of ONNX's operators [20]")
    parser.add_argument(
        '--force', action='store_true', help='replace the file if it exists'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.short_errors('tools/deployment/export.py'):
        try:
            export(args)
        except OSError as error:  # of a picture or of the file
            raise ExportError(str(error)) from error


def export(args: argparse.Namespace) -> None:
    cfg = launch.load_config(args.config, args.cfg_options)
    toolbox = find_toolbox(cfg)
    init_default_scope(toolbox or 'mmengine')
    from mmrest.deployment import export as deployment
    from mmrest.deployment.verification import draw_picture, verify

    path = Path(args.out)
    deployment.check_format(path, verify=not args.no_verify)
    if path.exists() and not args.force:
        raise ExportError(f'{path} exists; give --force to replace it')
    pictures = [read_picture(name) for name in args.verify or ()]

    model = MODELS.build(cfg.model).eval()
    checkpoint = read_checkpoint(args.checkpoint)
    if toolbox == 'mmpretrain':
        PublishedClassifierHook().after_load_checkpoint(None, checkpoint)
    check_content(model, checkpoint, args.checkpoint)
    _load_checkpoint_to_model(model, checkpoint)
    module = deployment.exportable(copy.deepcopy(model), args.masks == 'image')
    metadata = deployment.describe(module, cfg, checkpoint, Path(args.config).name)
    with deployment.staged(path) as temporary:
        program = deployment.capture(module)
        deployment.write(program, temporary, metadata, args.opset)
        if not args.no_verify:
            module.model = model  # without merged BatchNorms
            to_size = partial(resize, pipeline=metadata['pipeline'])
            is_archive = path.suffix == '.pt2'
            kind = deployment.ExportedProgram if is_archive else ExportedModel
            pictures = pictures or [draw_picture()]
            print(verify(kind(temporary).run, module, pictures, to_size))
    print(f'written to {path}')


if __name__ == '__main__':
    main()
