"""ResT v2, the second generation (arXiv:2204.07366).

The network in the order of :mod:`mmrest.models.rest`: parts, blocks, stages. What both
generations share is imported from there. Three things differ: the stem and the patch
embeddings end with a LayerNorm, the attention is plain, with a branch that upsamples
the values, and the norms of the outputs do not lie on the way to the next stage.

The parameters have the names of the published ImageNet checkpoints.
"""

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import attention
from .rest import Arch, BaseResT, Block, PixelAttention, Size, Stage
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

# of every LayerNorm; ResT has PyTorch's default, 1e-5
EPS = 1e-6

# of the published ImageNet models
ARCHS: dict[str, Arch] = {
    'tiny': Arch((96, 192, 384, 768), (1, 2, 4, 8), (1, 2, 6, 2), (8, 4, 2, 1)),
    'small': Arch((96, 192, 384, 768), (1, 2, 4, 8), (1, 2, 12, 2), (8, 4, 2, 1)),
    'base': Arch((96, 192, 384, 768), (1, 2, 4, 8), (1, 3, 16, 3), (8, 4, 2, 1)),
    'large': Arch((128, 256, 512, 1024), (2, 4, 8, 16), (2, 3, 16, 2), (8, 4, 2, 1)),
}


# ---------------------------------------------------------------- entries of the stages


class Stem(nn.Module):
    """Two 3x3 convolutions with stride 2 and a 1x1 one, the position, a LayerNorm.

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
    """Entry of stages 2 to 4: halves the map, encodes the position, normalises.

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
    """PyTorch's, with a result in channels_last order on every device."""

    def forward(self, x: Tensor) -> Tensor:
        # on a CPU it keeps the order of x
        return super().forward(x) if x.device.type == 'cpu' else self.copy_once(x)

    def copy_once(self, x: Tensor) -> Tensor:
        """The same where PyTorch's result is contiguous, and tokens a second copy."""
        r, (b, c, h, w) = self.upscale_factor, x.shape
        # B, r * r * C, H, W -> B, H, r, W, r, C -> B, C, r * H, r * W
        x = x.reshape(b, c // r**2, r, r, h, w).permute(0, 4, 2, 5, 3, 1)
        return x.reshape(b, h * r, w * r, c // r**2).permute(0, 3, 1, 2)


def crop(x: Tensor, size: Size) -> Tensor:
    """Cut (B, H', W', C) down to (B, H, W, C)."""
    if not torch.compiler.is_compiling():
        return x[:, : size[0], : size[1]]
    # a slice has other strides where there is something to cut, and so a program for
    # dynamic sizes would hold for half of them
    below, right = size[0] - x.shape[1], size[1] - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, below))


