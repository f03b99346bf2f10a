"""What operators of an exported program are in ONNX.

Attention is a loop over tiles of queries, as in :mod:`mmrest.ops.tiled`: no attention
map is stored. The other operators are ONNX's own.
"""

# onnxscript compiles what looks like Python here
# mypy: ignore-errors

from typing import Any, Callable, Optional

import torch
from onnxscript import BOOL, FLOAT, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from ..ops.tiled import CPU_TILE_BYTES, MIN_ROWS
from . import operators

# Operators of opset 18, for which PyTorch's own translations are written too.
_DOMAIN = Opset('mmrest', 1)

# A loop's body gets everything as an argument and hands it on, since OpenVINO's bodies
# see nothing of what is around them.


@script(_DOMAIN, default_opset=op)
def _interacting_tiles(
    tiles: FLOAT[...], keys: FLOAT[...], values: FLOAT[...], weight: FLOAT[...]
) -> tuple[FLOAT[...], FLOAT[...]]:
    """Maps minus their mean times values, and the sums of the squares of the maps.

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
        # rows of zeros, which fill the last tile, add nothing
        centred = op.Sub(attn, average)
        # in two steps: the sum over a whole tile loses digits
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
    """Scaled queries (B, h, N, d) as tiles, with rows of zeros at the end of the last.

    The tiles are as large as those of :func:`mmrest.ops.tiled.choose_tile`.
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
    """Tiles as (B, h, N, d), without the rows that were added."""
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
        image = op.Mul(index, _ints(0))  # there is one
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
    # one more than there are: ONNX Runtime cannot loop over none
    masks = op.Pad(masks, _ints(0, 0, 0, 1, 0, 0))
    boxes = op.Pad(boxes, _ints(0, 0, 1, 0))
    limit = op.Constant(value_float=threshold)
    pasted = _paste(masks, boxes, rows, columns, limit)
    return op.Slice(pasted, _ints(0), _ints(-1), _ints(0))


def _adaptive_avg_pool2d(x: Any, output_size: Any) -> Any:
    """Means of cells of unequal size: a product with weights for either axis."""

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
    """The ``custom_translation_table`` of :func:`torch.onnx.export`."""
    aten, mmrest = torch.ops.aten, torch.ops.mmrest
    return {
        aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
        aten.scaled_dot_product_attention.default: _attention,
        mmrest.head_interaction_attention.default: _head_interaction_attention,
        operators.nms._opoverload: _nms,
        operators.pyramid_roi_align._opoverload: _pyramid_roi_align,
        operators.paste_masks._opoverload: _paste_masks,
    }
