"""A local page with the predictions for a picture, and the attention behind them.

It only serves this machine and needs no network.
"""

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# before gradio is imported, so that it does not use the network
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
os.environ['HF_HUB_OFFLINE'] = '1'
# Waiting threads must not take the cores from the server.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

# ruff: noqa: E402
from mmrest import launch
from mmrest.inference import InferenceError, init_inferencer

HOST = '127.0.0.1'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--checkpoint',
        help='path of a checkpoint [the newest of make demo, in work_dirs/demo]',
    )
    parser.add_argument(
        '--config', help='its config [the one in the folder of the checkpoint]'
    )
    parser.add_argument('--compare', metavar='CHECKPOINT', help='a second checkpoint')
    parser.add_argument(
        '--compare-config', metavar='CONFIG', help='its config, if it has another'
    )
    parser.add_argument('--device', help='such as cpu or cuda:0 [a GPU if there is]')
    parser.add_argument('--port', type=int, default=7860, help='[7860]')
    parser.add_argument(
        '--max-megapixels', type=float, default=25, help='limit of a picture [25]'
    )
    return parser.parse_args()


def find_demo(work_dir: str = 'work_dirs/demo') -> str:
    """Return the newest checkpoint of `make demo`."""
    runs = sorted(Path(work_dir).glob('*/iter_*.pth'), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise InferenceError(
            f'no checkpoint in {work_dir}. Run make demo first, or name one: make page '
            'CHECKPOINT=epoch_12.pth CONFIG=my_config.py'
        )
    return str(runs[-1])


def find_config(checkpoint: str) -> str:
    """Return the config in the folder of a checkpoint, written by MMEngine's Runner."""
    configs = sorted(Path(checkpoint).parent.glob('*.py'))
    if len(configs) != 1:
        raise InferenceError(
            f'{len(configs)} configs (*.py) are next to {checkpoint}; name the one '
            'that it was trained with: CONFIG=my_config.py'
        )
    return str(configs[0])


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InferenceError(
                f'port {port} cannot be used ({getattr(error, "strerror", error)}). '
                'Name another one: make page PAGE_PORT=7861'
            ) from error


def import_interface() -> Callable:
    """Import gradio, which takes seconds, after the other checks."""
    try:
        from interface import build
    except ImportError as error:
        raise InferenceError(
            f'{error}. The page needs gradio: pip install -r requirements/page.txt'
        ) from error
    return build


def main() -> None:
    args = parse_args()
    with launch.short_errors('projects/page/page.py'):
        check_port(args.port)
        first = args.checkpoint or find_demo()
        config = args.config or find_config(first)
        pairs = [(first, config)]
        if args.compare:
            pairs.append((args.compare, args.compare_config or config))
        models = {}
        for checkpoint, config in pairs:
            name = checkpoint if checkpoint not in models else f'{checkpoint} (2)'
            models[name] = init_inferencer(config, checkpoint, args.device)
        build = import_interface()
    with tempfile.TemporaryDirectory(prefix='mmrest_page_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        page, options = build(models, args.max_megapixels, Path(folder))
        page.launch(
            server_name=HOST, server_port=args.port, prevent_thread_lock=True, **options
        )
        print(f'http://{HOST}:{args.port} (Ctrl-C ends it)', flush=True)
        page.block_thread()


if __name__ == '__main__':
    sys.exit(main())
