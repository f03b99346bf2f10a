"""Measure detectors in PyTorch, and their exported files: time and memory.

Each way to run a detector has its own process, with its own imports. Only one of them
works at a time, and their steps alternate. Weights are random. Existing files are used
again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

TOOLS = Path(__file__).resolve().parents[1]
# Suffix of the file, and precision
WAYS = {
    'PyTorch': ('.pth', ''),
    'torch.compile': ('.pth', 'compile'),
    'torch.export': ('.pt2', ''),
    'ONNX Runtime': ('.onnx', 'float32'),
    'ONNX Runtime, 8 bits': ('_8bit.onnx', 'float32'),
    'OpenVINO': ('.xml', 'float32'),
    'OpenVINO, bfloat16': ('.xml', 'bfloat16'),
    'OpenVINO, 8 bits': ('_8bit.xml', 'float32'),
}
# Modules to compile
NETWORKS = (
    'backbone',
    'neck',
    'bbox_head',
    'rpn_head',
    'roi_head.bbox_head',
    'roi_head.mask_head',
)
# On a picture of 352x480
CANDIDATES = 500
PAUSE = 0.3  # seconds until the threads of the other process are idle


def parse_args() -> argparse.Namespace:
    # not at the top, since processes without torch import this file
    from mmrest.utils.text import parse_size

    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('configs', nargs='+', help='configs of detectors')
    add(
        '--shapes',
        nargs='+',
        type=parse_size,
        default=[(320, 416), (800, 1333)],
        metavar='HxW',
        help='[320x416 800x1333]',
    )
    add('--ways', nargs='+', choices=tuple(WAYS), default=list(WAYS))
    add('--repeats', type=int, default=3, metavar='N', help='measured steps [3]')
    add(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/benchmark_exported'),
        help='folder of the files [work_dirs/benchmark_exported]',
    )
    return parser.parse_args()


# ------------------------------------------------- in the other processes

run = None  # of this process


def write_files(config: str, stem: str, ways: Sequence[str]) -> None:
    """Draw weights, and write the checkpoint and missing files."""
    import torch
    from mmengine.config import Config
    from torch import nn

    from mmrest.deployment import export
    from mmrest.deployment.quantization import quantize
    from mmrest.deployment.verification import draw_picture

    paths = {ending: Path(stem + ending) for ending, _ in WAYS.values()}
    missing = {e for e, _ in map(WAYS.get, ways) if not paths[e].exists()}
    if not missing:
        return
    torch.manual_seed(0)
    model = build(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith('backbone'):
            nn.init.kaiming_normal_(parameter)
            # gives the largest number of detections, without scores near 1
            last = any(part in name for part in ('_cls.', '_reg.'))
            parameter.data *= 0.3 if last else 1.0
    if hasattr(model, 'bbox_head'):
        thin_out(model)
    torch.save(model.state_dict(), paths['.pth'])
    if missing == {'.pth'}:
        return
    module = export.exportable(model)
    metadata = export.describe(module, Config.fromfile(config), {}, Path(config).name)
    program = export.capture(module)
    export.write(program, paths['.onnx'], metadata)
    content, text = paths['.onnx'].read_bytes(), json.dumps(metadata)
    export.write_openvino(content, paths['.xml'], text)
    export.write(program, paths['.pt2'], metadata)
    shape = export.EXAMPLE_SIZE
    inputs = [dict(image=draw_picture(shape)[None], size=np.array(shape))]
    quantize(paths['.onnx'], paths['_8bit.onnx'], inputs)
    content = paths['_8bit.onnx'].read_bytes()
    export.write_openvino(content, paths['_8bit.xml'], text)


def thin_out(model: Any) -> None:
    """Make as many scores of a RetinaNet exceed its threshold as of a trained one.

    Otherwise half of them would, and MMDetection sorts all of these.
    """
    import torch

    noise = torch.rand(1, 3, 352, 480) * 4.4 - 2.1
    with torch.no_grad():
        logits = torch.cat([x.flatten() for x in model(noise, mode='tensor')[0]])
        last = logits.topk(CANDIDATES).values[-1]
        threshold = torch.tensor(model.test_cfg.score_thr)
        model.bbox_head.retina_cls.bias += threshold.logit() - last


def build(config: str) -> Any:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    cfg = Config.fromfile(config)
    cfg.model.backbone.init_cfg = None
    return MODELS.build(cfg.model).eval()


def load(way: str, config: str, stem: str) -> None:
    """Set ``run`` of this process, a function of an image and a size."""
    global run
    ending, precision = WAYS[way]
    path = Path(stem + ending)
    if ending == '.pth':
        run = load_model(config, path, precision == 'compile')
    elif ending == '.pt2':
        from mmrest.deployment.export import ExportedProgram

        run = ExportedProgram(path).run
    else:
        sys.path.insert(0, str(TOOLS / 'deployment'))
        from run_exported import ExportedModel

        run = ExportedModel(path, precision=precision).run


def load_model(config: str, checkpoint: Path, compile: bool) -> Callable:
    """Return MMDetection's own inference; if compiled, only of the networks."""
    import copy

    import torch

    from mmrest.deployment.export import exportable

    model = build(config)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    module = exportable(copy.deepcopy(model))
    module.model = model
    if compile:
        for name, part in model.named_modules():
            if name in NETWORKS:
                part.compile(dynamic=False)
    return module.predict


