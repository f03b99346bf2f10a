"""Export of a model to a file of ONNX, OpenVINO or PyTorch's export.

The model is captured once, for images of any size. All formats are made from that
program. PyTorch's archive contains it. For ONNX its operators are translated, and
OpenVINO reads the ONNX file.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.utils import digit_version
from torch import nn
from torch.fx.experimental import _config as shapes

from .. import __version__
from ..checkpoint.atomic import UNFINISHED
from ..utils.config_types import find_type, type_name
from ..utils.text import shorten
from .preprocessing import ExportError

# For each suffix, packages to write a file and to run it
FORMATS = {
    '.onnx': (('onnx', 'onnxscript'), ('onnxruntime',)),
    '.xml': (('onnx', 'onnxscript', 'openvino'), ('openvino',)),
    '.pt2': ((), ()),
}
OLDEST_TORCH = '2.9'  # the first one with programs without guards
OPSET = 20
KEY = 'mmrest'  # of the metadata in a file
# Large enough that no map of a detector has a side of 1
EXAMPLE_SIZE = (352, 480)
# Steps of a test pipeline that precede the exported program
GEOMETRY = ('Resize', 'ResizeEdge', 'CenterCrop')
WAYS = ('bilinear', 'bicubic')


def check_format(path: Path, verify: bool = True) -> None:
    """Check that a file of this name can be written and, to verify it, run.

    Raises:
        ExportError: If the suffix is unknown, or a package is missing or too old.
    """
    if path.suffix not in FORMATS:
        raise ExportError(
            f'the file must end in {", ".join(FORMATS)}, found {path.name!r}'
        )
    if digit_version(torch.__version__) < digit_version(OLDEST_TORCH):
        raise ExportError(
            f'exporting needs torch {OLDEST_TORCH} or later, found {torch.__version__}'
        )
    writing, running = FORMATS[path.suffix]
    check_packages((*writing, *running * verify), path.suffix)


def check_packages(names: Iterable[str], what: str) -> None:
    """Raise an ``ExportError`` if a package is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{what} needs {', '.join(missing)}. Run pip install 'mmrest[deploy]'."
        )


def exportable(model: Any, paste: bool = True) -> nn.Module:
    """Wrap a model of a toolbox as an exportable module.

    Args:
        model (nn.Module): The model with its weights. It is changed: BatchNorms are
            merged into the convolutions before them, and the attention is the default.
        paste (bool): See :class:`mmrest.deployment.detectors.MaskRCNN`.
            Default: True.

    Raises:
        ExportError: If the model or a part of it is not supported.
    """
    model = fuse_conv_bn(model.eval()).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, 'attn_impl'):
            module.attn_impl = 'auto'
    bases = {kind.__name__ for kind in type(model).mro()}
    if 'RetinaNet' in bases:
        from .detectors import RetinaNet

        return RetinaNet(model).eval()
    if bases & {'MaskRCNN', 'FasterRCNN'}:
        from .detectors import MaskRCNN

        return MaskRCNN(model, paste).eval()
    if 'EncoderDecoder' in bases:
        from .segmentors import Segmentor

        return Segmentor(model).eval()
    if 'ImageClassifier' in bases:
        from .classifiers import Classifier

        return Classifier(model).eval()
    raise ExportError(
        'a RetinaNet, Faster R-CNN, Mask R-CNN, EncoderDecoder or ImageClassifier can '
        f'be exported, found {type(model).__name__}'
    )


def capture(module: Any) -> torch.export.ExportedProgram:
    """Record the program of an exportable module, for images of any size."""
    free = torch.export.Dim.DYNAMIC
    batch = 1 + module.has_batch
    inputs = dict(
        image=torch.zeros(batch, *EXAMPLE_SIZE, 3, dtype=torch.uint8),
        size=torch.tensor(EXAMPLE_SIZE),
    )
    dims = dict(image={1: free, 2: free, **({0: free} if batch > 1 else {})}, size=None)
    names = module.input_names
    # maps of small images have sides of 1, with other strides and broadcasting; without
    # this option, PyTorch would exclude them
    patch = shapes.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with patch, torch.no_grad():
        program = torch.export.export(
            module,
            tuple(inputs[name] for name in names),
            dynamic_shapes=tuple(dims[name] for name in names),
            strict=False,
        )
    print_log(describe_attention(program))
    return program


def describe_attention(program: torch.export.ExportedProgram) -> str:
    """Describe how the attention layers of a program are computed."""
    tiled = dense = 0
    for node in program.graph.nodes:
        tiled += 'attention' in str(node.target)
        dense += 'softmax' in str(node.target) and node.meta['val'].dim() == 4
    text = f'attention: {tiled} layers in tiles, which store no map'
    if dense:
        text += (
            f'; {dense} layers store each map, which takes heads x queries x keys x 4 '
            'bytes: 141 MB at 800x1344 in stage 2 of ResT'
        )
    return text


def describe(module: Any, cfg: Config, checkpoint: Any, name: str) -> dict[str, Any]:
    """Return the metadata of a file.

    Args:
        module (nn.Module): The exportable module.
        cfg (Config): The config, with the steps before the preprocessing.
        checkpoint (dict): The content of the checkpoint; its classes have precedence.
        name (str): Name of the config.

    Returns:
        dict[str, Any]: For JSON.
    """
    return dict(
        mmrest=__version__,
        config=name,
        task=module.task,
        inputs=list(module.input_names),
        outputs=list(module.output_names),
        input_format='RGB, uint8, batch x height x width x channels',
        classes=find_classes(cfg, checkpoint, module.num_classes),
        score_threshold=module.score_threshold,
        preprocessing=module.preprocess.describe(),
        pipeline=find_geometry(cfg),
    )


