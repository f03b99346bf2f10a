"""Positional encodings (section 3.3), each from a map to a map.

Parameters have other names in each variant, so that a checkpoint of another
variant is refused, and does not compute something else in silence.
"""

from collections.abc import Sequence
from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import POSITIONS


def _depthwise3x3(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)


@POSITIONS.register_module('pa')
class PixelAttention(nn.Module):
    """``x * sigmoid(DWConv3x3(x))``, that of the published models."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pa_conv = _depthwise3x3(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pa_conv(x).sigmoid()


@POSITIONS.register_module('gl')
class ResidualDepthwise(nn.Module):
    """``x + DWConv3x3(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gl_conv = _depthwise3x3(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gl_conv(x)


@POSITIONS.register_module('le')
class LearnableEmbedding(nn.Module):
    """``x`` plus a learnable map for images of one size.

    For images of other sizes the map is interpolated (bicubic), and so it is when
    a checkpoint with another grid is loaded.

    Args:
        dim (int): Channels.
        map_stride (int): Pixels of the image from one entry of the map to the next.
        image_size (int | Sequence[int]): Side, or height and width, of the images
            that the map is for. Default: 224.

    Raises:
        ValueError: If ``image_size`` is not one or two positive integers.
    """

    def __init__(
        self, dim: int, map_stride: int, image_size: Union[int, Sequence[int]] = 224
    ) -> None:
        super().__init__()
        sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
            raise ValueError(
                "image_size of the position 'le' must be one or two positive "
                f'integers, found {image_size!r}'
            )
        height, width = (-(-side // map_stride) for side in sides)
        self.pos_embed = nn.Parameter(torch.empty(1, dim, height, width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + _resize(self.pos_embed, x.shape[-2:])

    def adapt_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Interpolate the map in a state dict to the grid of this module.

        Args:
            state_dict (dict[str, Tensor]): Changed in place; a map that lacks, or
                has another number of channels, is left for the loader to report.
            prefix (str): What the names of this module begin with.
        """
        name = f'{prefix}pos_embed'
        found = state_dict.get(name)
        if found is None or not found.is_floating_point() or found.dim() != 4:
            return
        if found.shape[:2] == self.pos_embed.shape[:2]:
            grid = self.pos_embed.shape[-2:]
            state_dict[name] = _resize(found.float(), grid).to(found.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.adapt_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


POSITIONS.register_module('none', module=nn.Identity)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode='bicubic', align_corners=False)
