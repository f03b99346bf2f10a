"""Translations of an exported program's operators to ONNX.

Attention is a loop over tiles of queries, as in :mod:`mmrest.ops.tiled`, which stores
no attention maps. The other translations use ONNX's own operators.
"""

# onnxscript compiles these functions
# mypy: ignore-errors

from typing import Any, Callable, Optional

import torch
from onnxscript import BOOL, FLOAT, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from ..ops.tiled import CPU_TILE_BYTES, MIN_ROWS
from . import operators

# Opset 18 is also that of PyTorch's own translations
_DOMAIN = Opset('mmrest', 1)

# The body of a loop receives all values as arguments and returns them, since OpenVINO
# does not support outer values.


@script(_DOMAIN, default_opset=op)
def _interacting_tiles(
    tiles: FLOAT[...], keys: FLOAT[...], values: FLOAT[...], weight: FLOAT[...]
) -> tuple[FLOAT[...], FLOAT[...]]:
    """Multiply maps, minus their mean, with values, and sum the squares of the maps.

    ``tiles`` are scaled queries of shape (tiles, B, h, rows, d), ``keys`` have the
    shape (B, h, d, M), ``values`` (B, h, M, d).
    """
    mean = op.Reciprocal(op.CastLike(op.Shape(values, start=2, end=3), values))
    shape = op.Concat(op.Shape(values, start=0, end=2), [1, 1], axis=0)
    zeros = op.Expand(op.CastLike(0.0, values), shape)

    @graph()
    def body(
        total: FLOAT[...],
        k: FLOAT[...],
        v: FLOAT[...],
        mix: FLOAT[...],
        average: FLOAT[...],
        q: FLOAT[...],
    ):
        # B, h, rows, M
        scores = op.MatMul(q, k)
        mixed = op.MatMul(mix, op.Reshape(scores, [0, 0, -1]))
        attn = op.Softmax(op.Reshape(mixed, op.Shape(scores)), axis=-1)
        # rows of padding in the last tile add nothing
        centred = op.Sub(attn, average)
        # in two steps, since one sum over a whole tile loses precision
        squares = op.ReduceSumSquare(centred, [3], keepdims=1)
        new_total = op.Add(total, op.ReduceSum(squares, [2], keepdims=1))
        return (
            new_total,
            op.Identity(k),
            op.Identity(v),
            op.Identity(mix),
            op.Identity(average),
            op.MatMul(centred, v),
        )

    total, _k, _v, _mix, _average, products = op.Scan(
        zeros, keys, values, weight, mean, tiles, body=body, num_scan_inputs=1
    )
    return products, total


@script(_DOMAIN, default_opset=op)
def _plain_tiles(tiles: FLOAT[...], keys: FLOAT[...], values: FLOAT[...]) -> FLOAT[...]:
    """``softmax(tiles @ keys) @ values``; shapes as above."""

    @graph()
    def body(k: FLOAT[...], v: FLOAT[...], q: FLOAT[...]):
        attn = op.Softmax(op.MatMul(q, k), axis=-1)
        return op.Identity(k), op.Identity(v), op.MatMul(attn, v)

    _k, _v, products = op.Scan(keys, values, tiles, body=body, num_scan_inputs=1)
    return products