def find_classes(cfg: Config, checkpoint: Any, count: int) -> list[str]:
    """Return class names of the checkpoint, the config, or its type of data set.

    Raises:
        ExportError: If there are names, but not as many as the model has classes.
    """
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    own = (meta or {}).get('dataset_meta') or {}
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    kind = find_type(dataset, DATASETS) if dataset else None
    found = [own, dataset.get('metainfo') or {}, getattr(kind, 'METAINFO', {})]
    lists = [
        list(given.get('classes') or given.get('CLASSES') or ()) for given in found
    ]
    for names in lists:
        if len(names) == count:
            return names
    if any(lists):
        names = next(filter(None, lists))
        raise ExportError(
            f'the model has {count} classes, but the checkpoint or the config names '
            f'{len(names)} ({shorten(names)}). Set '
            'test_dataloader.dataset.metainfo=dict(classes=...) in the config.'
        )
    return [f'class {index}' for index in range(count)]


def find_geometry(cfg: Config) -> list[dict[str, Any]]:
    """Return the steps of the test pipeline that resize or crop images.

    Raises:
        ExportError: If there are steps other than these, loading and packing.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    given = dataset.get('pipeline') or cfg.get('test_pipeline') or []
    steps = [dict(step, type=type_name(step)) for step in given]
    steps = [s for s in steps if not s['type'].startswith(('Load', 'Pack', 'Check'))]
    for step in steps:
        way = step.get('interpolation', 'bilinear')
        needed = 'crop_size' if step['type'] == 'CenterCrop' else 'scale'
        known = step['type'] in GEOMETRY and step.get(needed) is not None
        if not known or way not in WAYS or step.get('edge', 'short') != 'short':
            raise ExportError(
                f'the runner of exported files cannot do the step {step} of the test '
                'pipeline. Replace it in test_dataloader.dataset.pipeline.'
            )
    return steps


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Write a file, and those that belong to it, in a temporary folder next to it.

    Yields:
        Path: The path to write to. When the block ends, all files are moved to their
        places; after an exception none is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(UNFINISHED, f'.{path.name}', path.parent))
    try:
        yield folder / path.name
        for part in sorted(folder.iterdir()):  # OpenVINO's .bin before its .xml
            os.replace(part, path.parent / part.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: dict[str, Any],
    opset: Optional[int] = None,
) -> None:
    """Write a program in the format of the file's suffix.

    Args:
        program (ExportedProgram): From :func:`capture`.
        path (Path): A file with a suffix in ``FORMATS``.
        metadata (dict): From :func:`describe`.
        opset (int, optional): Version of ONNX's operators. Default: 20.

    Raises:
        ExportError: If the opset does not have the operators.
    """
    text = json.dumps(metadata)
    if path.suffix == '.pt2':
        archive = io.BytesIO()
        torch.export.save(program, archive, extra_files={f'{KEY}.json': text})
        path.write_bytes(archive.getvalue())
        return
    content = to_onnx(program, metadata, opset or OPSET, text)
    if path.suffix == '.onnx':
        path.write_bytes(content)
        return
    write_openvino(content, path, text)


def write_openvino(content: bytes, path: Path, text: str) -> None:
    """Write an ONNX file, given as its content, as ``.xml`` with its metadata."""
    import openvino

    model = openvino.Core().read_model(content, b'')
    model.set_rt_info(text, KEY)
    openvino.save_model(model, path, compress_to_fp16=False)


def to_onnx(
    program: torch.export.ExportedProgram,
    metadata: dict[str, Any],
    opset: int,
    text: str,
) -> bytes:
    """Return a program as the content of an ONNX file."""
    import onnxscript.ir

    from .onnx_operators import translations

    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        custom_translation_table=translations(),
        input_names=metadata['inputs'],
        output_names=metadata['outputs'],
        verbose=False,
    )
    assert exported is not None  # without a file name
    model = exported.model
    if model.opset_imports.get('') != opset:
        raise ExportError(
            f'the model cannot be written with opset {opset}. Take another, such as '
            f'--opset {OPSET}.'
        )
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # they contain paths of this machine
    model.metadata_props[KEY] = text
    return onnxscript.ir.to_proto(model).SerializeToString()


class ExportedProgram:
    """A ``.pt2`` file in PyTorch, used like ``ExportedModel`` of tools/deployment.

    Args:
        path (Path): The file.

    Attributes:
        metadata (dict): As in :func:`describe`.
    """

    def __init__(self, path: Path) -> None:
        from . import operators  # noqa: F401, the program calls them

        extra = {f'{KEY}.json': ''}
        program = torch.export.load(path, extra_files=extra)
        self.metadata = json.loads(extra[f'{KEY}.json'])
        # its guards check strides of the example, which do not matter
        self._module = program.module(check_guards=False)

    @torch.no_grad()
    def run(self, image: np.ndarray, size: np.ndarray) -> dict[str, np.ndarray]:
        """Run the program on images (B, H, W, 3), resized from a size."""
        given = dict(image=torch.from_numpy(image), size=torch.from_numpy(size))
        results = self._module(*(given[name] for name in self.metadata['inputs']))
        if isinstance(results, torch.Tensor):  # there is only one
            results = (results,)
        names = self.metadata['outputs']
        return {name: x.numpy() for name, x in zip(names, results)}
