"""ResT v2, the second generation (arXiv:2204.07366).

The order is that of :mod:`mmrest.models.rest`, from which the shared parts come. Three
things differ. Stem and patch embeddings end with a LayerNorm. The attention is plain
and has a branch that upsamples the values. The next stage receives a map before its
output norm.

Parameters are named as in the published ImageNet checkpoints.
"""

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import attention
from .base import BaseResT
from .rest import Arch, Block, PixelAttention, Size, Stage
from .utils import (
    NUM_STAGES,
    check_norm_cfg,
    depthwise_conv,
    match_gradient_strides,
    reduce_map,
    resolve_arch,
    to_map,
    to_tokens,
)

# Epsilon of all LayerNorms; ResT has PyTorch's default, 1e-5
EPS = 1e-6

# Sizes of the published ImageNet models
ARCHS: dict[str, Arch] = {
    'tiny': Arch((96, 192, 384, 768), (1, 2, 4, 8), (1, 2, 6, 2), (8, 4, 2, 1)),
    'small': Arch((96, 192, 384, 768), (1, 2, 4, 8), (1, 2, 12, 2), (8, 4, 2, 1)),
    'base': Arch((96, 192, 384, 768), (1, 2, 4, 8), (1, 3, 16, 3), (8, 4, 2, 1)),
    'large': Arch((128, 256, 512, 1024), (2, 4, 8, 16), (2, 3, 16, 2), (8, 4, 2, 1)),
}


# ---------------------------------------------------------------- embeddings


