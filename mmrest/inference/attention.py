"""The attention of a point in an image, in each stage and head of ResT.

A query has one row in the map of each head, ``softmax(scale * q k^T)``, which ResT
mixes over the heads. It is computed from the queries and keys of a normal forward pass,
as a product of a vector and a matrix. The InstanceNorm of ResT turns the row p into
``(p - 1/M) r``, with one number r for the whole N x M map of a head. It does not need
the map either: r is the ratio between the output of the query, which the forward pass
has computed, and ``p v - mean(v)``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ..models.base import BaseResT
from ..models.rest import PixelAttention, Size
from .inferencer import InferenceError, Inferencer


class StageAttention(NamedTuple):
    """The attention of a point in one stage."""

    stage: int  # 1 to 4
    size: Size  # height and width of the stage's map
    cell: tuple[int, int]  # row and column of the point in it
    key_stride: int  # pixels of the input per key
    # of shape (h, H_k, W_k): attention of each head to each key, with sum 1
    rows: np.ndarray
    # of shape (h,): the number r of the InstanceNorm; 0 if the row is uniform; None if
    # the attention has no norm
    gains: Optional[np.ndarray]
    # of shape (H, W): the sigmoid of the pixel attention, averaged over the channels;
    # None for other positional encodings
    gates: Optional[np.ndarray]
    # of shape (H, W): the Euclidean norm of each token after the stage
    features: np.ndarray

    def normalised(self) -> np.ndarray:
        """Return the factors of the values: ``(p - 1/M) r``, or p without norm."""
        if self.gains is None:
            return self.rows
        keys = self.rows[0].size
        return (self.rows - 1 / keys) * self.gains[:, None, None]


class PointAttention(NamedTuple):
    """The attention of a point in an image."""

    view: np.ndarray  # the part of the image in the input, of shape (H, W, 3), BGR
    point: tuple[int, int]  # the point in it, x and y
    stages: list[StageAttention]


def attend(
    inferencer: Inferencer, image: np.ndarray, x: int, y: int, block: int = -1
) -> PointAttention:
    """Compute the attention of a point in an image.

    Args:
        inferencer (Inferencer): Of a model with a ResT or ResTV2.
        image (ndarray): Of shape (H, W, 3), BGR, uint8, of any size.
        x (int): Column of the point, in pixels of the image.
        y (int): Row of the point.
        block (int): Index of the block in each stage; -1 is the last. Default: -1.

    Raises:
        InferenceError: If the point is outside the network's input, the model has no
            ResT, or a stage has no such block.
    """
    batch = inferencer.preprocess([image])
    (sample,) = batch['data_samples']
    shape, scale = sample.img_shape[:2], sample.get('scale_factor')
    if scale is None:
        scale = shape[1] / image.shape[1], shape[0] / image.shape[0]
    inputs = inferencer.model.data_preprocessor(batch, False)['inputs']
    view, left, top = _view(image, scale[:2], shape)
    point = int(x * scale[0]) - left, int(y * scale[1]) - top
    inside = 0 <= point[0] < view.shape[1] and 0 <= point[1] < view.shape[0]
    if not inside or not (0 <= x < image.shape[1] and 0 <= y < image.shape[0]):
        raise InferenceError(
            f'the point {x}, {y} is outside of what the network sees of the image of '
            f'{image.shape[1]}x{image.shape[0]} pixels.'
        )
    stages = attend_in_network(inferencer.model, inputs, *point, block=block)
    return PointAttention(view, point, stages)


def _view(
    image: np.ndarray, scale: tuple[float, float], shape: Size
) -> tuple[np.ndarray, int, int]:
    """Resize and crop the centre, as pipelines do; also return the offset."""
    width = max(shape[1], round(image.shape[1] * scale[0]))
    height = max(shape[0], round(image.shape[0] * scale[1]))
    left, top = round((width - shape[1]) / 2), round((height - shape[0]) / 2)
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    view = resized[top : top + shape[0], left : left + shape[1]]
    return np.ascontiguousarray(view), left, top


def attend_in_network(
    model: nn.Module, inputs: Tensor, x: int, y: int, block: int = -1
) -> list[StageAttention]:
    """Compute the attention of a point in a network's input.

    Args:
        model (nn.Module): A model with a ResT or ResTV2, in evaluation mode.
        inputs (Tensor): Normalised, of shape (1, C, H, W).
        x (int): Column of the point, in pixels of the input.
        y (int): Row of the point.
        block (int): Index of the block in each stage. Default: -1.

    Returns:
        list[StageAttention]: For each stage of the model.

    Raises:
        InferenceError: As :func:`attend`.
    """
    backbone = next((m for m in model.modules() if isinstance(m, BaseResT)), None)
    if backbone is None:
        raise InferenceError(
            f'{type(model).__name__} has neither ResT nor ResTV2, whose attention is '
            'shown here.'
        )
    probes = [_Probe(backbone, i, block) for i in range(backbone.num_stages)]
    with torch.no_grad(), _hooks(probes):
        backbone(inputs)
        return [probe.look(x, y) for probe in probes]


class _Probe:
    """Records inputs and outputs of the layers of a stage."""

    def __init__(self, backbone: BaseResT, index: int, block: int) -> None:
        self.index = index
        self.stage = backbone.stage(index)
        if not -len(self.stage) <= block < len(self.stage):
            raise InferenceError(
                f'stage {index + 1} has {len(self.stage)} blocks, so there is no block '
                f'{block}.'
            )
        self.attn: Any = self.stage[block].attn
        if not all(hasattr(self.attn, name) for name in ('q', 'kv', 'proj')):
            raise InferenceError(
                f'{type(self.attn).__name__} has no layers q, kv and proj, from which '
                'its maps could be computed.'
            )
        self.pos = getattr(backbone.embedding(index), 'pos', None)
        self.seen: dict[str, Any] = {}

    def handles(self) -> Iterator[Any]:
        yield self.stage.register_forward_hook(self._see_stage)
        for name in ('q', 'kv'):
            yield getattr(self.attn, name).register_forward_hook(self._see(name))
        yield self.attn.proj.register_forward_pre_hook(
            lambda module, args: self.seen.update(out=args[0])
        )
        if isinstance(self.pos, PixelAttention):
            yield self.pos.pa_conv.register_forward_hook(self._see('gate'))

    def _see(self, name: str) -> Any:
        return lambda module, args, output: self.seen.update({name: output})

    def _see_stage(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen.update(features=output, size=args[1])

    def look(self, x: int, y: int) -> StageAttention:
        """Compute the rows of a point."""
        attn, size = self.attn, self.seen['size']
        stride = 4 * 2**self.index
        cell = min(y // stride, size[0] - 1), min(x // stride, size[1] - 1)
        query = cell[0] * size[1] + cell[1]
        # h, d; h, M, d; h, M, d
        q = self._heads(self.seen['q'][0, query : query + 1])[:, 0]
        k, v = (self._heads(part) for part in self.seen['kv'][0].chunk(2, dim=-1))
        # h, M
        scores = attn.scale * torch.einsum('hd,hmd->hm', q, k)
        mix = getattr(attn, 'transform_conv', getattr(attn, 'mix_conv', None))
        if mix is not None:
            # 1, h, 1, M
            kind = next(mix.parameters()).dtype
            scores = mix(scores[None, :, None].to(kind))[0, :, 0].to(q.dtype)
        rows = scores.softmax(dim=-1)
        gains = None
        if hasattr(attn, 'transform_conv'):  # with it, there is a norm
            out = self._heads(self.seen['out'][0, query : query + 1])[:, 0]
            gains = _gains(rows, v, out)
        grid = [-(-side // attn.sr_ratio) for side in size]
        gates = self.seen.get('gate')
        return StageAttention(
            self.index + 1,
            size,
            cell,
            stride * attn.sr_ratio,
            rows.unflatten(1, grid).cpu().numpy(),
            gains,
            None if gates is None else gates[0].float().sigmoid().mean(0).cpu().numpy(),
            self.seen['features'][0].float().norm(dim=-1).reshape(size).cpu().numpy(),
        )

    def _heads(self, x: Tensor) -> Tensor:
        """N, C -> h, N, d, in at least float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.unflatten(-1, (self.attn.num_heads, -1)).transpose(0, 1)


def _gains(rows: Tensor, v: Tensor, out: Tensor) -> np.ndarray:
    """The number r of each head in ``out = r (p v - mean(v))``."""
    plain = torch.einsum('hm,hmd->hd', rows - 1 / rows.shape[1], v)
    square = (plain * plain).sum(-1)
    gains = (out * plain).sum(-1) / square
    return torch.where(square > 0, gains, torch.zeros_like(gains)).cpu().numpy()


@contextmanager
def _hooks(probes: list[_Probe]) -> Iterator[None]:
    handles = [handle for probe in probes for handle in probe.handles()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
