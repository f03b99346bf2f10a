"""Variants of stem, positional encoding and attention in tables 5 to 7 of the paper.

Each variant names its parameters differently, so that loading refuses a checkpoint of
another variant.
"""

from collections.abc import Sequence
from typing import Any, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import attention
from .rest import EMSA, Size
from .utils import depthwise_conv, to_map, to_tokens

# ---------------------------------------------------------------- stems (table 5)


@MODELS.register_module('rest_stem_resnet')
class ResNetStem(nn.Module):
    """The stem of ResNet: a 7x7 convolution and a max-pooling, each with stride 2."""

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


@MODELS.register_module('rest_stem_patch')
class PatchStem(nn.Module):
    """The stem of PVT: a linear layer on patches of 4x4 pixels, and a LayerNorm.

    Zeros pad the right and lower edge of the image to whole patches. ``norm_cfg`` has
    no effect.
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


# ---------------------------------------------------------------- positions (table 6)


@MODELS.register_module('rest_pos_gl')
class ResidualDepthwise(nn.Module):
    """``x + DWConv3x3(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gl_conv = depthwise_conv(dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gl_conv(x)


@MODELS.register_module('rest_pos_le')
class LearnableEmbedding(nn.Module):
    """``x`` plus a learnable map for images of one size.

    Bicubic interpolation adapts the map to images of other sizes, and to checkpoints
    with another map size.

    Args:
        dim (int): Channels.
        map_stride (int): Pixels of the image per entry of the map.
        image_size (int | Sequence[int]): Side, or height and width, of the images for
            which the map is stored. Default: 224.

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
        """Interpolate the map in a state dict, in place, to the size of this one.

        If the map is missing or has another number of channels, the loader reports it.
        """
        name = f'{prefix}pos_embed'
        found = state_dict.get(name)
        if found is None or not found.is_floating_point() or found.dim() != 4:
            return
        if found.shape[:2] == self.pos_embed.shape[:2]:
            wide = found if found.dtype == torch.float64 else found.float()
            resized = _resize(wide, self.pos_embed.shape[-2:])
            state_dict[name] = resized.to(found.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        self.adapt_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


MODELS.register_module('rest_pos_none', module=nn.Identity)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode='bicubic', align_corners=False)


# ---------------------------------------------------------------- attentions (table 7)


@MODELS.register_module('rest_attn_emsa_without_both')
class ReducedMSA(EMSA):
    """EMSA without interaction of the heads and without InstanceNorm.

    Arguments as in :class:`EMSA`.
    """

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        if num_heads > 1:
            del self.transform_conv

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        drop = self.attn_drop if self.training else 0.0
        return attention(q, k, v, self.scale, drop, self.attn_impl)


@MODELS.register_module('rest_attn_msa')
class MSA(ReducedMSA):
    """Multi-head self-attention on all tokens, ``softmax(q k^T / sqrt(d)) v``.

    Arguments as in :class:`EMSA`; ``sr_ratio`` has no effect.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, **kwargs: Any):
        super().__init__(dim, num_heads, sr_ratio=1, **kwargs)


@MODELS.register_module('rest_attn_emsa_without_norm')
class UnnormalisedEMSA(EMSA):
    """EMSA without InstanceNorm, ``softmax(Conv1x1(scale * q k^T)) v``.

    It stores all maps. Arguments as in :class:`EMSA`.

    Raises:
        ValueError: If ``attn_impl`` is neither ``'auto'`` nor ``'dense'``.
    """

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        if self.attn_impl not in ('auto', 'dense'):
            raise ValueError(
                "the attention 'emsa_without_norm' has no tiled implementation; take "
                f"attn_impl='auto' or 'dense', found {self.attn_impl!r}"
            )
        if num_heads > 1:
            self.mix_conv = self.transform_conv
            del self.transform_conv

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.num_heads == 1:
            return super().attend(q, k, v)
        # B, h, N, M
        maps = self.mix_conv((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        # B, h, N, d
        return F.dropout(maps, self.attn_drop, self.training).to(v.dtype) @ v


class PooledEMSA(EMSA):
    """EMSA that reduces keys and values by pooling over the same windows.

    Args:
        reduction (str): ``'avg'`` or ``'max'``.

    The other arguments are those of :class:`EMSA`.
    """

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int, reduction: str, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_heads, sr_ratio, **kwargs)
        self.reduction = reduction
        if sr_ratio == 1:
            return
        del self.sr, self.sr_norm
        kernel_size, padding = sr_ratio + 1, sr_ratio // 2
        if reduction == 'avg':
            self.sr = nn.AvgPool2d(
                kernel_size, sr_ratio, padding, count_include_pad=False
            )
            self.avg_norm = nn.LayerNorm(dim)
        else:
            self.sr = nn.MaxPool2d(kernel_size, sr_ratio, padding)
            self.max_norm = nn.LayerNorm(dim)

    def reduce(self, x: Tensor, size: Size) -> Tensor:
        if self.sr_ratio == 1:
            return x
        norm = self.avg_norm if self.reduction == 'avg' else self.max_norm
        return norm(to_tokens(self.sr(to_map(x, size))))


@MODELS.register_module('rest_attn_emsa')
def emsa(sr_ratio: int = 1, reduction: str = 'conv', **kwargs: Any) -> EMSA:
    """Build the published attention, or its variant with pooling.

    Args:
        sr_ratio (int): As in :class:`EMSA`. Default: 1.
        reduction (str): ``'conv'``, as published, or ``'avg'`` or ``'max'`` for
            pooling. Default: ``'conv'``.
        **kwargs: As in :class:`EMSA`.

    Raises:
        ValueError: If ``reduction`` has another value.
    """
    if reduction not in ('conv', 'avg', 'max'):
        raise ValueError(
            "reduction of an attention must be one of 'conv', 'avg', 'max', "
            f'found {reduction!r}'
        )
    if reduction == 'conv':
        return EMSA(sr_ratio=sr_ratio, **kwargs)
    return PooledEMSA(sr_ratio=sr_ratio, reduction=reduction, **kwargs)