@script(_DOMAIN, default_opset=op)
def _paste(
    masks: FLOAT[...],
    boxes: FLOAT[...],
    rows: FLOAT[...],
    columns: FLOAT[...],
    threshold: FLOAT[...],
) -> BOOL[...]:
    """See :func:`mmrest.deployment.operators.paste_masks`; one mask at a time."""
    side = op.Shape(masks, start=2, end=3)
    count = op.CastLike(side, masks)
    cells = op.Add(op.CastLike(op.Range(0, op.Squeeze(side), 1), masks), 0.5)

    @graph()
    def body(
        y: FLOAT[...],
        x: FLOAT[...],
        c: FLOAT[...],
        n: FLOAT[...],
        t: FLOAT[...],
        mask: FLOAT[...],
        box: FLOAT[...],
    ):
        x1, y1, x2, y2 = op.Split(box, num_outputs=4, axis=0)
        down = op.Mul(op.Div(op.Sub(y, y1), op.Sub(y2, y1)), n)
        along = op.Mul(op.Div(op.Sub(x, x1), op.Sub(x2, x1)), n)
        # H, S and W, S
        vertical = op.Relu(1.0 - op.Abs(op.Sub(op.Unsqueeze(down, [1]), c)))
        horizontal = op.Relu(1.0 - op.Abs(op.Sub(op.Unsqueeze(along, [1]), c)))
        product = op.MatMul(op.MatMul(vertical, mask), op.Transpose(horizontal))
        return (
            op.Identity(y),
            op.Identity(x),
            op.Identity(c),
            op.Identity(n),
            op.Identity(t),
            op.GreaterOrEqual(product, t),
        )

    _y, _x, _c, _n, _t, pasted = op.Scan(
        rows, columns, cells, count, threshold, masks, boxes,
        body=body, num_scan_inputs=2,
    )  # fmt: skip
    return pasted


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _cut_into_tiles(q: Any, k: Any, scale: float) -> Any:
    """Scale queries (B, h, N, d) and cut them into tiles, the last padded with zeros.

    The tiles have the size of those of :func:`mmrest.ops.tiled.choose_tile`.
    """
    heads, dim = q.shape[1], q.shape[3]
    count = op.Shape(q, start=2, end=3)
    row_bytes = op.Mul(op.Shape(k, start=2, end=3), _ints(4 * heads))
    rows = op.Max(op.Div(_ints(CPU_TILE_BYTES), row_bytes), _ints(MIN_ROWS))
    num_tiles = _ceil_div(count, rows)
    rows = _ceil_div(count, num_tiles)
    missing = op.Sub(op.Mul(rows, num_tiles), count)
    pads = op.Concat(_ints(0, 0, 0, 0, 0, 0), missing, _ints(0), axis=0)
    q = op.Pad(op.Mul(q, op.Constant(value_float=scale)), pads)
    shape = op.Concat(_ints(0, 0), num_tiles, rows, _ints(dim), axis=0)
    return op.Transpose(op.Reshape(q, shape), perm=[2, 0, 1, 3, 4])


def _join_tiles(products: Any, q: Any) -> Any:
    """Join tiles to (B, h, N, d), without the padding."""
    shape = _ints(0, 0, -1, q.shape[3])
    x = op.Reshape(op.Transpose(products, perm=[1, 2, 0, 3, 4]), shape)
    return op.Slice(x, _ints(0), op.Shape(q, start=2, end=3), _ints(2))


def _ceil_div(a: Any, b: Any) -> Any:
    return op.Div(op.Sub(op.Add(a, b), _ints(1)), b)


def _head_interaction_attention(
    q: Any,
    k: Any,
    v: Any,
    weight: Any,
    bias: Any,
    scale: float,
    eps: float,
    dropout_p: float,
    seed: Any,
    tile_rows: Optional[int],
) -> tuple[Any, Any]:
    keys = op.Transpose(k, perm=[0, 1, 3, 2])
    tiles = _cut_into_tiles(q, k, scale)
    products, total = _interacting_tiles(tiles, keys, v, weight)
    entries = op.Mul(op.Shape(q, start=2, end=3), op.Shape(k, start=2, end=3))
    variance = op.Div(total, op.CastLike(entries, q))
    rstd = op.Reciprocal(op.Sqrt(op.Add(variance, op.Constant(value_float=eps))))
    return op.Mul(_join_tiles(products, q), rstd), rstd


