"""Stems: from the image to the map of stage 1, a quarter of its height and width.

An image of shape (B, in_channels, H, W), of any size, becomes a map of shape
(B, dim, ceil(H / 4), ceil(W / 4)), which goes through the positional encoding
``pos``.
"""

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from .parts import STEMS


@STEMS.register_module('rest')
class ResTStem(nn.Module):
    """Three 3x3 convolutions with strides 2, 1, 2, that of the published models."""

    def __init__(
        self, in_channels: int, dim: int, norm_cfg: dict, pos: nn.Module
    ) -> None:
        super().__init__()
        mid = dim // 2
        self.conv1 = nn.Conv2d(in_channels, mid, 3, stride=2, padding=1, bias=False)
        self.norm1 = build_norm_layer(norm_cfg, mid)[1]
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=1, padding=1, bias=False)
        self.norm2 = build_norm_layer(norm_cfg, mid)[1]
        self.conv3 = nn.Conv2d(mid, dim, 3, stride=2, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.pos = pos

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        return self.pos(self.conv3(x))


@STEMS.register_module('resnet')
class ResNetStem(nn.Module):
    """A 7x7 convolution and a max-pooling, with stride 2 each, as in ResNet."""

    def __init__(
        self, in_channels: int, dim: int, norm_cfg: dict, pos: nn.Module
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, dim, 7, stride=2, padding=3, bias=False)
        self.norm = build_norm_layer(norm_cfg, dim)[1]
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.pos = pos

    def forward(self, x: Tensor) -> Tensor:
        return self.pos(self.pool(self.act(self.norm(self.conv(x)))))


@STEMS.register_module('patch')
class PatchStem(nn.Module):
    """One linear layer for each patch of 4x4 pixels and a LayerNorm, as in PVT.

    The image is padded with zeros at its right and lower edge to whole patches.
    ``norm_cfg`` has no effect.
    """

    patch = 4

    def __init__(
        self, in_channels: int, dim: int, norm_cfg: dict, pos: nn.Module
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, self.patch, stride=self.patch)
        self.norm = nn.LayerNorm(dim)
        self.pos = pos

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        # B, C, H, W -> B, H, W, C -> B, C, H, W
        x = self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.pos(x)
