"""Multiply-accumulate counts, including those of fused attention.

MMEngine's counter traces a model and counts convolutions, linear layers, matrix
products (one multiply-accumulate counts as one), norms and interpolations (elementwise
operations). It does not know PyTorch's fused attention, whose two products are counted
here. mmrest's attention is traced in its dense form. Softmax, activations, sums and
RoIAlign are not counted.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from torch import nn


@dataclass
class Complexity:
    """Counts of one forward pass."""

    shape: tuple[int, int]  # height and width of the padded image
    # multiply-accumulates of the model ('total') and of each of its children
    flops: dict[str, int]
    params: dict[str, int]  # numbers of parameters, likewise


def fused_attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Count ``softmax(q k^T) v``: two matrix products."""
    batch, heads, num_queries, dim = inputs[0].type().sizes()
    num_keys = inputs[1].type().sizes()[2]
    return 2 * batch * heads * num_queries * num_keys * dim


HANDLES: dict[str, Callable] = {
    'aten::scaled_dot_product_attention': fused_attention_flops
}


def _data_samples(shape: tuple[int, int]) -> list:
    from mmdet.structures import DetDataSample

    sizes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    metainfo = dict(dict.fromkeys(sizes, shape), scale_factor=(1.0, 1.0))
    return [DetDataSample(metainfo=metainfo)]


class _Forward(nn.Module):
    """A model whose forward takes only the image, as tracing needs it."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.model = model
        self.kwargs = kwargs

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x, **self.kwargs)


@contextmanager
def _dense_attention(model: nn.Module) -> Iterator[None]:
    """Use the dense attention, since tracing only knows PyTorch's operators."""
    tiled: list[Any] = [
        m for m in model.modules() if getattr(m, 'attn_impl', '') == 'tiled'
    ]
    for module in tiled:
        module.attn_impl = 'dense'
    try:
        yield
    finally:
        for module in tiled:
            module.attn_impl = 'tiled'


def complexity(model: nn.Module, shape: tuple[int, int]) -> Complexity:
    """Count a forward pass of one image, with the channels of its first convolution.

    The heads of a detector process its own proposals for a random image, at most 1,000
    in the box head and 100 in the mask head. The image is padded as by the model's data
    preprocessor.
    """
    model = model.eval()
    preprocessor = getattr(model, 'data_preprocessor', None)
    divisor = getattr(preprocessor, 'pad_size_divisor', 1)
    height, width = (-(-side // divisor) * divisor for side in shape)
    kwargs = {}
    if 'mmdet' in sys.modules:
        from mmdet.models.detectors import BaseDetector

        if isinstance(model, BaseDetector):
            kwargs = dict(data_samples=_data_samples((height, width)), mode='tensor')
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    channels = next((m.in_channels for m in convolutions), 3)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, height, width, generator=generator)
    analyzer = FlopAnalyzer(_Forward(model, **kwargs), (image,))
    analyzer.set_op_handle(**HANDLES)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analyzer.tracer_warnings('none')
    with torch.no_grad(), _dense_attention(model):
        by_module = analyzer.by_module()
    parameters = parameter_count(model)
    names = [name for name, _ in model.named_children() if name in parameters]
    flops = {name: int(by_module[f'model.{name}']) for name in names}
    params = {name: parameters[name] for name in names}
    flops['total'], params['total'] = int(by_module['']), parameters['']
    return Complexity((height, width), flops, params)
