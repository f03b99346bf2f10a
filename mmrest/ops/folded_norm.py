"""A convolution and its BatchNorm in one pass, for inference on CPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fast_path import is_plain, is_watched


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: Any) -> Tensor:
    """Compute ``norm(conv(x))`` for a map of shape (B, C, H, W).

    A BatchNorm in evaluation mode multiplies each channel by a constant and adds
    another. They are folded into the convolution if no gradients are recorded and
    nothing depends on calls of the layers, see :mod:`mmrest.ops.fast_path`. On GPUs the
    layers are called: to start the kernels that fold would take longer than the norm.
    """
    if not _may_be_folded(x, conv, norm):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(
        x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _may_be_folded(x: Tensor, conv: nn.Conv2d, norm: Any) -> bool:
    return (
        x.device.type == 'cpu'
        and not torch.is_grad_enabled()
        and not is_watched(x)
        and is_plain(conv, nn.Conv2d)
        and conv.padding_mode == 'zeros'
        and is_plain(norm, nn.BatchNorm2d)
        and not norm.training
        and norm.affine
        and norm.track_running_stats
        and conv.weight.dtype == norm.weight.dtype
    )