class EMSAv2(nn.Module):
    """Efficient multi-head self-attention, second version.

    A depthwise convolution reduces the map that keys and values come from, as in
    :class:`mmrest.models.rest.EMSA`. The heads do not interact, and no norm follows
    the softmax. Instead the values, upsampled to the size of the queries by a
    convolution and a pixel shuffle, are added to the result.

    Args:
        dim (int): Channels C of the tokens.
        num_heads (int): Heads h; they divide ``dim``.
        sr_ratio (int): Keys and values come from a map of
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
        # B, N, C -> B, M, C -> B, M, 2C -> twice B, M, C
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
        # the sum takes the name, so that what it came from is freed before `proj`
        x = x + self.upsample(v, reduced_size, size)
        return self.proj(x)

    def reduce(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        """The tokens that keys and values come from, (B, M, C), and their grid."""
        if self.sr_ratio == 1:
            return x, size
        # B, N, C -> B, C, H, W -> B, C, H / sr, W / sr -> B, M, C
        x = reduce_map(self.sr, to_map(x, size))
        return self.sr_norm(to_tokens(x)), (x.shape[2], x.shape[3])

    def upsample(self, v: Tensor, reduced_size: Size, size: Size) -> Tensor:
        """Values (B, M, C) on a grid as large as that of the queries, (B, N, C)."""
        # B, M, C -> B, C, H / sr, W / sr -> B, C, H, W -> B, H, W, C
        x = self.up(to_map(v, reduced_size)).permute(0, 2, 3, 1)
        # rows and columns beyond the map are there if the ratio does not divide it
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
            integers each) and ``mlp_ratios`` (four numbers or one, default 4).
            Default: ``'tiny'``.
        in_channels (int): Channels of the image. Default: 3.
        out_indices (Sequence[int]): Stages whose maps are returned, ascending;
            0 to 3 stand for stages 1 to 4. Later stages are not built.
            Default: (0, 1, 2, 3).
        drop_path_rate (float): Stochastic depth of the last block; it rises
            linearly from 0 at the first. Default: 0.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and stages
            1 to k with their patch embeddings: no gradients, norms in evaluation
            mode. The norms of the outputs stay trainable. Default: -1.
        norm_eval (bool): Whether all BatchNorms, which are in the stem, stay in
            evaluation mode. Default: False.
        with_cp (bool): Whether the activations of stem, patch embeddings and blocks
            are computed again in the backward pass instead of being stored. The
            statistics of BatchNorms are updated once all the same. Default: False.
        norm_cfg (dict): The two norms between the convolutions of the stem.
            Default: ``dict(type='BN')``.
        out_norm (str): ``'branch'``: each output has a LayerNorm of its own,
            ``norm_1`` to ``norm_4``, and the next stage receives the plain map.
            ``'final'``, for classification: stage 4 has the classifier's ``norm``
            instead. Default: ``'branch'``.
        attn_impl (str): ``'auto'`` is PyTorch's fused attention, which stores no
            attention map, and ``'tiled'`` means the same here. ``'dense'`` computes
            as the published code does, with every map stored. Default: ``'auto'``.
        pretrained (str, optional): Deprecated, as in mmseg: a checkpoint, instead of
            ``init_cfg``.
        init_cfg (dict | list[dict], optional): ``dict(type='Pretrained',
            checkpoint=...)`` reads a published or own checkpoint, as in
            :class:`mmrest.models.rest.ResT`. Without it, weights are drawn: truncated
            normal with standard deviation 0.02.

    Raises:
        ValueError: If an argument is not one of those described.

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
    entry_names = ('stem', 'patch_2', 'patch_3', 'patch_4')

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
        check_norm_cfg(norm_cfg)

        dims, heads, depths, sr_ratios, mlp_ratios = self.arch
        drop_paths = self.drop_path_rates(drop_path_rate)
        for i in range(self.num_stages):
            if i == 0:
                self.stem = Stem(in_channels, dims[0], norm_cfg)
            else:
                self.add_module(self.entry_names[i], PatchEmbed(dims[i - 1], dims[i]))
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

    @property
    def out_norm_names(self) -> tuple[str, ...]:
        """The norm of the output of each stage."""
        last = 'norm' if self.out_norm == 'final' else 'norm_4'
        return ('norm_1', 'norm_2', 'norm_3', last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of the requested stages.

        Args:
            x (Tensor): Images, of shape (B, in_channels, H, W), of any size.

        Returns:
            tuple[Tensor, ...]: For each of ``out_indices`` a map of shape
            (B, C_i, ceil(H / 4 / 2**i), ceil(W / 4 / 2**i)), contiguous.
        """
        x = self.take_image(x)
        outs = []
        for i in range(self.num_stages):
            # B, C, H, W -> B, C_i, H_i, W_i
            x = self.enter(i, x)
            size = (x.shape[2], x.shape[3])
            # B, C_i, H_i, W_i -> B, N, C_i -> B, C_i, H_i, W_i
            x = to_map(self.stage(i)(to_tokens(x), size), size)
            if i in self.out_indices:
                out = norm_map(getattr(self, self.out_norm_names[i]), x)
                # contiguous: mmcv's RoIAlign reads channels_last maps of a CPU wrongly
                outs.append(out.contiguous())
        return tuple(outs)

    def adapt_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename the norms of a published detector, ``norm_1.0.weight`` and so on."""
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

    def names_not_in_checkpoints(self) -> tuple[str, ...]:
        names = (self.out_norm_names[i] for i in self.out_indices)
        return tuple(name for name in names if name != 'norm')

    def names_only_in_checkpoints(self) -> tuple[str, ...]:
        absent = {'head'}
        if not hasattr(self, 'norm'):
            absent.add('norm')
        for i in range(NUM_STAGES):
            if i not in self.out_indices:
                absent.add(f'norm_{i + 1}')
            if i >= self.num_stages:
                absent.update((self.entry_names[i], f'stage{i + 1}'))
        return tuple(sorted(absent))