def step(image: np.ndarray) -> tuple[float, int]:
    """Return the seconds of a step, and the number of detections."""
    size = np.array(image.shape[1:3])
    start = time.perf_counter()
    found = run(image, size)
    return time.perf_counter() - start, len(found['boxes'])


def peak_memory() -> int:
    """Return the peak memory of this process, in bytes."""
    lines = Path('/proc/self/status').read_text().splitlines()
    line = next(line for line in lines if line.startswith('VmHWM:'))
    return int(line.split()[1]) * 1024


# ------------------------------------------------- measuring


def start_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context('spawn'))


def measure(config: str, stem: str, args: argparse.Namespace) -> None:
    """Measure a config in all ways, and print a table for each shape."""
    with start_process() as process:
        process.submit(write_files, config, stem, args.ways).result()
    processes = {way: start_process() for way in args.ways}

    def everywhere(function: Callable, *arguments: Any) -> dict[str, Any]:
        futures = {w: p.submit(function, *arguments) for w, p in processes.items()}
        return {way: future.result() for way, future in futures.items()}

    for future in [p.submit(load, w, config, stem) for w, p in processes.items()]:
        future.result()
    rng = np.random.default_rng(0)
    for height, width in args.shapes:
        image = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        counts = {way: count for way, (_, count) in everywhere(step, image).items()}
        memory = everywhere(peak_memory)
        seconds: dict[str, list[float]] = {way: [] for way in processes}
        for _ in range(args.repeats):
            for way, process in processes.items():
                time.sleep(PAUSE)
                seconds[way].append(process.submit(step, image).result()[0])
        print(f'\n{Path(config).parent.name}/{Path(config).stem}, {height}x{width}\n')
        print('| | ms (min - max) | times as fast | peak memory | detections |')
        print('|---|---|---|---|---|')
        first = median(seconds[args.ways[0]])
        for way, values in seconds.items():
            low, high = min(values) * 1e3, max(values) * 1e3
            print(
                f'| {way} | {median(values) * 1e3:.0f} ({low:.0f} - {high:.0f}) '
                f'| {first / median(values):.2f} | {memory[way] / 2**20:.0f} MiB '
                f'| {counts[way]} |',
                flush=True,
            )
    for process in processes.values():
        process.shutdown()


def main() -> None:
    args = parse_args()
    from mmrest import launch
    from mmrest.utils.config_types import find_toolbox

    with launch.short_errors('tools/analysis_tools/benchmark_exported.py'):
        for config in args.configs:
            toolbox = find_toolbox(launch.load_config(config))
            if toolbox != 'mmdet':
                raise launch.LaunchError(f'{config} is no detector, but of {toolbox}')
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for config in args.configs:
        name = f'{Path(config).parent.name}_{Path(config).stem}'
        measure(config, str(args.work_dir / name), args)


if __name__ == '__main__':
    main()
