"""Quantisation of exported files: 8-bit convolutions and linear layers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from .export import KEY, write_openvino
from .verification import Arrays

# Attention maps, norms, anchors, NMS, RoIAlign and the pasting of masks stay in float.
LAYERS = ['Conv', 'Gemm', 'MatMul']
SHOWN = 0.3  # lowest score of detections that are compared


class _Reader(CalibrationDataReader):
    def __init__(self, inputs: Iterable[Arrays]) -> None:
        self._rest = iter(inputs)

    def get_next(self) -> Arrays:
        return next(self._rest, None)  # type: ignore[arg-type]


def quantize(source: Path, target: Path, inputs: Iterable[Arrays]) -> None:
    """Quantise the layers with weights in an ``.onnx`` file.

    Weights are scaled per channel and activations per tensor, to their range on the
    inputs.

    Args:
        source (Path): A file from tools/deployment/export.py.
        target (Path): ``.onnx``, or ``.xml`` for OpenVINO.
        inputs (Iterable[dict[str, ndarray]]): Inputs by name, for each image.
    """
    quantized = target.with_suffix('.onnx')
    quantize_static(
        source,
        quantized,
        _Reader(inputs),
        op_types_to_quantize=LAYERS,
        per_channel=True,
        extra_options=dict(MatMulConstBOnly=True),
    )
    if target.suffix == '.xml':
        metadata = {p.key: p.value for p in onnx.load(quantized).metadata_props}
        write_openvino(quantized.read_bytes(), target, metadata[KEY])
        quantized.unlink()


def describe_differences(task: str, results: Sequence[tuple[Arrays, Arrays]]) -> str:
    """Describe how the results of two files differ.

    Args:
        task (str): As in the metadata of the files.
        results (Sequence[tuple[dict, dict]]): For each image, the results of the new
            file and of the old one.
    """
    if task == 'segmentation':
        parts = [(new['labels'] != old['labels']).mean() for new, old in results]
        return f'{np.mean(parts):.2%} of the pixels have another label'
    if task == 'classification':
        parts = [np.abs(new['scores'] - old['scores']).max() for new, old in results]
        same = [
            new['scores'].argmax() == old['scores'].argmax() for new, old in results
        ]
        return (
            f'the best class is the same in {sum(same)} of {len(same)} pictures; '
            f'probabilities differ by up to {max(parts):.3f}'
        )
    count, boxes, scores = 0, [], []
    for new, old in results:
        for box, score, label in zip(old['boxes'], old['scores'], old['labels']):
            if score < SHOWN:
                continue
            count += 1
            index = np.flatnonzero(new['labels'] == label)
            moved = np.abs(new['boxes'][index] - box).max(axis=1, initial=0)
            # at a larger distance it is another object
            if len(index) and moved.min() < (box[2:] - box[:2]).min() / 2:
                boxes.append(moved.min())
                scores.append(abs(new['scores'][index[moved.argmin()]] - score))
    text = (
        f'{len(boxes)} of {count} detections with a score of {SHOWN} or more are left'
    )
    if boxes:
        text += (
            f'; their sides move by {np.median(boxes):.2f} pixel in the median and '
            f'{max(boxes):.2f} at most, scores by {np.median(scores):.4f} and '
            f'{max(scores):.4f}'
        )
    return text