def _attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Any:
    if attn_mask is not None or is_causal or enable_gqa or dropout_p or scale is None:
        raise NotImplementedError('an attention that is not one of ResT')
    keys = op.Transpose(k, perm=[0, 1, 3, 2])
    return _join_tiles(_plain_tiles(_cut_into_tiles(q, k, scale), keys, v), q)


def _nms(boxes: Any, scores: Any, iou_threshold: float, max_boxes: int) -> Any:
    selected = op.NonMaxSuppression(
        op.Unsqueeze(boxes, _ints(0)),
        op.Unsqueeze(scores, _ints(0, 1)),
        _ints(max_boxes),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[-0.5]),
    )
    # image, class, box
    return op.Gather(selected, op.Constant(value_int=2), axis=1)


def _pyramid_roi_align(
    features: Any,
    boxes: Any,
    levels: Any,
    scales: Any,
    size: int,
    sampling_ratio: int,
) -> Any:
    indices, parts = [], []
    for i, (feature, scale) in enumerate(zip(features, scales)):
        at_level = op.NonZero(op.Equal(levels, op.Constant(value_int=i)))
        index = op.Reshape(at_level, _ints(-1))
        image = op.Mul(index, _ints(0))  # all are in image 0
        parts.append(
            op.RoiAlign(
                feature,
                op.Gather(boxes, index),
                image,
                coordinate_transformation_mode='half_pixel',
                output_height=size,
                output_width=size,
                sampling_ratio=sampling_ratio,
                spatial_scale=scale,
            )
        )
        indices.append(index)
    order = op.Concat(*indices, axis=0)
    positions = op.Range(
        op.Constant(value_int=0),
        op.Squeeze(op.Shape(order)),
        op.Constant(value_int=1),
    )
    inverse = op.ScatterElements(order, order, positions)
    return op.Gather(op.Concat(*parts, axis=0), inverse)


def _paste_masks(
    masks: Any, boxes: Any, rows: Any, columns: Any, threshold: float
) -> Any:
    # with an additional one, since ONNX Runtime cannot loop over none
    masks = op.Pad(masks, _ints(0, 0, 0, 1, 0, 0))
    boxes = op.Pad(boxes, _ints(0, 0, 1, 0))
    limit = op.Constant(value_float=threshold)
    pasted = _paste(masks, boxes, rows, columns, limit)
    return op.Slice(pasted, _ints(0), _ints(-1), _ints(0))


def _adaptive_avg_pool2d(x: Any, output_size: Any) -> Any:
    """Average over cells of unequal size, by a product with weights for each axis."""

    def weights(axis: int, cells: int) -> Any:
        side = op.Shape(x, start=axis, end=axis + 1)
        index = op.Constant(value_ints=list(range(cells)))
        start = op.Div(op.Mul(index, side), _ints(cells))
        end = _ceil_div(op.Mul(op.Add(index, _ints(1)), side), _ints(cells))
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        place = op.Range(zero, op.Squeeze(side), one)
        start, end = op.Unsqueeze(start, _ints(1)), op.Unsqueeze(end, _ints(1))
        inside = op.And(op.GreaterOrEqual(place, start), op.Less(place, end))
        return op.Div(op.CastLike(inside, x), op.CastLike(op.Sub(end, start), x))

    rows, columns = weights(2, output_size[0]), weights(3, output_size[1])
    return op.MatMul(rows, op.MatMul(x, op.Transpose(columns, perm=[1, 0])))


def translations() -> dict[Callable, Callable]:
    """Return the ``custom_translation_table`` of :func:`torch.onnx.export`."""
    aten, mmrest = torch.ops.aten, torch.ops.mmrest
    return {
        aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
        aten.scaled_dot_product_attention.default: _attention,
        mmrest.head_interaction_attention.default: _head_interaction_attention,
        operators.nms._opoverload: _nms,
        operators.pyramid_roi_align._opoverload: _pyramid_roi_align,
        operators.paste_masks._opoverload: _paste_masks,
    }