class Stem(nn.Module):
    """Two 3x3 convolutions with stride 2, a 1x1 one, pixel attention, LayerNorm.

    An image (B, in_channels, H, W) becomes a map (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_channels: int, dim: int, norm_cfg: dict) -> None:
        super().__init__()
        mid = dim // 2
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, mid, 3, stride=2, padding=1, bias=False),
            build_norm_layer(norm_cfg, mid)[1],
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, dim, 3, stride=2, padding=1, bias=False),
            build_norm_layer(norm_cfg, dim)[1],
            nn.ReLU(inplace=True),
            nn.Conv2d(dim, dim, 1),
        )
        self.pos = PixelAttention(dim)
        self.norm = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        # B, in_channels, H, W -> B, dim, H / 4, W / 4
        return norm_map(self.norm, self.pos(self.proj(x)))


class PatchEmbed(nn.Module):
    """Stages 2 to 4: a 3x3 convolution with stride 2, pixel attention, LayerNorm.

    A map of shape (B, in_dim, H, W) becomes (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.pos = PixelAttention(dim)
        self.norm = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return norm_map(self.norm, self.pos(self.proj(x)))


def norm_map(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise each token of a map (B, C, H, W)."""
    return to_map(norm(to_tokens(x)), (x.shape[2], x.shape[3]))


# ---------------------------------------------------------------- blocks


class PixelShuffle(nn.PixelShuffle):
    """PyTorch's PixelShuffle with a result in channels_last order on every device."""

    def forward(self, x: Tensor) -> Tensor:
        # on CPUs, PyTorch keeps the memory format of x
        return super().forward(x) if x.device.type == 'cpu' else self.copy_once(x)

    def copy_once(self, x: Tensor) -> Tensor:
        """Shuffle with one copy; on GPUs PyTorch's result would need another one."""
        r, (b, c, h, w) = self.upscale_factor, x.shape
        # B, r * r * C, H, W -> B, H, r, W, r, C -> B, C, r * H, r * W
        x = x.reshape(b, c // r**2, r, r, h, w).permute(0, 4, 2, 5, 3, 1)
        return x.reshape(b, h * r, w * r, c // r**2).permute(0, 3, 1, 2)


def crop(x: Tensor, size: Size) -> Tensor:
    """Cut (B, H', W', C) down to (B, H, W, C)."""
    if not torch.compiler.is_compiling():
        return x[:, : size[0], : size[1]]
    # The strides of a slice depend on whether it cuts anything. A program that is
    # compiled for dynamic sizes would thus be valid for some sizes only.
    below, right = size[0] - x.shape[1], size[1] - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, below))


class EMSAv2(nn.Module):
    """Efficient multi-head self-attention, second version.

    As in :class:`mmrest.models.rest.EMSA`, a depthwise convolution reduces the map
    from which keys and values are computed. The heads do not interact, and no norm
    follows the softmax. Instead, a convolution and a pixel shuffle upsample the values
    to the size of the queries, and they are added to the result.

    Args:
        dim (int): Channels C of the tokens.
        num_heads (int): Heads h. Must divide ``dim``.
        sr_ratio (int): Spatial reduction of keys and values, to a map of
            ceil(H / sr_ratio) x ceil(W / sr_ratio). Default: 1.
        attn_impl (str): See :class:`ResTV2`. Default: ``'auto'``.
    """

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int = 1, attn_impl: str = 'auto'
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.sr_ratio = sr_ratio
        self.attn_impl = attn_impl

        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim * 2)
        if sr_ratio > 1:
            self.sr = depthwise_conv(
                dim, kernel_size=sr_ratio + 1, stride=sr_ratio, padding=sr_ratio // 2
            )
            self.sr_norm = nn.LayerNorm(dim, EPS)
        self.up = nn.Sequential(
            depthwise_conv(dim, dim * sr_ratio**2, kernel_size=3, padding=1),
            PixelShuffle(sr_ratio),
        )
        self.up_norm = nn.LayerNorm(dim, EPS)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        # B, N, C -> B, M, C -> B, M, 2C -> k and v: B, M, C
        reduced, reduced_size = self.reduce(x, size)
        k, v = self.kv(reduced).chunk(2, dim=-1)
        # B, N, C -> B, h, N, d
        x = attention(
            self.split_heads(self.q(x)),
            self.split_heads(k),
            self.split_heads(v),
            self.scale,
            attn_impl=self.attn_impl,
        )
        # B, h, N, d -> B, N, C
        x = x.transpose(1, 2).flatten(2)
        # assigned to x, so that both summands are freed before `proj`
        x = x + self.upsample(v, reduced_size, size)
        return self.proj(x)

    def reduce(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Reduce the tokens for keys and values, to (B, M, C), and give their size."""
        if self.sr_ratio == 1:
            return x, size
        # B, N, C -> B, C, H, W -> B, C, H / sr, W / sr -> B, M, C
        x = reduce_map(self.sr, to_map(x, size))
        return self.sr_norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def upsample(self, v: Tensor, reduced_size: Size, size: Size) -> Tensor:
        """Upsample the values (B, M, C) to the size of the queries, (B, N, C)."""
        # B, M, C -> B, C, H / sr, W / sr -> B, C, H, W -> B, H, W, C
        x = self.up(to_map(v, reduced_size)).permute(0, 2, 3, 1)
        # where the ratio does not divide the size, there are too many rows or columns
        return self.up_norm(crop(x, size).flatten(1, 2))

    def split_heads(self, x: Tensor) -> Tensor:
        """B, N, C -> B, h, N, d"""
        shape = (x.shape[0], x.shape[1], self.num_heads, self.head_dim)
        return x.reshape(shape).transpose(1, 2)


# ---------------------------------------------------------------- the network


@MODELS.register_module()
class ResTV2(BaseResT):
    """ResT v2 backbone.

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a
            dict with ``embed_dims``, ``num_heads``, ``depths``, ``sr_ratios`` (four
            integers each; ``sr_ratios`` are 1 or even) and ``mlp_ratios`` (four
            numbers or one, default 4). Default: ``'tiny'``.
        in_channels (int): Channels of the image. Default: 3.
        out_indices (Sequence[int]): Stages whose maps are returned, in ascending
            order, counted from 0. Stages after the last one are not built.
            Default: (0, 1, 2, 3).
        drop_path_rate (float): Stochastic depth rate of the last block. The rate
            rises linearly from 0 in the first block. Default: 0.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and stages
            1 to k with their patch embeddings: no gradients, norms in evaluation
            mode. The output norms stay trainable. Default: -1.
        norm_eval (bool): Whether all BatchNorms, which are in the stem, stay in
            evaluation mode. Default: False.
        with_cp (bool): Whether stem, patch embeddings and blocks recompute their
            activations in the backward pass instead of storing them. BatchNorms
            still update their statistics once. Default: False.
        norm_cfg (dict): Config of the two norms between the stem's convolutions.
            Default: ``dict(type='BN')``.
        out_norm (str): ``'branch'``: the outputs have LayerNorms ``norm_1`` to
            ``norm_4``, and the next stage receives the map before the norm.
            ``'final'``, for classification: stage 4 has the classifier's ``norm``
            instead. Default: ``'branch'``.
        attn_impl (str): ``'dense'`` stores all attention maps, as the published code
            does. The other values of :class:`mmrest.models.rest.ResT` all mean
            PyTorch's fused attention, which stores none. Default: ``'auto'``.
        pretrained (str, optional): A checkpoint. Deprecated, use ``init_cfg``.
        init_cfg (dict | list[dict], optional): As in :class:`mmrest.models.rest.ResT`.
            Default: None.

    Raises:
        ValueError: If an argument has a value other than those above.

    Example:
        >>> import torch
        >>> from mmrest import ResTV2
        >>> model = ResTV2(arch='tiny').eval()
        >>> with torch.no_grad():
        ...     outs = model(torch.rand(1, 3, 250, 333))
        >>> [tuple(out.shape) for out in outs]
        [(1, 96, 63, 84), (1, 192, 32, 42), (1, 384, 16, 21), (1, 768, 8, 11)]
    """

    generation = 'ResTV2'
    embed_names = ('stem', 'patch_2', 'patch_3', 'patch_4')

    def __init__(
        self,
        arch: Union[str, dict] = 'tiny',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006
        out_norm: str = 'branch',
        attn_impl: str = 'auto',
        pretrained: Optional[str] = None,
        init_cfg: Union[dict, list, None] = None,
    ) -> None:
        super().__init__(
            resolve_arch(arch, ARCHS),
            in_channels,
            out_indices,
            frozen_stages,
            norm_eval,
            with_cp,
            attn_impl,
            pretrained,
            init_cfg,
        )
        if out_norm not in ('branch', 'final'):
            raise ValueError(
                f"out_norm must be 'branch' or 'final', found {out_norm!r}"
            )
        self.out_norm = out_norm
        last = 'norm' if out_norm == 'final' else 'norm_4'
        self.out_norm_names = ('norm_1', 'norm_2', 'norm_3', last)
        check_norm_cfg(norm_cfg)

        dims, heads, depths, sr_ratios, mlp_ratios = self.arch
        drop_paths = self.drop_path_rates(drop_path_rate)
        for i in range(self.num_stages):
            if i == 0:
                self.stem = Stem(in_channels, dims[0], norm_cfg)
            else:
                self.add_module(self.embed_names[i], PatchEmbed(dims[i - 1], dims[i]))
            stage = Stage(
                Block(
                    dim=dims[i],
                    attn=EMSAv2(dims[i], heads[i], sr_ratios[i], attn_impl),
                    mlp_ratio=mlp_ratios[i],
                    drop_path=drop_paths[i][j],
                    norm_eps=EPS,
                )
                for j in range(depths[i])
            )
            stage.with_cp = with_cp
            self.add_module(f'stage{i + 1}', stage)
        for i in self.out_indices:
            self.add_module(self.out_norm_names[i], nn.LayerNorm(dims[i], EPS))
        match_gradient_strides(self)
        self.freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested stages, see :meth:`ResT.forward`."""
        x = self.prepare_image(x)
        outs = []
        for i in range(self.num_stages):
            # B, C, H, W -> B, C_i, H_i, W_i
            x = self.embed(i, x)
            size = (x.shape[2], x.shape[3])
            # B, C_i, H_i, W_i -> B, N, C_i -> B, C_i, H_i, W_i
            x = to_map(self.stage(i)(to_tokens(x), size), size)
            if i in self.out_indices:
                out = norm_map(getattr(self, self.out_norm_names[i]), x)
                # contiguous, since mmcv's RoIAlign misreads channels_last maps on CPUs
                outs.append(out.contiguous())
        return tuple(outs)

    def adapt_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename output norms of published detectors, such as ``norm_1.0.weight``."""
        for i in range(1, NUM_STAGES + 1):
            for end in ('weight', 'bias'):
                name = f'{prefix}norm_{i}.0.{end}'
                if name in state_dict:
                    state_dict[f'{prefix}norm_{i}.{end}'] = state_dict.pop(name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        self.adapt_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def names_only_in_checkpoints(self) -> tuple[str, ...]:
        names = super().names_only_in_checkpoints()
        # files of classifiers have `norm`, those of detectors `norm_4`
        return names if hasattr(self, 'norm') else (*names, 'norm', 'norm_4')
